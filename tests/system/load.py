"""Load on a tunnel, and what others see meanwhile: rates, shares, round trips. Both ends are in this process.

    with judged() as require, pair.listen() as listener, Bulk(pair, listener, 100, upwards=True) as bulk:
        rates = bulk.measure(10)                                    # of each connection, in bit/s
        requests_ms, pings_ms = round_trips(pair, listener, 5)      # while the bulk goes on
        require(max(rates) < 2 * min(rates), "shares differ")

What a test requires counts only if the machine was free for it.
"""

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Self

import pytest

from tests.bench.measure import BUSY_CORES, Others
from tests.netlab import Lab, RunVoid
from tests.system.pair import Pair

CHUNK_BYTES = 256 << 10
REQUEST_BYTES = 64
REQUESTS_A_SECOND = 40
ASKING = 4
"""Connections that requests are dealt out to, so that one need not wait for the answer of the one before."""
ANSWER_S = 5.0
_BLOCK = memoryview(os.urandom(CHUNK_BYTES))
_ICMP_REQUEST, _ICMP_ANSWER = 8, 0
_ICMP = struct.Struct("!BBHHH")


@contextlib.contextmanager
def judged() -> Iterator[Callable[[bool, str], None]]:
    """Yields what to call with each result and its description; a miss skips where other programs were busy."""
    others = Others()
    missed: list[str] = []

    def require(holds: bool, what: str) -> None:
        if not holds:
            missed.append(what)

    try:
        yield require
    except RunVoid as void:
        pytest.skip(f"this machine is too busy: {void}")
    if missed and (cores := others.cores()) > BUSY_CORES:
        pytest.skip(f"this machine is too busy: {', '.join(missed)} while other programs used {cores:.1f} cores")
    if missed:
        pytest.fail(", ".join(missed))


