"""Whoever knocks at a server's ports: message 1 is answered, and forgotten unless the first record opens.

Message 1 may be a replay from a forged address, so nothing but its keys is kept for it, for a few seconds and bounded
in number; the same message from the same wire gets the same answer. Everything else of a stranger is met with silence,
or is a port of ours whose address has changed (`_find_moved`). Handshakes get a small share of the worker's time.
"""

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from workers.core.cuts import Records
from workers.core.datagram import DatagramOpener, DatagramSealer
from workers.core.errors import RemoteProtocolError
from workers.core.handshake import MAGIC, MESSAGE_MAX, Hello, Mode, ServerHandshake, Welcome, WorkerId
from workers.core.noise import TAG_SIZE
from workers.io.context import Context
from workers.io.establish import SUITES
from workers.io.port_carrier import PortCarrier, SprayStaging
from workers.io.wire import Wire

PENDING_MAX = 4096
PENDING_US = 10_000_000
"""As long as a client tries one message 1, twice over."""
TAGS_MAX = 8192
"""First messages that are remembered: a replay costs no handshake, and makes nobody else wait."""
ANSWERS_MAX = 8
"""Times that the same message 1 is answered."""
BUDGET_S = 0.015
"""Of the processor, in each tick, for strangers of a tunnel together. By the clock, a busy machine would let few in."""
SILENT_US = 700_000
"""A port that has not been heard of for so long may have moved: it is pinged at least every 500 ms by then."""
TRIES = 8
"""Silent ports that payload of an unknown address is tried against."""

log = logging.getLogger("forwarder.spray")


class Host(Protocol):
    """The tunnel behind the door."""

    context: Context

    def find_key(self, key_id: str) -> tuple[int, bytes] | None:
        """The index and secret of a key."""

    def check_hello(self, key_id: str, key_index: int, hello: Hello) -> bool:
        """Whether the session is known. Raises RemoteProtocolError where the client may not come in."""

    def admit(self, pending: "Pending", now_us: int) -> PortCarrier | None:
        """The client has proven itself: its carrier, None if there is no place for it."""

    def carriers_of(self, port: int) -> Iterable[PortCarrier]:
        """The carriers that came in by that port of the tunnel."""


class Pending:
    """A handshake that was answered: the owner of its wire until the first record opens."""

    __slots__ = (
        "_answers",
        "_door",
        "answer",
        "deadline_us",
        "hello",
        "key_id",
        "key_index",
        "keys",
        "message",
        "port",
        "wire",
    )

    def __init__(self, door: "SprayDoor", wire: Wire, port: int, message: bytes, now_us: int) -> None:
        self._door = door
        self.wire = wire
        self.port = port
        self.message = message
        self.deadline_us = now_us + PENDING_US
        self.answer = b""
        self.hello: Hello | None = None
        self.key_id, self.key_index = "", -1
        self.keys: tuple[DatagramSealer, DatagramOpener] | None = None
        self._answers = ANSWERS_MAX

    def send_answer(self, now_us: int) -> None:
        """Send message 2."""
        if self._answers:
            self._answers -= 1
            self.wire.send_one(self.answer, now_us)

    def on_payload(self, wire: Wire, records: Records, start: int, end: int, hint: int, now_us: int) -> None:
        """See WireOwner."""
        self._door.on_pending(self, records, start, end, now_us)

    def on_writable(self, wire: Wire) -> None:
        """See WireOwner."""

    def on_reset(self, wire: Wire) -> None:
        """See WireOwner. Whoever gives up before the first record is gone."""
        self._door.forget(self)


