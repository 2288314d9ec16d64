"""What can lie between an application and its service: nothing, two chained relays, or a client and a server of
forwarder. Each is a context manager that yields where to connect at the client and the processes to blame."""

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.measure import BenchError, wait_listening
from tests.netlab import Lab
from tests.system.pair import ENDS, Pair

SERVICE_PORT = 8000
"""Where the service listens at the server."""
_NEAR, _FAR = 7001, 7000
_LOOPBACK = "127.0.0.1"
_CONGESTIONS = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")

_HAPROXY = """\
global
  nbthread 1
  maxconn 1000
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen relay
  bind {listen}
  server next {to}
"""


@dataclass(frozen=True, slots=True)
class Between:
    """`target` is where the client connects; `pids` are the relays; `pair` is there if they are ours."""

    target: tuple[str, int]
    pids: list[int]
    pair: Pair | None = None


Way = Callable[[Lab], AbstractContextManager[Between]]


@contextlib.contextmanager
def direct(lab: Lab) -> Iterator[Between]:
    yield Between((lab.server_ip4, SERVICE_PORT), [])


@contextlib.contextmanager
def haproxy(lab: Lab) -> Iterator[Between]:
    """Two, of one thread each."""
    with tempfile.TemporaryDirectory(prefix="forwarder-bench-") as folder:

        def start(namespace: str, listen: str, to: str) -> subprocess.Popen[Any]:
            config = Path(folder) / f"{namespace}.cfg"
            config.write_text(_HAPROXY.format(listen=listen, to=to))
            return lab.popen(namespace, ["haproxy", "-db", "-f", config], stderr=subprocess.DEVNULL)

        with _chain(lab, start) as between:
            yield between


@contextlib.contextmanager
def socat(lab: Lab) -> Iterator[Between]:
    """Two; each forks for a connection."""

    def start(namespace: str, listen: str, to: str) -> subprocess.Popen[Any]:
        host, port = listen.split(":")
        options = f"bind={host},reuseaddr,fork,nodelay"
        command = ["socat", "-b", "131072", f"TCP4-LISTEN:{port},{options}", f"TCP4:{to},nodelay"]
        return lab.popen(namespace, command, stderr=subprocess.DEVNULL)

    with _chain(lab, start) as between:
        yield between


@contextlib.contextmanager
def _chain(lab: Lab, start: Callable[[str, str, str], subprocess.Popen[Any]]) -> Iterator[Between]:
    far = start("server", f"{lab.server_ip4}:{_FAR}", f"{_LOOPBACK}:{SERVICE_PORT}")
    near = start("client", f"{_LOOPBACK}:{_NEAR}", f"{lab.server_ip4}:{_FAR}")
    try:
        wait_listening(lab, "server", _FAR)
        wait_listening(lab, "client", _NEAR)
        yield Between((_LOOPBACK, _NEAR), [near.pid, far.pid])
    finally:
        for process in (near, far):
            process.terminate()
            process.wait()


def forwarder(stripes: int | None, workers: int, congestion: str) -> Way:
    """That many stripes (None: as many as it finds best), and workers at each end."""

    @contextlib.contextmanager
    def way(lab: Lab) -> Iterator[Between]:
        try:
            with Pair(
                lab,
                workers=(workers, workers),
                somaxconn="auto" if stripes is None else stripes,
                congestion=congestion,
                target_port=SERVICE_PORT,
                client_tunnel="dial_rate = 1000\n",
            ) as pair:
                yield Between((_LOOPBACK, pair.local_port), [pair.processes[end].pid for end in ENDS], pair)
        except AssertionError as error:
            first, *rest = str(error).strip().splitlines() or ["no pair"]
            raise BenchError(f"{first} {rest[-1]}" if rest else first) from error

    return way


def congestions() -> list[str]:
    """What this kernel has."""
    return _CONGESTIONS.read_text().split()


def best_congestion() -> str:
    """The better one of what this kernel has."""
    return "bbr" if "bbr" in congestions() else "cubic"


def set_congestion(lab: Lab, algorithm: str) -> None:
    """For all connections in both namespaces, whoever makes them: haproxy and socat cannot say it themselves."""
    for namespace in ENDS:
        for line in lab.run(namespace, ["ip", "-4", "route", "show", "table", "all"]).stdout.splitlines():
            if not line.startswith("broadcast"):
                lab.run(namespace, ["ip", "route", "change", *line.split(), "congctl", algorithm])
