"""Strangers at a tunnel: connections of one worker until their first sealed record opens. They cost little, and what
they cost is bounded.

1. An accepted connection is read at once, since most bring message 1 along: only who does not gets a watcher.
2. Message 1 may be a replay, so until a sealed record opens nothing is counted as authenticated. No message 1 is
   answered twice as long as it is remembered: answering takes ten times as long as refusing. `_silent` are those that
   owe message 1, `_answered` those whose message 1 was good: neither can push the other out.
3. Whoever fails gets no byte: nothing more is read, and the deadline resets the connection (`_refused`).

Past a cap the oldest goes. The time that all this may take is bounded, too: what is left of it says `has_time`.
"""

import logging
import os
import socket
from collections import OrderedDict, deque
from typing import Any, Protocol

from workers.core.errors import RemoteProtocolError
from workers.core.handshake import MESSAGE_MAX, Hello, Mode, ServerHandshake, Welcome
from workers.core.record import LENGTH, RECORD_HEADER, TAG, Opener, Sealer
from workers.io import sockets
from workers.io.context import Context, clock_us
from workers.io.establish import SUITES, record_keys

READ = 1
MAX_PENDING = 1024
"""Unauthenticated connections of each kind, a tunnel and worker."""
MAX_PENDING_PER_ADDRESS = 256
MAX_REFUSED = 256
"""Refused connections that wait for their deadline: each occupies a descriptor."""
MAX_SEEN = 8192
"""Messages 1 that are remembered after they were answered."""
TELL_US = 60_000_000
"""Refused handshakes are told of so often, however many come."""
WORK_US = 15_000
"""Time for strangers in 100 ms: established stripes lose no more by any number of them. A refused handshake takes
40 us, so that is 3,700 a second and worker; a genuine one 250 us. More wait in the kernel."""

log = logging.getLogger("forwarder.server")


class Door(Protocol):
    """The tunnel that strangers come to."""

    name: str
    context: Context

    def find_key(self, key_id: str) -> tuple[int, bytes] | None:
        """The index and secret of a key."""

    def check_hello(self, pending: "Pending", hello: Hello) -> bool | None:
        """Whether the server knows the session; None if the connection was handed to the worker that owns it. Raises
        RemoteProtocolError for what the key may not ask for."""

    def on_proven(self, pending: "Pending", hello: Hello, first: memoryview, leftover: bytes) -> None:
        """`first`, the first record, opened: the client is genuine, and the socket is the tunnel's."""


