"""Both ends of one fake-TCP connection in the namespaces of a lab, in this process."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, Self

from tests.netlab import Lab
from tests.system import tun
from tests.system.segments import EVERYTHING, SYN, Segment, read
from workers.core.bpf import capture
from workers.io import packet
from workers.io.fake_handshake import close_silently, prepare, settle
from workers.io.packet import PacketPort, find_device

PORT = 443
QUIET_S = 0.4
"""How long nothing may be seen on the wire: a FIN or a SYN-ACK would come at once, and again after 200 ms."""


class Ends:
    """A connection to PORT, as the kernels' sockets and as the packet ports see it. Closes without a word.

    up, down: who sends, the frame of the handshake whose headers that takes, and who receives.
    """

    def __init__(self, lab: Lab, version: int, *, filtered: bool = True, device: str = "eth0") -> None:
        self.lab, self.filtered, self.device = lab, filtered, device
        self.family = socket.AF_INET if version == 4 else socket.AF_INET6
        wired = (lab.server_ip4, lab.server_ip6) if device == "eth0" else tun.ADDRESSES["server"]
        self.address = wired[version == 6]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.client_port = stack.enter_context(packet_port(self.lab, "client", self.device))
            self.server_port = stack.enter_context(packet_port(self.lab, "server", self.device))
            listener = stack.enter_context(self.lab.socket("server", self.family))
            self.client = self.lab.socket("client", self.family)
            stack.callback(close_silently, self.client)
            if self.filtered:
                prepare(listener)
                prepare(self.client)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.address, PORT))
            listener.listen()
            self.client.settimeout(5)
            self.client.connect((self.address, PORT))
            self.server = listener.accept()[0]
            stack.callback(close_silently, self.server)
            settle(self.client)
            settle(self.server)
            self.seen_by_client = [next_frame(self.client_port) for _ in range(2)]
            self.seen_by_server = [next_frame(self.server_port) for _ in range(3)]
            self.up = self.client_port, self.seen_by_client[1], self.server_port
            self.down = self.server_port, self.seen_by_server[1], self.client_port
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


@contextmanager
def packet_port(
    lab: Lab, namespace: Literal["client", "server"], device: str = "eth0", program: bytes | None = None
) -> Iterator[PacketPort]:
    sock = lab.socket(namespace, socket.AF_PACKET, socket.SOCK_RAW, 0)
    packet.prepare(sock)
    found = find_device(sock, device)
    port = PacketPort(sock, found, program or capture(namespace, [PORT], link_bytes=found.link_bytes))
    try:
        yield port
    finally:
        port.close()


@contextmanager
def wire(lab: Lab) -> Iterator[list[Segment]]:
    """What passes the link while the block runs and for QUIET_S after it, seen by an observer of its own."""
    seen: list[Segment] = []
    with packet_port(lab, "client", program=EVERYTHING) as observer:
        yield seen
        until = time.monotonic() + QUIET_S
        while (left := until - time.monotonic()) > 0:
            if (segment := read(observer, left)) is not None:
                seen.append(segment)


def next_frame(port: PacketPort) -> Segment:
    segment = read(port, 5.0)
    assert segment is not None
    return segment


def received(port: PacketPort, size: int) -> tuple[bytes, list[Segment]]:
    """The next `size` bytes of payload, and the frames that they came in."""
    frames: list[Segment] = []
    while sum(len(frame.payload) for frame in frames) < size:
        frames.append(next_frame(port))
    return b"".join(frame.payload for frame in frames), frames


def first_byte(template: Segment) -> int:
    """The number of the first byte after the handshake."""
    return template.sequence + bool(template.flags & SYN)


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]
