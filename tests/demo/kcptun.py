"""kcptun: TCP carried in datagrams, here between curl and nginx. It retransmits by itself, and holds to no rate."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.demo.place import DATAGRAMS_PORT, Place, running
from tests.demo.signals import Signals
from tests.demo.web import DemoError

LOCAL_PORT = 2222
_LOOPBACK = "127.0.0.1"

_START_S = 10.0
_LISTENS = "listening on:"
# No cipher, no compression of random bytes, no forward error correction: only what both ways need.
_OPTIONS = ["--crypt", "none", "--nocomp", "--datashard", "0", "--parityshard", "0", "--mode", "fast2"]


def programs() -> tuple[str, str] | None:
    """Paths of client and server, by Debian's names; None where they are not installed."""
    client, server = shutil.which("kcptun-client"), shutil.which("kcptun-server")
    return (client, server) if client and server else None


@contextlib.contextmanager
def server(place: Place, program: str, folder: Path, window: int, web_port: int, signals: Signals) -> Iterator[int]:
    """Leads to the web server; with at most `window` packets under way. Yields its UDP port."""
    port = place.port(DATAGRAMS_PORT)
    argv = [program, "-l", f":{port}", "-t", f"{_LOOPBACK}:{web_port}"]
    with _started(place, "server", argv, folder, window, signals):
        yield port


@contextlib.contextmanager
def client(place: Place, program: str, folder: Path, window: int, to: str, signals: Signals) -> Iterator[int]:
    """Sends its datagrams `to` that address and port. Yields its TCP port."""
    port = place.port(LOCAL_PORT)
    argv = [program, "-l", f"{_LOOPBACK}:{port}", "-r", to]
    with _started(place, "client", argv, folder, window, signals):
        yield port


@contextlib.contextmanager
def _started(place: Place, end: str, argv: list[str], folder: Path, window: int, signals: Signals) -> Iterator[None]:
    path = folder / f"kcptun-{end}.log"
    windows = ["--sndwnd", str(window), "--rcvwnd", str(window)]
    with open(path, "wb") as log:
        process = place.start(end, [*argv, *_OPTIONS, *windows], stdout=log, stderr=log)
    with running(process):
        listening = signals.wait(lambda: _LISTENS in path.read_text() or process.poll() is not None, _START_S)
        if not listening or process.poll() is not None:
            raise DemoError(f"kcptun does not start at the {end}; it says:\n{path.read_text().strip()}")
        yield
