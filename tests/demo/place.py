"""Where the demo happens: in two namespaces, or on loopback."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.netlab import Connection, Lab, Link

LINK = Link(delay_ms=25, rate_bps=500e6)
RATE_BPS = 10e6
PER_CONNECTION = Connection(rate_bps=RATE_BPS)
DATAGRAMS_PORT = 4000
"""Of kcptun's server."""
SPRAY_PORTS = range(20000, 20010)

_ROOT = Path(__file__).parents[2]
_STOP_S = 10.0

Process = subprocess.Popen[Any]


class Place(Protocol):
    """`server` is the server's address as the client sees it, `lab` what limits each connection, if anything does,
    `congestion` the congestion control of all connections between the two, or whichever the system has."""

    server: str
    lab: Lab | None
    congestion: str | None

    def start(self, end: str, argv: Sequence[str], **options: Any) -> Process:
        """A process at "client" or "server", in a session of its own, that does not outlive the demo."""

    def listen(self, port: int) -> socket.socket:
        """A listening socket at the server; its connections have the place's congestion control."""

    def port(self, wanted: int) -> int:
        """That port, or one that is free here and was not returned before."""


class Namespaces:
    def __init__(self, lab: Lab) -> None:
        self.lab: Lab | None = lab
        self.server = lab.server_ip4
        self.congestion: str | None = "cubic"
        self._lab = lab

    def start(self, end: str, argv: Sequence[str], **options: Any) -> Process:
        return self._lab.popen(end, argv, stdin=subprocess.DEVNULL, cwd=_ROOT, start_new_session=True, **options)

    def listen(self, port: int) -> socket.socket:
        return self._lab.listen("server", "0.0.0.0", port, congestion=str(self.congestion))

    def port(self, wanted: int) -> int:
        return wanted


class Loopback:
    """Both ends in one place, without a limit."""

    def __init__(self) -> None:
        self.lab: Lab | None = None
        self.server = "127.0.0.1"
        self.congestion: str | None = None
        self._given: set[int] = set()

    def start(self, end: str, argv: Sequence[str], **options: Any) -> Process:
        tied = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
        return subprocess.Popen(tied, stdin=subprocess.DEVNULL, cwd=_ROOT, start_new_session=True, **options)

    def listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.bind((self.server, self.port(port)))
        listener.listen(128)
        return listener

    def port(self, wanted: int) -> int:
        while True:
            with socket.socket() as probe:
                probe.bind((self.server, 0))
                port = int(probe.getsockname()[1])
            if port not in self._given:
                self._given.add(port)
                return port


@contextlib.contextmanager
def namespaces() -> Iterator[Place]:
    """A connection of TCP waits for its rate, one that carries datagrams loses what is above it.

    Raises NamespacesRefused, NoCompiler.
    """
    policed = [
        Connection(rate_bps=RATE_BPS, police=True, burst_ms=50, port=port) for port in (DATAGRAMS_PORT, *SPRAY_PORTS)
    ]
    with Lab(LINK, connections=[PER_CONNECTION, *policed]) as lab:
        yield Namespaces(lab)


@contextlib.contextmanager
def running(process: Process) -> Iterator[Process]:
    """Ends the process with the block: by SIGTERM, and when that is not enough by SIGKILL to its whole session."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