def opened(pair: Pair, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """The application's end and the target's end of a new connection through the tunnel."""
    application = pair.connect()
    return application, listener.accept()[0]


def transfer_s(pair: Pair, listener: socket.socket, total_bytes: int, *, upwards: bool) -> float:
    """How long a new connection takes for so many bytes, from its opening to the last byte received."""
    start_s = time.monotonic()
    application, target = opened(pair, listener)
    source, sink = (application, target) if upwards else (target, application)
    sink.settimeout(60)

    def send() -> None:
        left = total_bytes
        while left:
            piece = _BLOCK[: min(left, CHUNK_BYTES)]
            source.sendall(piece)
            left -= len(piece)
        source.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    with application, target:
        sender.start()
        received = 0
        while data := sink.recv(CHUNK_BYTES):
            received += len(data)
        took_s = time.monotonic() - start_s
        sender.join()
    assert received == total_bytes, pair.logs()
    return took_s


class Bulk:
    """`count` connections that send all they can, one way, while the block lasts."""

    def __init__(self, pair: Pair, listener: socket.socket, count: int = 1, *, upwards: bool = True) -> None:
        self.pair = pair
        ends = [opened(pair, listener) for _ in range(count)]
        self._all = [end for both in ends for end in both]
        self._sources = {both[1 - upwards].fileno(): both[1 - upwards] for both in ends}
        self._sinks = {both[upwards].fileno(): (number, both[upwards]) for number, both in enumerate(ends)}
        self._received = [0] * count
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over = True
        self._thread.join()
        for end in self._all:
            end.close()

    @property
    def received_bytes(self) -> int:
        """All of them together, so far."""
        return sum(self._received)

    def bits_per_s(self, seconds: float) -> float:
        """What all of them bring from now on."""
        return sum(self.measure(seconds))

    def measure(self, seconds: float) -> list[float]:
        """Bits per second that each connection has brought from now on."""
        before, start_s = list(self._received), time.monotonic()
        time.sleep(seconds)
        after, took_s = list(self._received), time.monotonic() - start_s
        assert self._thread.is_alive(), "the load has ended"
        return [8 * (now - then) / took_s for then, now in zip(before, after, strict=True)]

    def _run(self) -> None:
        buffer = bytearray(CHUNK_BYTES)
        with select.epoll() as epoll:
            for end in self._all:
                end.setblocking(False)
                epoll.register(end, select.EPOLLOUT if end.fileno() in self._sources else select.EPOLLIN)
            while not self._over:
                for descriptor, _ in epoll.poll(0.1):
                    with contextlib.suppress(BlockingIOError):
                        if descriptor in self._sources:
                            self._sources[descriptor].send(_BLOCK)
                        else:
                            number, sink = self._sinks[descriptor]
                            self._received[number] += sink.recv_into(buffer)


def round_trips(
    pair: Pair, listener: socket.socket, seconds: float, per_second: float = REQUESTS_A_SECOND
) -> tuple[list[float], list[float]]:
    """Sorted round trips, in ms, of requests through the tunnel and of pings beside it, sent at the same moments."""
    connections = [opened(pair, listener) for _ in range(ASKING)]
    with contextlib.ExitStack() as stack:
        for both in connections:
            for end in both:
                stack.enter_context(end).setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pinger = stack.enter_context(_Pinger(pair.lab))
        return _Asker(connections, pinger).run(seconds, per_second)


class _Pinger:
    """ICMP echo from the client's namespace to the server's."""

    def __init__(self, lab: Lab) -> None:
        self.sock = lab.socket("client", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self.sock.connect((lab.server_ip4, 0))
        self._sent_s: dict[int, float] = {}
        self.took_ms: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()

    def send(self, number: int) -> None:
        body = bytes(REQUEST_BYTES - _ICMP.size)
        checksum = (_ICMP_REQUEST << 8) + number
        checksum = ~((checksum & 0xFFFF) + (checksum >> 16)) & 0xFFFF
        self._sent_s[number] = time.monotonic()
        self.sock.send(_ICMP.pack(_ICMP_REQUEST, 0, checksum, 0, number) + body)

    def receive(self) -> None:
        packet = self.sock.recv(2048)
        kind, _, _, _, number = _ICMP.unpack_from(packet, (packet[0] & 15) * 4)
        if kind == _ICMP_ANSWER and number in self._sent_s:
            self.took_ms.append((time.monotonic() - self._sent_s.pop(number)) * 1e3)


class _Asker:
    """Applications that ask, and targets that answer with what they were asked."""

    def __init__(self, connections: list[tuple[socket.socket, socket.socket]], pinger: _Pinger) -> None:
        self._pinger = pinger
        self._applications = [application for application, _ in connections]
        self._targets = {target.fileno(): target for _, target in connections}
        self._waiting = {application.fileno(): deque[float]() for application in self._applications}
        self._left = {application.fileno(): 0 for application in self._applications}
        self.took_ms: list[float] = []

    def run(self, seconds: float, per_second: float) -> tuple[list[float], list[float]]:
        poller = select.poll()
        for each in (*self._applications, *self._targets.values(), self._pinger.sock):
            poller.register(each, select.POLLIN)
        ends = {each.fileno(): each for each in self._applications}
        start_s = time.monotonic()
        asked = 0
        while (now_s := time.monotonic()) < start_s + seconds or any(self._waiting.values()):
            assert now_s < start_s + seconds + ANSWER_S, "a request was not answered"
            due_s = start_s + asked / per_second
            if now_s >= due_s and now_s < start_s + seconds:
                self._ask(asked)
                self._pinger.send(asked)
                asked += 1
                continue
            for descriptor, _ in poller.poll(max(due_s - now_s, 0.001) * 1e3):
                if descriptor in self._targets:
                    self._targets[descriptor].send(self._targets[descriptor].recv(CHUNK_BYTES))
                elif descriptor in ends:
                    self._take(ends[descriptor])
                else:
                    self._pinger.receive()
        return sorted(self.took_ms), sorted(self._pinger.took_ms)

    def _ask(self, number: int) -> None:
        application = self._applications[number % len(self._applications)]
        self._waiting[application.fileno()].append(time.monotonic())
        application.send(bytes(REQUEST_BYTES))

    def _take(self, application: socket.socket) -> None:
        descriptor = application.fileno()
        self._left[descriptor] += len(application.recv(CHUNK_BYTES))
        while self._left[descriptor] >= REQUEST_BYTES:
            self._left[descriptor] -= REQUEST_BYTES
            self.took_ms.append((time.monotonic() - self._waiting[descriptor].popleft()) * 1e3)


def quantile(values: list[float], share: float) -> float:
    """Of sorted values."""
    return values[min(int(len(values) * share), len(values) - 1)]


@contextlib.contextmanager
def answering(listener: socket.socket) -> Iterator[None]:
    """A target that answers the first bytes of each connection with one byte, from a thread."""
    over = threading.Event()

    def answer() -> None:
        listener.settimeout(0.1)
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                target = listener.accept()[0]
                with target:
                    target.settimeout(ANSWER_S)
                    target.recv(CHUNK_BYTES)
                    target.send(b"!")
                    target.recv(1)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