class SprayDoor:
    """Implements Door for `host`."""

    def __init__(self, host: Host, staging: SprayStaging) -> None:
        self._tags: OrderedDict[bytes, None] = OrderedDict()
        self._host = host
        self._staging = staging
        self._pending: OrderedDict[Wire, Pending] = OrderedDict()
        self._budget_s = BUDGET_S
        self.refused = self.moved = 0

    def __len__(self) -> int:
        return len(self._pending)

    def on_time(self, now_us: int) -> None:
        """Every TICK_S."""
        self._budget_s = min(self._budget_s + BUDGET_S, BUDGET_S)
        while self._pending:
            pending = next(iter(self._pending.values()))
            if pending.deadline_us > now_us and len(self._pending) <= PENDING_MAX:
                break
            self.forget(pending)

    def forget(self, pending: Pending) -> None:
        """Its time is over, or it was not meant seriously."""
        if self._pending.get(pending.wire) is pending:
            del self._pending[pending.wire]
        if pending.wire.owner is pending:
            pending.wire.owner = None
            pending.wire.close()

    def on_stranger(self, wire: Wire, carrier: int, records: Records, start: int, end: int, now_us: int) -> None:
        """See Door."""
        if self._budget_s <= 0:
            self.refused += 1
            return
        began_s = time.thread_time()
        if records.view[start : start + 2] == MAGIC[:2]:
            self._answer(wire, carrier, bytes(records.view[start : min(end, start + MESSAGE_MAX + 1)]), now_us)
        else:
            self._find_moved(wire, carrier, records, start, end, now_us)
        self._budget_s -= time.thread_time() - began_s

    def _answer(self, wire: Wire, port: int, message: bytes, now_us: int) -> None:
        host = self._host
        context = host.context
        suite = SUITES[context.settings.suite]
        if message[-TAG_SIZE:] in self._tags:
            self.refused += 1  # answered before, on another wire: a replay
            return
        handshake = ServerHandshake(host.find_key, suite, Mode.SPRAY)
        try:
            hello = handshake.receive(message)
            if hello is None:
                self.refused += 1
                return
            known = host.check_hello(handshake.key_id, handshake.key_index, hello)
            welcome = Welcome(context.boot_id, known, context.slot, (WorkerId(context.slot, context.serial),))
            answer = handshake.welcome(welcome, ephemeral_private=os.urandom(32))
        except RemoteProtocolError as error:
            self.refused += 1
            log.debug("stranger refused peer=%s reason=%s", wire.peer, error)
            return
        pending = Pending(self, wire, port, message, now_us)
        send_key, receive_key = handshake.split()
        pending.keys = (
            DatagramSealer(send_key, suite),
            DatagramOpener(receive_key, suite, self._staging.inners),
        )
        pending.hello, pending.answer = hello, answer
        pending.key_id, pending.key_index = handshake.key_id, handshake.key_index
        self._tags[message[-TAG_SIZE:]] = None
        if len(self._tags) > TAGS_MAX:
            self._tags.popitem(last=False)
        self._pending.pop(wire, None)
        self._pending[wire] = pending
        wire.keep()
        wire.on_opened(now_us)
        if wire.owner is None or isinstance(wire.owner, Pending):
            wire.owner = pending
        pending.send_answer(now_us)
        if len(self._pending) > PENDING_MAX:
            self.forget(next(iter(self._pending.values())))

    def on_pending(self, pending: Pending, records: Records, start: int, end: int, now_us: int) -> bool:
        """Payload for an answered handshake; whether it was of any use."""
        view = records.view[start:end]
        if view[:2] == MAGIC[:2]:
            if view == pending.message:
                pending.send_answer(now_us)
            else:
                self.on_stranger(pending.wire, pending.port, records, start, end, now_us)
            return True
        assert pending.keys is not None
        opener = pending.keys[1]
        found = opener.open_run(records, start, end)
        if not opener.opened:
            self.refused += 1
            return False
        if self._pending.get(pending.wire) is pending:
            del self._pending[pending.wire]
        carrier = self._host.admit(pending, now_us)
        if carrier is None:
            self.forget(pending)
            return True
        carrier.on_found(found, opener.opened, end - start, now_us)
        return True

    def on_unknown(
        self,
        carrier: PortCarrier,
        port_of: Callable[[PortCarrier], int],
        records: Records,
        start: int,
        end: int,
        now_us: int,
    ) -> None:
        """Nothing opened of what came on a port that is up: its client may have begun anew from the same address."""
        pending = self._pending.get(carrier.wire)
        if pending is not None:
            self.on_pending(pending, records, start, end, now_us)
        elif records.view[start : start + 2] == MAGIC[:2]:
            self.on_stranger(carrier.wire, port_of(carrier), records, start, end, now_us)

    def _find_moved(self, wire: Wire, port: int, records: Records, start: int, end: int, now_us: int) -> None:
        tries = TRIES
        for carrier in self._host.carriers_of(port):
            if now_us - carrier.port.last_received_us < SILENT_US or carrier.wire.kind != wire.kind:
                continue
            found, count = carrier.try_open(records, start, end)
            if count:
                self.moved += 1
                carrier.move(wire)
                carrier.on_found(found, count, end - start, now_us)
                return
            tries -= 1
            if not tries:
                break
        self.refused += 1

    def close(self) -> None:
        """Forget everybody."""
        for pending in list(self._pending.values()):
            self.forget(pending)