class Pending:
    """An accepted connection until its first sealed record opens. `keys` and `gone_told` are there after message 2."""

    __slots__ = (
        "_hello",
        "_received",
        "_strangers",
        "_watcher",
        "address",
        "deadline_us",
        "gone_told",
        "handshake",
        "keys",
        "sock",
    )

    def __init__(self, strangers: "Strangers", sock: socket.socket, address: str, deadline_us: int) -> None:
        self.sock = sock
        self.address = address
        self.deadline_us = deadline_us
        self.keys: tuple[Sealer, Opener] | None = None
        self.gone_told = 0
        self._strangers = strangers
        self._hello: Hello | None = None
        self._received = b""
        self._watcher: Any = None
        door = strangers.door
        self.handshake = ServerHandshake(door.find_key, SUITES[door.context.settings.suite], Mode.STRIPE)

    def watch(self) -> None:
        """Read when something comes."""
        if self._watcher is None:
            self.sock.setblocking(False)
            self._watcher = self._strangers.door.context.loop.io(self.sock.fileno(), READ)
            self._watcher.start(self._strangers.on_readable, self)

    def part(self) -> None:
        """The socket now belongs to another, or nobody reads it any more."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None

    def receive(self, data: bytes) -> bool:
        """Take bytes of message 1, and after it of the first record; whether message 1 is still incomplete. Raises
        RemoteProtocolError."""
        if self.keys is not None:
            self._take_record(self.keys, data)
            return False
        hello = self.handshake.receive(data)
        if hello is None:
            return True
        self._answer(hello)
        return False

    def _answer(self, hello: Hello) -> None:
        door = self._strangers.door
        context = door.context
        known = door.check_hello(self, hello)
        if known is None:
            return
        self._strangers.check_fresh(self.handshake.raw[-TAG:])
        welcome = Welcome(context.boot_id, known, context.slot, context.roster_ids())
        answer = self.handshake.welcome(welcome, ephemeral_private=os.urandom(32))
        self._hello = hello
        self.keys = record_keys(context, self.handshake.split())
        self.gone_told = len(context.gone)
        try:
            self.sock.send(answer)
        except OSError as error:
            raise RemoteProtocolError(f"cannot answer: {error}") from None
        self._strangers.on_answered(self)

    def _take_record(self, keys: tuple[Sealer, Opener], data: bytes) -> None:
        """Until a record has opened it is at most 1 KiB long, and so is what waits here."""
        received = self._received = self._received + data
        if len(received) < RECORD_HEADER:
            return
        (length,) = LENGTH.unpack_from(received)
        keys[1].check_length(length)
        end = RECORD_HEADER + length
        if len(received) < end:
            return
        first = memoryview(bytearray(length - TAG))
        keys[1].open_into(received[RECORD_HEADER:end], received[:RECORD_HEADER], first)
        assert self._hello is not None
        self._strangers.release(self)
        self._strangers.door.on_proven(self, self._hello, first, received[end:])


class Capped:
    """Connections in order of arrival, so many in all and of one address."""

    __slots__ = ("_all", "_of_address")

    def __init__(self) -> None:
        self._all: OrderedDict[Pending, None] = OrderedDict()
        self._of_address: dict[str, OrderedDict[Pending, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, pending: Pending) -> bool:
        return pending in self._all

    @property
    def oldest(self) -> Pending | None:
        """The first that came of those that are here."""
        return next(iter(self._all), None)

    def due(self, now_us: int) -> list[Pending]:
        """Those whose deadline has come."""
        return [pending for pending in self._all if pending.deadline_us <= now_us]

    def add(self, pending: Pending) -> Pending | None:
        """Take one in; returns the one that has to go for it."""
        of_address = self._of_address.setdefault(pending.address, OrderedDict())
        surplus = None
        if len(of_address) >= MAX_PENDING_PER_ADDRESS:
            surplus = next(iter(of_address))
        elif len(self._all) >= MAX_PENDING:
            surplus = self.oldest
        self._all[pending] = of_address[pending] = None
        return surplus

    def discard(self, pending: Pending) -> bool:
        """Part with one; False if it is not here."""
        if pending not in self._all:
            return False
        del self._all[pending]
        of_address = self._of_address[pending.address]
        del of_address[pending]
        if not of_address:
            del self._of_address[pending.address]
        return True


class Strangers:
    """All of one tunnel and worker. `refused` counts failed handshakes."""

    def __init__(self, door: Door, timeout_s: float) -> None:
        self.door = door
        self.refused = 0
        self._timeout_us = int(timeout_s * 1e6)
        self._silent, self._answered = Capped(), Capped()
        self._refused: deque[tuple[int, socket.socket]] = deque()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._left_us = WORK_US
        self._told, self._told_us = 0, -TELL_US
        self._latest = ("", "")

    def use(self, timeout_s: float) -> None:
        """How long whoever comes from now on may take."""
        self._timeout_us = int(timeout_s * 1e6)

    def __len__(self) -> int:
        return len(self._silent) + len(self._answered) + len(self._refused)

    @property
    def has_time(self) -> bool:
        """Whether more may be accepted before the next `on_time`."""
        return self._left_us > 0

    def admit(self, sock: socket.socket, address: str, received: bytes = b"") -> None:
        """Take an accepted connection in; `received` is what another worker has read of it."""
        began_us = clock_us()
        data = received or _read(sock)
        if data is None or data:
            pending = Pending(self, sock, address, began_us + self._timeout_us)
            if data is None or self._receive(pending, data):
                self._stay(pending)
        else:
            sockets.close_with_reset(sock)
        self._left_us -= clock_us() - began_us

    def on_readable(self, pending: Pending) -> None:
        """Called by the event loop."""
        began_us = clock_us()
        data = _read(pending.sock)
        if data:
            self._receive(pending, data)
        elif data is not None:
            self.forget(pending)
        self._left_us -= clock_us() - began_us

    def _receive(self, pending: Pending, data: bytes) -> bool:
        """Whether it is as far as before, and more has to come."""
        try:
            return pending.receive(data)
        except RemoteProtocolError as error:
            self._refuse(pending, str(error))
            return False

    def _stay(self, pending: Pending) -> None:
        """Message 1 is not complete."""
        self._add(self._silent, pending)
        pending.watch()

    def check_fresh(self, tag: bytes) -> None:
        """Raise RemoteProtocolError if message 1 with that tag is remembered; from now on it is."""
        if tag in self._seen:
            raise RemoteProtocolError("message 1 is a replay")
        self._seen[tag] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)

    def on_answered(self, pending: Pending) -> None:
        """Its message 1 was good."""
        self._silent.discard(pending)
        self._add(self._answered, pending)
        pending.watch()

    def _add(self, kind: Capped, pending: Pending) -> None:
        surplus = kind.add(pending)
        if surplus is not None:
            self.forget(surplus)

    def _refuse(self, pending: Pending, why: str) -> None:
        """Say nothing and read nothing more; the deadline resets the connection."""
        self.release(pending)
        self.refused += 1
        self._latest = (pending.address, why)
        log.debug("handshake refused tunnel=%s peer=%s reason=%r", self.door.name, pending.address, why)
        if len(self._refused) >= MAX_REFUSED:
            sockets.close_with_reset(self._refused.popleft()[1])
        self._refused.append((pending.deadline_us, pending.sock))

    def release(self, pending: Pending) -> None:
        """`pending` is a stripe, or handed over, or refused: it counts no more."""
        if self._silent.discard(pending) or self._answered.discard(pending):
            pending.part()

    def forget(self, pending: Pending) -> None:
        """Reset one."""
        self.release(pending)
        sockets.close_with_reset(pending.sock)

    def forget_oldest(self) -> bool:
        """Reset the one that is missed least; False if there is none."""
        if self._refused:
            sockets.close_with_reset(self._refused.popleft()[1])
            return True
        oldest = self._silent.oldest or self._answered.oldest
        if oldest is not None:
            self.forget(oldest)
        return oldest is not None

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        if self.refused > self._told and now_us - self._told_us >= TELL_US:
            count, self._told, self._told_us = self.refused - self._told, self.refused, now_us
            peer, why = self._latest
            log.info("handshakes refused tunnel=%s count=%d peer=%s reason=%s", self.door.name, count, peer, why)
        self._left_us = min(self._left_us + WORK_US, WORK_US)
        for deadline_us, sock in self._refused:
            if deadline_us <= now_us:
                sockets.close_with_reset(sock)
        self._refused = deque(each for each in self._refused if each[0] > now_us)
        for kind in (self._silent, self._answered):
            for pending in kind.due(now_us):
                self.forget(pending)

    def close(self) -> None:
        """Reset all."""
        while self.forget_oldest():
            pass


def _read(sock: socket.socket) -> bytes | None:
    """What a stranger sent; None: nothing yet, empty: he is gone."""
    try:
        return sock.recv(MESSAGE_MAX + 1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        return b""
