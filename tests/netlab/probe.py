"""Measures a lab from its ends, from within this process: what the tests of the lab itself compare."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from tests.netlab.lab import Lab

SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_TCPI_RTT = 68  # offset in struct tcp_info, linux/tcp.h


@contextmanager
def tcp(lab: Lab, family: int = 4, port: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: its end at the client, its end at the server."""
    address = lab.server_ip4 if family == 4 else lab.server_ip6
    with (
        lab.listen("server", address, port) as listener,
        lab.connect("client", address, listener.getsockname()[1]) as client,
    ):
        server, _ = listener.accept()
        with server:
            server.settimeout(10)
            yield client, server


@contextmanager
def udp(lab: Lab) -> Iterator[tuple[socket.socket, Callable[[], list[int]]]]:
    """A connected UDP socket at the client, and a function that ends reception: the numbers received, in order."""
    numbers: list[int] = []
    over = threading.Event()
    with (
        lab.socket("server", type=socket.SOCK_DGRAM) as receiver,
        lab.socket("client", type=socket.SOCK_DGRAM) as sender,
    ):
        with suppress(PermissionError):
            receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        receiver.bind((lab.server_ip4, 7000))
        receiver.settimeout(0.15)

        def receive() -> None:
            while True:
                try:
                    numbers.append(struct.unpack_from("!I", receiver.recv(2048))[0])
                except TimeoutError:
                    if over.is_set():
                        return

        thread = threading.Thread(target=receive)
        thread.start()

        def numbers_at_end() -> list[int]:
            over.set()
            thread.join()
            return numbers

        try:
            sender.bind((lab.client_ip4, 7001))
            sender.connect((lab.server_ip4, 7000))
            yield sender, numbers_at_end
        finally:
            numbers_at_end()


def send_numbered(sender: socket.socket, count: int, size: int = 100, per_second: float = 10_000) -> float:
    """Returns how long it took."""
    start = time.monotonic()
    for number in range(count):
        sender.send(struct.pack("!I", number) + bytes(size - 4))
        while number >= (time.monotonic() - start) * per_second:
            time.sleep(0.001)
    return time.monotonic() - start


def goodput(lab: Lab, streams: int, seconds: float, skip: float = 0.7) -> float:
    """Payload bit/s from client to server, after `skip` seconds."""
    received = [0] * streams
    over = threading.Event()

    def send(connection: socket.socket) -> None:
        with suppress(OSError):
            while not over.is_set():
                connection.sendall(bytes(65536))

    def receive(index: int, connection: socket.socket) -> None:
        with suppress(OSError):
            while data := connection.recv(262144):
                received[index] += len(data)

    with ExitStack() as stack:
        threads = []
        for index in range(streams):
            client, server = stack.enter_context(tcp(lab))
            threads += [
                threading.Thread(target=send, args=(client,)),
                threading.Thread(target=receive, args=(index, server)),
            ]
        for thread in threads:
            thread.start()
        time.sleep(skip)
        before, start = sum(received), time.monotonic()
        time.sleep(seconds)
        rate = (sum(received) - before) * 8 / (time.monotonic() - start)
        over.set()
        lab.reset()
        for thread in threads:
            thread.join()
    return rate


def handshake_ms(lab: Lab, family: int = 4, port: int = 0) -> float:
    """The kernel's round-trip time of SYN and SYN-ACK (tcpi_rtt): when this process runs does not matter."""
    with tcp(lab, family, port) as (client, _):
        return (
            float(struct.unpack_from("I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), _TCPI_RTT)[0])
            / 1e3
        )
