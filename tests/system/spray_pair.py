"""A real client and a real server with one spray tunnel in a lab's namespaces, and UDP sockets on both of its sides.

with Lab(emulate=False) as lab, SprayPair(lab, kind="all", ports=6, workers=(1, 2)) as pair:
    with pair.target() as target, answering(target), pair.application() as application:
        ask(application, b"hello")          # sends it, waits for the same datagram to come back
"""

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Self

from tests.netlab import Lab
from tests.system.pair import START_S, Pair

FIRST_PORT = 7001
LOCAL = ("127.0.0.1", 30000)
TARGET = ("127.0.0.1", 9999)
TUNNEL = "kcp"
ANSWER_S = 5.0
BUFFER_BYTES = 8 << 20
DATAGRAM_MAX = 65_535
DEFAULT_BACKEND = "packet"
backend_in_use = [DEFAULT_BACKEND]
"""Of both ends of the next pairs."""
_SO_RCVBUFFORCE = 33


def port_list(count: int) -> str:
    """So many ports, as the files name them."""
    return f"{FIRST_PORT}-{FIRST_PORT + count - 1}"


class SprayPair(Pair):
    """`ports` is how many; with the kind "all" each is there both ways. `version`: of IP between the two."""

    def __init__(
        self,
        lab: Lab,
        *,
        kind: str = "tcp",
        ports: int = 6,
        version: int = 4,
        workers: tuple[int, int] = (1, 1),
        client: str = "",
        server: str = "",
        client_tunnel: str = "",
        server_tunnel: str = "",
        start: bool = True,
    ) -> None:
        self.ports = [FIRST_PORT + number for number in range(ports)]
        both = f'ports = "{port_list(ports)}"\ntype = "{kind}"\nbackend = "{backend_in_use[0]}"\n'
        address = lab.server_ip4 if version == 4 else lab.server_ip6
        self._tunnels = {
            "client": f'host = {json.dumps(address)}\nludp = "{LOCAL[0]}:{LOCAL[1]}"\n{both}{client_tunnel}',
            "server": f'taddr = "{TARGET[0]}:{TARGET[1]}"\n{both}{server_tunnel}',
        }
        self.carriers = ports * (2 if kind == "all" else 1)
        super().__init__(
            lab, workers=workers, somaxconn=self.carriers, address=address, client=client, server=server, start=start
        )

    def _write(self, end: str, top: str, keys: str, tunnel: str) -> None:
        self.config(end).write_text(
            f'role = "{end}"\nworkers = {self.workers[end]}\n{top}\n[control]\nsocket = "{self.folder}/{end}.sock"\n'
            f'{keys}\n[[tunnel]]\nname = "{TUNNEL}"\nmode = "spray"\n{self._tunnels[end]}\n'
        )

    def __enter__(self) -> Self:
        return super().__enter__()

    # Looking inside

    def tunnel(self, end: str) -> dict[str, Any]:
        """See Pair."""
        (tunnel,) = self.status(end)["tunnels"]
        found: dict[str, Any] = tunnel
        return found

    def wait_flows(self, count: int, timeout_s: float = START_S) -> None:
        """Until both ends have so many conversations."""
        for end in ("client", "server"):
            self.wait(partial(self._has_flows, end, count), f"{count} conversations at the {end}", timeout_s)

    def _has_flows(self, end: str, count: int) -> bool:
        return self.flows_open(end) == count

    # The applications' view

    def application(self) -> socket.socket:
        """A socket that sends to the tunnel, and its answers come to."""
        sock = self._socket("client")
        sock.connect(LOCAL)
        return sock

    def target(self) -> socket.socket:
        """Where the tunnel leads to."""
        sock = self._socket("server")
        sock.bind(TARGET)
        return sock

    def _socket(self, namespace: str) -> socket.socket:
        sock = self.lab.socket(namespace, socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(ANSWER_S)
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
        return sock


@contextlib.contextmanager
def answering(target: socket.socket) -> Iterator[None]:
    """A target that sends every datagram back to where it came from, from a thread."""
    over, wake = os.pipe()

    def answer() -> None:
        while over not in select.select([target.fileno(), over], [], [])[0]:
            datagram, source = target.recvfrom(DATAGRAM_MAX)
            target.sendto(datagram, source)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        os.write(wake, b"!")
        thread.join()
        os.close(over)
        os.close(wake)


def ask(application: socket.socket, datagram: bytes) -> float:
    """Send a datagram, and expect it back as it was; how long that took."""
    start_s = time.monotonic()
    application.send(datagram)
    answer = application.recv(DATAGRAM_MAX)
    assert answer == datagram, f"{len(answer)} bytes came back for {len(datagram)}"
    return time.monotonic() - start_s


def ask_until_answered(application: socket.socket, timeout_s: float, every_s: float = 0.02) -> float:
    """Ask again and again, each time something else, until the first answer; how long that took."""
    start_s = time.monotonic()
    number = 0
    while time.monotonic() < start_s + timeout_s:
        application.send(b"%d" % number)
        number += 1
        if select.select([application], [], [], every_s)[0]:
            application.recv(DATAGRAM_MAX)
            return time.monotonic() - start_s
    raise AssertionError(f"no answer within {timeout_s:g} s")


def drain(sock: socket.socket, quiet_s: float = 0.5) -> list[bytes]:
    """What comes, until nothing has come for a while."""
    came = []
    while select.select([sock], [], [], quiet_s)[0]:
        came.append(sock.recv(DATAGRAM_MAX))
    return came


def flow(
    source: socket.socket, sink: socket.socket, datagrams: Iterable[bytes], per_second: float, address: Any = None
) -> list[tuple[bytes, Any]]:
    """Send at that pace, and receive meanwhile and until all is quiet: each datagram that came, and from where."""
    came: list[tuple[bytes, Any]] = []

    def receive(wait_s: float) -> bool:
        if not select.select([sink], [], [], max(wait_s, 0))[0]:
            return False
        came.append(sink.recvfrom(DATAGRAM_MAX))
        return True

    start_s = time.monotonic()
    for number, datagram in enumerate(datagrams):
        while (left_s := start_s + number / per_second - time.monotonic()) > 0:
            receive(left_s)
        if address is None:
            source.send(datagram)
        else:
            source.sendto(datagram, address)
    while receive(0.5):
        pass
    return came
