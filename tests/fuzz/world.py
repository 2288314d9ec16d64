"""A whole worker under a fuzzer: the real one, but for the event loop, the stripes' sockets and the greenlets.

`World` plays everybody else: the peer at the other end of the stripes, the applications and targets, another worker of
this end, and the supervisor.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import gevent

from tests.fuzz.place import QUOTA, READ, WRITE, Loop, Wire
from tests.fuzz.source import Source
from workers import worker as worker_module
from workers.boot import Boot, PeerFds
from workers.core import frame
from workers.core.handshake import ClientHandshake, Hello, Mode, WorkerId
from workers.core.noise import Suite
from workers.core.record import LENGTH, OVERHEAD, RECORD_HEADER, TAG, Opener, Sealer
from workers.io import context, egress, memory, sockets, target
from workers.io.client import ClientTunnel
from workers.io.establish import make_stripe
from workers.io.server import ServerTunnel
from workers.io.session import Session
from workers.settings import Address, Key, Settings, StripeClientTunnel, StripeServerTunnel
from workers.shm.arena import Side, arena_size
from workers.shm.ring import RingConsumer, RingProducer
from workers.shm.segments import create_arena, create_ring
from workers.worker import Worker

SLOT, SERIAL, OTHER_SLOT, OTHER_SERIAL = 0, 0x0901, 1, 0x0902
FAR_SERIAL, FAR_BOOT = 0x0501, 9
ROSTER = (WorkerId(0, FAR_SERIAL), WorkerId(1, FAR_SERIAL + 1))
SESSION_ID = 77
KEY_ID, PSK, RECORD_KEY = "laptop", bytes(range(32)), bytes([7]) * 32
ARENA_BYTES = arena_size(QUOTA, QUOTA)
FRAME_MAX = frame.MAX_PAYLOAD_BYTES + frame.HEADER_BYTES
MAX_STREAMS = 16
START_US = 1_000_000

SERVER = Settings(
    role="server",
    workers=2,
    keys=(Key(KEY_ID, PSK),),
    server_tunnels=(
        StripeServerTunnel(
            name="web", index=0, listen=Address("::", 0), target=Address("::1", 80), max_sessions=3,
            max_streams=MAX_STREAMS,
        ),
    ),
)  # fmt: skip
CLIENT = Settings(
    role="client",
    workers=2,
    keys=(Key(KEY_ID, PSK),),
    client_tunnels=(
        StripeClientTunnel(name="web", index=0, local=Address("::1", 0), remote_end=Address("::1", 9), somaxconn=8),
    ),
)


class Carrier:
    """The far end of a stripe: seals what it sends, and reads what comes."""

    def __init__(self, wire: Wire, sealer: Sealer, opener: Opener) -> None:
        self.wire = wire
        self._sealer, self._opener = sealer, opener
        self._buffer = bytearray(FRAME_MAX + OVERHEAD)
        self._proven = False

    def record(self, content: bytes) -> bytes:
        """The next record; the first is small."""
        if not self._proven:
            content = content[: memory.SCRATCH_BYTES - TAG]
        self._proven = True
        return bytes(self._buffer[: self._sealer.seal_into(content or b"\0", memoryview(self._buffer))])

    def read(self) -> Iterator[bytes]:
        """Frames that have come; each is a valid one."""
        sent = self.wire.sent
        while len(sent) >= RECORD_HEADER:
            (length,) = LENGTH.unpack_from(sent)
            end = RECORD_HEADER + length
            if len(sent) < end:
                break
            self._opener.check_length(length)
            opened = self._opener.open_into(sent[RECORD_HEADER:end], sent[:RECORD_HEADER], memoryview(self._buffer))
            del sent[:end]
            yield bytes(self._buffer[:opened])


class World:
    """The worker and all around it. `heard`: what it told the other worker."""

    def __init__(self, settings: Settings, source: Source, stack: ExitStack, honest: bool) -> None:
        self.source = source
        self.honest = honest
        self.loop = Loop()
        self.now_us = START_US
        self.greenlets: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.carriers: list[Carrier] = []
        self.applications: list[tuple[socket.socket, int]] = []
        self.wires = 0
        self.heard: list[tuple[int, ...]] = []
        self._patch(stack)
        arena = create_arena(ARENA_BYTES)
        stack.callback(os.close, arena)
        self.other_arena, to_other, from_other = create_arena(ARENA_BYTES), create_ring(), create_ring()
        self.worker = Worker(
            self._boot(settings, arena, PeerFds(OTHER_SLOT, OTHER_SERIAL, self.other_arena, to_other, from_other))
        )
        self.consumer, self.producer = RingConsumer(to_other), RingProducer(from_other)
        self.context = self.worker._context
        self.peer_watcher: Any = self.worker._mesh._watchers[OTHER_SLOT]
        self.worker._start_tunnels()
        self.tunnel: Any = self.worker._tunnels[0]
        stack.callback(self._close_descriptors)

    def _patch(self, stack: ExitStack) -> None:
        for owner, name, value in (
            (time, "monotonic_ns", lambda: self.now_us * 1000),
            (gevent, "get_hub", lambda: SimpleNamespace(loop=self.loop)),
            (gevent, "spawn", self._spawn),
            (worker_module, "INGRESS_BYTES", QUOTA),
            (worker_module, "EGRESS_BYTES", QUOTA),
            (egress, "EGRESS_BYTES", QUOTA),
            (memory, "INBOUND_BYTES", 16 << 10),
            (sockets, "unsent_bytes", lambda _sock: 0),
            (target, "connect", self._connect),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

    def _boot(self, settings: Settings, arena: int, peer: PeerFds) -> Boot:
        nobody: Any = None
        return Boot(
            slot=SLOT,
            workers=2,
            serial=SERIAL,
            boot_id=5,
            settings=settings,
            arena=arena,
            arena_bytes=ARENA_BYTES,
            channel=nobody,
            inbox=nobody,
            lifetime=-1,
            heartbeat=nobody,
            session_ids={0: SESSION_ID},
            listeners={0: []},
            peers=[peer],
        )

    def _spawn(self, run: Callable[..., Any], *arguments: Any) -> Any:
        self.greenlets.append((run, arguments))
        return SimpleNamespace(kill=lambda *_arguments, **_options: None)

    def _connect(self, *_arguments: Any) -> socket.socket:
        if not self.source.flag():
            raise ConnectionRefusedError("refused")
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        sockets.prepare_application(ours)
        self.applications.append((theirs, ours.fileno()))
        return ours

    # Time and turns

    def turn(self) -> None:
        """The loop runs until it rests; what comes out is looked at."""
        self.loop.turn()
        if self.peer_watcher.active:
            self.peer_watcher.fire()
            self.loop.turn()
        for carrier in self.carriers:
            for content in carrier.read():
                header = frame.unpack(content)
                if header.kind == frame.ACK and self.honest:
                    frame.unpack_ack(header, content[frame.HEADER_BYTES :])
        if self.alive:
            self.heard += self.consumer.take()

    def pass_time(self) -> None:
        """A tick after up to half a minute; timers that are due fire."""
        self.now_us += (1000, 20_000, 100_000, 1_000_000, 31_000_000)[self.source.number() % 5]
        self.loop.fire_timers()
        self.worker._on_tick()

    def run_greenlets(self) -> None:
        """Targets connect."""
        greenlets, self.greenlets = self.greenlets, []
        for run, arguments in greenlets:
            if getattr(run, "__name__", "") == "_connect":
                run(*arguments)

    @property
    def alive(self) -> bool:
        """Whether the other worker is."""
        return OTHER_SLOT in self.worker._mesh.peers

    # The other end

    def connect(self, index: int) -> Carrier:
        """A stripe that is up, without its handshake."""
        session = self.session()
        keys = (Sealer(RECORD_KEY, Suite.AES256GCM), Opener(RECORD_KEY, Suite.AES256GCM, FRAME_MAX))
        wire = self._wire()
        carrier = Carrier(wire, Sealer(RECORD_KEY, Suite.AES256GCM), Opener(RECORD_KEY, Suite.AES256GCM, FRAME_MAX))
        carrier._opener.max_sealed_bytes = FRAME_MAX + TAG
        stripe = make_stripe(self.context, self.tunnel.tunnel, wire, index, keys)  # type: ignore[arg-type]
        stripe.far, stripe.owner = (0, FAR_SERIAL, FAR_BOOT), session
        session.far_end.on_roster({int(slot): serial for slot, serial in ROSTER}, FAR_BOOT, is_first=False)
        session.add_stripe(stripe)
        stripe.start(session)
        self.carriers.append(carrier)
        return carrier

    def shake_hands(self, index: int, first: bytes, pieces: Callable[[bytes], Iterator[bytes]]) -> None:
        """The same at a server, from its first byte on; `first` is what the first record holds."""
        assert isinstance(self.tunnel, ServerTunnel)
        hello = Hello(SESSION_ID, FAR_BOOT, index, 0, "web", ROSTER)
        client = ClientHandshake(KEY_ID, PSK, Suite.AES256GCM, Mode.STRIPE, hello, ephemeral_private=bytes([1]) * 32)
        wire = self._wire()
        self.tunnel._strangers.admit(wire, "192.0.2.1")  # type: ignore[arg-type]
        self._arrive(wire, pieces(client.message_to_send))
        if not wire.sent:
            return  # its index is another worker's
        welcome = client.receive(bytes(wire.sent))
        assert welcome is not None and welcome.worker_slot == SLOT
        wire.sent.clear()
        send_key, receive_key = client.split()
        sealer, opener = Sealer(send_key, Suite.AES256GCM), Opener(receive_key, Suite.AES256GCM, FRAME_MAX)
        carrier = Carrier(wire, sealer, opener)
        if first[:1] != bytes((frame.PING,)):
            opener.max_sealed_bytes = FRAME_MAX + TAG  # whoever does not begin with a PING gets no small answer first
        self.carriers.append(carrier)
        self._arrive(wire, pieces(carrier.record(first)))

    def _arrive(self, wire: Wire, pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            wire.arrived += piece
            while not wire.closed and (wire.arrived or wire.ended) and self.loop.fire(wire.fileno(), READ):
                pass

    def _wire(self) -> Wire:
        self.wires += 1
        return Wire(self.wires)

    def session(self) -> Session:
        """The session of our peer."""
        if isinstance(self.tunnel, ClientTunnel):
            return self.tunnel.session
        number = context.session_number(KEY_ID, "web", SESSION_ID)
        session: Session = self.tunnel.create(number, 0) or self.tunnel.sessions()[0]
        return session

    def deliver(self, carrier: Carrier, data: bytes) -> None:
        """Bytes arrive on a stripe."""
        self._arrive(carrier.wire, iter((data,)))

    def end(self, carrier: Carrier) -> None:
        """The peer closes a stripe."""
        carrier.wire.ended = True
        self.deliver(carrier, b"")
        self.carriers.remove(carrier)

    def make_room(self, carrier: Carrier, room: int) -> None:
        """The peer reads so much."""
        carrier.wire.room = room
        if room:
            self.loop.fire(carrier.wire.fileno(), WRITE)

    def touch_application(self) -> None:
        """One reads, writes, ends its direction or breaks off."""
        if not self.applications:
            return
        number = self.source.number() % len(self.applications)
        sock, fd = self.applications[number]
        does = self.source.number() % 5
        with suppress(BlockingIOError, OSError):
            if does == 0:
                sock.recv(1 << 20)
            elif does == 1:
                sock.send(bytes(self.source.number() * 64))
            elif does == 2:
                sock.shutdown(socket.SHUT_WR)
            elif does == 3:
                sock.close()
                del self.applications[number]
        for events in (READ, WRITE):
            if _is_open(fd):
                self.loop.fire(fd, events)

    def open(self) -> None:
        """An application connects to a client's end."""
        if isinstance(self.tunnel, ClientTunnel):
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            self.applications.append((theirs, ours.fileno()))
            self.tunnel._on_application(ours, None)

    # The other worker

    def borrowed(self) -> list[int]:
        """Our slots that it has."""
        return sorted(self.context.memory.arena._borrowed.get(OTHER_SLOT, ()))

    # The end

    def check(self) -> None:
        """At any time: bounds."""
        own = self.context.memory
        assert own.arena.used_bytes(Side.INGRESS) <= QUOTA and own.arena.used_bytes(Side.EGRESS) <= QUOTA
        assert 0 <= self.context.credit.reserved <= self.context.credit.total
        for session in self.worker._sessions():
            assert len(session.share.streams) <= session.share.max_streams

    def check_end(self) -> None:
        """The supervisor reads the status, the other worker dies, this one leaves: nothing is left."""
        self.turn()
        for tunnel in self.worker._tunnels.values():
            tunnel.status(self.now_us)
        self.lose_worker()
        self.loop.turn()
        for session in self.worker._sessions():
            for stream in list(session.share.streams.values()):
                session.share.reset_stream(stream, frame.Reason.SHUTDOWN)
            session.egress.pump()
        for tunnel in self.worker._tunnels.values():
            tunnel.close()
        own = self.context
        assert own.memory.arena.slots_in_use == 0, "slots were lost"
        assert own.credit.reserved == 0, "credit was lost"
        assert own.sessions == 0 and len(own.watch) == 0
        assert own.staging.stripe is None

    def lose_worker(self) -> None:
        """The other worker is dead and reaped."""
        if self.alive:
            self.heard += self.consumer.take()
            self.worker._on_peer_gone(OTHER_SLOT, OTHER_SERIAL)

    def _close_descriptors(self) -> None:
        self.producer.close()
        self.consumer.close()
        peer = self.worker._mesh.peers.get(OTHER_SLOT)
        if peer is not None:
            for fd in worker_module._descriptors(peer.fds):
                os.close(fd)
        own = self.context
        own.watch._epoll.close()
        own.memory.arena.close()
        for sock, _ in self.applications:
            sock.close()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@contextmanager
def world(settings: Settings, source: Source, *, honest: bool = True) -> Iterator[World]:
    """A World, and the checks of its end if nothing failed before. `honest`: the other worker hands over valid frames
    only; stripes carry what others' ACKs say unread."""
    with ExitStack() as stack:
        here = World(settings, source, stack, honest)
        yield here
        here.check_end()
