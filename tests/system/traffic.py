"""Applications' connections through a tunnel, both ends in this process, driven by one thread.

    with Traffic(pair) as traffic:
        exchanges = traffic.open(12, total_bytes=4 << 20, rate_bps=8e6)
        ...                                     # break something
        traffic.wait(exchanges, 30)
        assert exchanges[0].outcome == WHOLE

An exchange sends `total_bytes` each way at once; each end then ends its direction and reads to the end.
"""

import hashlib
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Self

from tests.system.pair import Pair

WHOLE = "whole"
"""Every byte with the right sha256, then the end of the stream."""
RESET = "reset"
CUT = "cut"
"""An end of stream before the last byte: what must never happen."""
WRONG = "wrong bytes"
DEAD = "died"
"""On purpose, because the test has set `End.dies`."""

TURN_S = 0.02
CHUNK_BYTES = 64 << 10
LEAST_BYTES = 4 << 10
_PERIOD = 1 << 20
_PATTERN = random.Random(5).randbytes(_PERIOD) * 2


def digest(phase: int, total_bytes: int) -> bytes:
    """The sha256 of so many bytes of the pattern, from `phase` on."""
    result, done = hashlib.sha256(), 0
    while done < total_bytes:
        start = (phase + done) % _PERIOD
        piece = _PATTERN[start : start + min(_PERIOD, total_bytes - done)]
        result.update(piece)
        done += len(piece)
    return result.digest()


