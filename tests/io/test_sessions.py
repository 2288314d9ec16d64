"""Sessions of two workers at each end, in one process: real stripes, mesh, arenas and sockets, and stripes that break
in the middle of a send. Whatever an application sends comes back as it was, and in the end nothing is held."""

import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import gevent
import pytest
from gevent import socket as green_socket

from workers.boot import PeerFds
from workers.core import frame
from workers.core.credit import CreditPool
from workers.core.noise import Suite
from workers.core.record import TAG, Opener, Sealer
from workers.core.stream import Stream
from workers.io import mesh, sockets
from workers.io.context import TICK_S, Context, Generation, clock_us
from workers.io.endpoint import Endpoint, ResetWatch
from workers.io.establish import make_stripe
from workers.io.memory import Memory
from workers.io.mesh import Descriptor, Mesh, Peer
from workers.io.session import Session
from workers.io.stripe import Staging, Stripe
from workers.settings import StripeTunnel
from workers.shm.arena import Arena, arena_size
from workers.shm.segments import close_ring, create_arena, create_ring

QUOTA_BYTES = 64 << 20
ARENA_BYTES = arena_size(QUOTA_BYTES, QUOTA_BYTES)
SIZES = (1, 64, 500, 900, 1100, 3000, 100_000)
FRAME_MAX = frame.MAX_PAYLOAD_BYTES + frame.HEADER_BYTES
RUN_S, PATIENCE_S = 2.5, 15.0
TUNNEL = StripeTunnel(name="web", index=0)
Place = tuple[int, int]
"""The client's worker and the server's that a stripe is between."""


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for sock in (one, other):
        sock.setblocking(False)
    return one, other


def green(sock: socket.socket) -> Any:
    wrapped = green_socket.socket(fileno=sock.detach())
    wrapped.setblocking(True)
    return wrapped


def echo(sock: socket.socket) -> None:
    service = green(sock)
    with suppress(OSError):
        while data := service.recv(1 << 16):
            service.sendall(data)
    service.close()


class ServerSession(Session):
    """Each stream leads to an echo, which takes a turn to connect to."""

    def opened(self, stream: Stream) -> None:
        endpoint = Endpoint(self, stream, self.context.memory, self.context.watch)
        stream.endpoint = endpoint
        near, far = connected()
        gevent.spawn(echo, far)
        gevent.spawn(self._attach, endpoint, near)

    def _attach(self, endpoint: Endpoint, sock: socket.socket) -> None:
        if endpoint.closed:
            sock.close()
            return
        sockets.prepare_application(sock)
        endpoint.attach(self.context.loop, sock)
        self.on_turn_end()