class End:
    """One end. `outcome` is None while it is open; then `ended_s` says since when."""

    def __init__(self, sock: socket.socket, phase: int, peer_phase: int, total_bytes: int, rate_bps: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.total_bytes, self.rate_bps = total_bytes, rate_bps
        self.sent = self.received = 0
        self.outcome: str | None = None
        self.dies = False
        self.ended_s = 0.0
        self._phase, self._peer_phase = phase, peer_phase
        self._hash = hashlib.sha256()
        self._budget = 0.0
        self._shut = self._peer_shut = False

    def earn(self, elapsed_s: float) -> None:
        """Time has passed, so more may be sent."""
        self._budget = min(self._budget + elapsed_s * self.rate_bps / 8, 4.0 * CHUNK_BYTES)

    def die(self) -> None:
        """Reset the connection, as an application that crashes."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._end(DEAD)

    @property
    def reads(self) -> bool:
        return self.outcome is None and not self._peer_shut

    @property
    def writes(self) -> bool:
        least = min(LEAST_BYTES, self.total_bytes - self.sent)
        return self.outcome is None and not self._shut and self._budget >= least

    def send(self) -> None:
        start = (self._phase + self.sent) % _PERIOD
        most = min(self.total_bytes - self.sent, CHUNK_BYTES, int(self._budget))
        try:
            if most:
                count = self.sock.send(_PATTERN[start : start + most])
                self.sent += count
                self._budget -= count
            if self.sent == self.total_bytes:
                self.sock.shutdown(socket.SHUT_WR)
                self._shut = True
                self._end_if_done()
        except BlockingIOError:
            pass
        except OSError:
            self._end(RESET)

    def receive(self) -> None:
        try:
            data = self.sock.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._end(RESET)
            return
        self.received += len(data)
        self._hash.update(data)
        if not data:
            self._peer_shut = True
            if self.received != self.total_bytes:
                self._end(CUT)
            elif self._hash.digest() != digest(self._peer_phase, self.total_bytes):
                self._end(WRONG)
            self._end_if_done()

    def _end_if_done(self) -> None:
        if self._shut and self._peer_shut:
            self._end(WHOLE)

    def _end(self, outcome: str) -> None:
        if self.outcome is None:
            self.outcome, self.ended_s = outcome, time.monotonic()
            self.sock.close()


class Exchange:
    """One connection: the application's end and the target's."""

    def __init__(self, number: int, socks: Sequence[socket.socket], total_bytes: int, rate_bps: float) -> None:
        phases = (number * 7919 % _PERIOD, (number * 7919 + 4_001) % _PERIOD)
        self.ends = tuple(
            End(sock, phases[side], phases[1 - side], total_bytes, rate_bps) for side, sock in enumerate(socks)
        )

    def __repr__(self) -> str:
        return " | ".join(f"{end.outcome} sent={end.sent} received={end.received}" for end in self.ends)

    @property
    def outcome(self) -> str | None:
        """None until both ends have ended; then what they agree on, or both."""
        first, second = (end.outcome for end in self.ends)
        if first is None or second is None:
            return None
        return first if first == second else f"{first} at the application, {second} at the target"

    @property
    def ended_s(self) -> float:
        return max(end.ended_s for end in self.ends)

    @property
    def received(self) -> int:
        return sum(end.received for end in self.ends)

    def speed_up(self, rate_bps: float) -> None:
        for end in self.ends:
            end.rate_bps = rate_bps


class Traffic:
    """Moves all exchanges in a thread of its own. Owns the listener behind the server, unless it is given one."""

    def __init__(self, pair: Pair, listener: socket.socket | None = None) -> None:
        self.pair = pair
        self.listener = listener or pair.listen()
        self.exchanges: list[Exchange] = []
        self._owned = listener is None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping = True
        self._thread.join()
        if self._owned:
            self.listener.close()
        for exchange in self.exchanges:
            for end in exchange.ends:
                end.sock.close()

    def open(self, count: int, total_bytes: int, rate_bps: float = 1e12, timeout_s: float = 20.0) -> list[Exchange]:
        """Connections one after the other, so that the two ends of each are known.

        Raises ConnectionError for one that is refused or reset.
        """
        opened = []
        for _ in range(count):
            application = self.pair.connect(timeout_s)
            target = self._accept(application, timeout_s)
            opened.append(Exchange(len(self.exchanges), (application, target), total_bytes, rate_bps))
            self.exchanges = [*self.exchanges, opened[-1]]
        return opened

    def open_again(self, total_bytes: int, timeout_s: float) -> Exchange:
        """The first connection that is not refused or reset."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.open(1, total_bytes, timeout_s=max(deadline - time.monotonic(), 0.1))[0]
            except ConnectionError:
                assert time.monotonic() < deadline, f"none works within {timeout_s:g} s{self.pair.logs()}"
                time.sleep(TURN_S)

    def _accept(self, application: socket.socket, timeout_s: float) -> socket.socket:
        """The target's end of a new connection, unless the application reads something first: its reset."""
        poller = select.poll()
        for sock in (self.listener, application):
            poller.register(sock, select.POLLIN)
        ready = [fd for fd, _ in poller.poll(timeout_s * 1000)]
        if self.listener.fileno() in ready:
            return self.listener.accept()[0]
        with application:
            assert ready, f"the target saw no connection within {timeout_s:g} s{self.pair.logs()}"
            data = application.recv(1)
            raise AssertionError(f"the application read {data!r} before anything was sent")

    def wait(self, exchanges: Sequence[Exchange], timeout_s: float) -> None:
        """Until all of them have ended."""
        deadline = time.monotonic() + timeout_s
        while any(exchange.outcome is None for exchange in exchanges):
            assert time.monotonic() < deadline, f"open after {timeout_s:g} s: {exchanges}{self.pair.logs()}"
            time.sleep(TURN_S)

    def wait_received(self, exchanges: Sequence[Exchange], each_bytes: int, timeout_s: float = 20.0) -> None:
        """Until every one of them has brought so many bytes to each end."""
        deadline = time.monotonic() + timeout_s
        while any(end.received < each_bytes for exchange in exchanges for end in exchange.ends):
            assert time.monotonic() < deadline, f"slow: {exchanges}{self.pair.logs()}"
            time.sleep(TURN_S)

    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._stopping:
            now_s = time.monotonic()
            ends = [end for exchange in self.exchanges for end in exchange.ends if end.outcome is None]
            for end in ends:
                end.earn(now_s - last_s)
                if end.dies:
                    end.die()
            last_s = now_s
            poller = select.poll()
            watched = {}
            for end in ends:
                events = select.POLLIN * end.reads | select.POLLOUT * end.writes
                if events:
                    poller.register(end.sock, events)
                    watched[end.sock.fileno()] = end
            if not watched:
                time.sleep(TURN_S)
            for fd, ready in poller.poll(TURN_S * 1000) if watched else ():
                end = watched[fd]
                if end.reads and ready & ~select.POLLOUT:
                    end.receive()
                if end.writes and ready & ~select.POLLIN:
                    end.send()