class Worker:
    """One worker of an end, as far as a session needs one. It implements MeshHandler."""

    def __init__(self, end: int, slot: int, boot_id: int) -> None:
        loop = gevent.get_hub().loop
        self.slot, self.boot_id = slot, boot_id
        self.arena_fd = create_arena(ARENA_BYTES)
        self.memory = Memory(Arena(self.arena_fd, ARENA_BYTES, QUOTA_BYTES, QUOTA_BYTES), frame.MAX_PAYLOAD_BYTES)
        self.mesh = Mesh(loop, self.memory, ARENA_BYTES)
        self.mesh.handler = self
        own: Any = Generation(0, 2)
        settings: Any = None
        self.context = Context(
            loop=loop,
            slot=slot,
            serial=100 + slot,
            boot_id=boot_id,
            own=own,
            home=own,
            settings=settings,
            memory=self.memory,
            staging=Staging(self.memory.outbound),
            mesh=self.mesh,
            watch=ResetWatch(loop),
            credit=CreditPool(QUOTA_BYTES * 9 // 10),
            roster={},
        )
        self.end = end

    def begin(self) -> None:
        """Once the other worker is known."""
        kind = ServerSession if self.end == frame.SERVER else Session
        self.session = kind(self.context, TUNNEL, self.end, 77, 0)

    @property
    def owner(self) -> tuple[int, int, int]:
        return self.slot, self.context.serial, self.boot_id

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        if descriptor[0] == mesh.FREE:
            assert self.memory.give_back(descriptor[3], peer.slot)
        else:
            self.session.on_descriptor(peer, descriptor)

    def on_turn_end(self) -> None:
        self.session.on_turn_end()

    def held(self) -> dict[str, int]:
        share, arena = self.session.share, self.memory.arena
        return {
            "slots": arena.slots_in_use,
            "lent": arena.slots_lent,
            "streams": len(share.streams),
            "kept": share.kept_bytes,
            "credit": self.context.credit.reserved,
        }


class Pair:
    """Two workers at each end, with stripes at these places. `breaks`: how often a stripe breaks as it sends."""

    def __init__(self, places: list[Place], breaks: float) -> None:
        self.random = random.Random(1)
        self.places, self.breaks, self.broken, self.echoed = places, breaks, 0, 0
        self.over = False
        self._rings: list[Any] = []
        self.clients, self.servers = self._end(frame.CLIENT, 5), self._end(frame.SERVER, 9)
        for index in range(len(places)):
            self._join(index)
        self._greenlets = [gevent.spawn(self._tick), gevent.spawn(self._join_again)]

    def _end(self, end: int, boot_id: int) -> list[Worker]:
        workers = [Worker(end, slot, boot_id) for slot in range(2)]
        one, other = workers
        there, back = create_ring(), create_ring()
        self._rings += [there, back]
        one.mesh.add_peer(PeerFds(1, 101, other.arena_fd, there, back))
        other.mesh.add_peer(PeerFds(0, 100, one.arena_fd, back, there))
        for worker in workers:
            worker.begin()
        return workers

    def _join(self, index: int) -> None:
        client, server = self.clients[self.places[index][0]], self.servers[self.places[index][1]]
        socks, keys = connected(), [os.urandom(32) for _ in range(2)]
        for worker, sock, (out, into), far in (
            (server, socks[0], keys, client),
            (client, socks[1], reversed(keys), server),
        ):
            opener = Opener(into, Suite.AES256GCM, FRAME_MAX)
            opener.max_sealed_bytes = FRAME_MAX + TAG  # as after the handshake's last record
            stripe = make_stripe(worker.context, TUNNEL, sock, index, (Sealer(out, Suite.AES256GCM), opener))
            stripe.far = far.owner
            stripe.owner = worker.session
            worker.session.add_stripe(stripe)
            stripe.start(worker.session)

    def _join_again(self) -> None:
        while True:
            gevent.sleep(0.02)
            for index, (client, server) in enumerate(self.places):
                ends = self.clients[client].session, self.servers[server].session
                if any(index not in session.stripes for session in ends):
                    self._join(index)

    def _tick(self) -> None:
        while True:
            gevent.sleep(TICK_S)
            for worker in self.workers:
                worker.session.on_time(clock_us())

    @property
    def workers(self) -> list[Worker]:
        return self.clients + self.servers

    def on_send(self, stripe: Stripe) -> None:
        """A small frame is about to leave alone."""
        if not stripe.closed and self.random.random() < self.breaks:
            self.broken += 1
            with suppress(OSError):  # its other end has just been broken, too
                stripe.sock.shutdown(socket.SHUT_RDWR)

    def talk(self, number: int) -> None:
        """Connections one after the other, each with questions of random size that are echoed."""
        numbers, worker = random.Random(number), self.clients[number % 2]
        while not self.over:
            owner = worker.session.choose_owner()
            if owner is None:
                gevent.sleep(0.02)
                continue
            near, far = connected()
            sockets.prepare_application(near)
            stream = worker.session.share.open_stream(owner, clock_us())
            assert stream is not None
            stream.endpoint = Endpoint(worker.session, stream, worker.memory, worker.context.watch)
            worker.session.share.on_readable(stream)
            stream.endpoint.attach(worker.context.loop, near)
            worker.session.egress.pump()
            application = green(far)
            application.settimeout(PATIENCE_S)
            for _ in range(numbers.randint(1, 60)):
                question = numbers.randbytes(numbers.choice(SIZES))
                application.sendall(question)
                assert b"".join(pieces(application, len(question))) == question
                self.echoed += 1
            application.shutdown(socket.SHUT_WR)
            assert application.recv(1) == b""
            application.close()

    def close(self) -> None:
        gevent.killall(self._greenlets)
        for worker in self.workers:
            worker.session.close(frame.Reason.SHUTDOWN)
            worker.mesh.remove_peer(1 - worker.slot, 101 - worker.slot)
            os.close(worker.arena_fd)
        for ring in self._rings:
            close_ring(ring)


def pieces(sock: Any, missing: int) -> Iterator[bytes]:
    while missing:
        data = sock.recv(missing)
        assert data, "an early end"
        missing -= len(data)
        yield data


@pytest.mark.parametrize("breaks", [0.0, 0.02])
@pytest.mark.parametrize(
    "places", [[(0, 1)], [(0, 0), (1, 1), (0, 1), (1, 0)]], ids=["a stripe at one worker", "stripes at all workers"]
)
def test_what_is_sent_comes_back_and_nothing_is_held(
    monkeypatch: pytest.MonkeyPatch, places: list[Place], breaks: float
) -> None:
    pair = Pair(places, breaks)
    send_now = Stripe.send_now

    def send_or_break(stripe: Stripe, view: memoryview) -> None:
        pair.on_send(stripe)
        send_now(stripe, view)

    monkeypatch.setattr(Stripe, "send_now", send_or_break)
    talkers = [gevent.spawn(pair.talk, number) for number in range(4)]
    gevent.sleep(RUN_S)
    pair.breaks, pair.over = 0.0, True
    gevent.joinall(talkers, timeout=PATIENCE_S, raise_error=True)
    assert all(talker.ready() for talker in talkers), "somebody waits for ever"
    until_s = time.monotonic() + PATIENCE_S
    while any(any(worker.held().values()) for worker in pair.workers) and time.monotonic() < until_s:
        gevent.sleep(0.05)
    assert pair.echoed > 100
    assert bool(breaks) == bool(pair.broken)
    for worker in pair.workers:
        assert not any(worker.held().values()), worker.held()
    pair.close()


def test_worker_with_stripes_is_preferred_unless_it_is_full_or_on_its_way_out() -> None:
    pair = Pair([(0, 0)], 0.0)
    with_stripe, without = (worker.session for worker in pair.clients)
    gevent.sleep(0.05)
    assert without.exchange.is_wanted_elsewhere and not with_stripe.exchange.is_wanted_elsewhere
    for full in (True, False):
        with_stripe.tell_full(full)
        gevent.sleep(0.05)
        assert without.exchange.is_wanted_elsewhere is not full
    (peer,) = without.context.mesh.peers.values()
    peer.seats = mesh.RETIRING
    assert not without.exchange.is_wanted_elsewhere
    peer.seats = 0
    with_stripe.leave_all()
    gevent.sleep(0.01)
    assert not without.exchange.is_wanted_elsewhere
    pair.close()
