"""Both ends of a spray tunnel in one process: real keys, real core, real mesh and application sockets; the wires, the
clock and the turns of the loop are the test's."""

import os
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.io.spray_net import FakeDiallers, FakeWire, Net, TimedLoop
from workers.boot import PeerFds, RingFds
from workers.core import frame
from workers.core.datagram import RECORD_MAX
from workers.core.handshake import WorkerId
from workers.io import mesh, port_carrier, spray_client, spray_dial, spray_door, spray_session, spray_target
from workers.io.context import Context, Generation
from workers.io.memory import Memory
from workers.io.mesh import Descriptor, Mesh, Peer
from workers.io.port_carrier import PortCarrier
from workers.io.spray_buffers import Inbox, SprayBuffers
from workers.io.spray_client import SprayClientEnd
from workers.io.spray_server import SprayServerEnd
from workers.settings import Address, Key, SprayClientTunnel, SprayServerTunnel
from workers.shm.arena import Arena, arena_size
from workers.shm.segments import close_ring, create_arena, create_ring

QUOTA_BYTES = 1 << 20
ARENA_BYTES = arena_size(QUOTA_BYTES, QUOTA_BYTES)
TICK_US, STEP_US = 100_000, 20_000
CLOCKED = (port_carrier, spray_client, spray_dial, spray_session, spray_target)
SECRET = bytes(range(32))


class Process:
    """A worker of one end. `end` is its tunnel."""

    end: Any

    def __init__(self, world: "World", slot: int, serial: int, workers: int, key: Key) -> None:
        self.world, self.slot, self.serial, self.arena = world, slot, serial, create_arena(ARENA_BYTES)
        memory = Memory(Arena(self.arena, ARENA_BYTES, QUOTA_BYTES, QUOTA_BYTES), frame.MAX_PAYLOAD_BYTES)
        self.loop = TimedLoop(world)
        self.mesh = Mesh(self.loop, memory, ARENA_BYTES)
        self.mesh.handler = self
        self.inbox, self.sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.inbox.setblocking(False)
        self.taken: list[int] = []
        roster = {slot: serial}
        settings = SimpleNamespace(suite="aes256gcm", keys=(key,))
        fields = dict.fromkeys(("staging", "watch", "credit"))
        self.context = cast(
            Context,
            SimpleNamespace(
                **{**fields, "loop": self.loop, "slot": slot, "serial": serial, "boot_id": 7},
                seat=slot,
                workers=workers,
                own=Generation(0, workers),
                home=Generation(0, workers),
                in_charge=True,
                has_ports=True,
                retiring=False,
                read_inbox=lambda: False,
                is_leaving=False,
                settings=settings,
                memory=memory,
                mesh=self.mesh,
                roster=roster,
                roster_ids=lambda: tuple(WorkerId(*each) for each in sorted(roster.items())),
                draining=False,
            ),
        )

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """As `workers.worker` does."""
        kind, _, _, slot, number = descriptor[:5]
        self.taken.append(kind)
        if kind == mesh.FREE:
            assert self.context.memory.give_back(slot, peer.slot)
            return
        session = self.end.find(number)
        if session is None and kind in (mesh.CARRIERS, mesh.IN):
            session = self.end.create(number, descriptor[7] if kind == mesh.CARRIERS else descriptor[8])
        if session is not None:
            session.on_descriptor(peer, descriptor)
        elif kind == mesh.IN:
            peer.return_slot(slot)

    def on_turn_end(self) -> None:
        """See MeshHandler."""

    def close(self) -> None:
        os.close(self.arena)
        self.inbox.close()
        self.sender.close()

    def read_inbox(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self.inbox, 1024, 4)
        except BlockingIOError:
            return False
        self.end.take_over(socket.socket(fileno=fds[0]), data[2:])
        return True


class World:
    """`clients`, `servers`: the workers of both ends. `app` sends to the client's worker 0, `target` is the target."""

    def __init__(
        self, patch: pytest.MonkeyPatch, ports: int = 2, clients: int = 1, servers: int = 1, **tunnel: Any
    ) -> None:
        self.now_us = 100_000_000
        for module in CLOCKED:
            patch.setattr(module, "clock_us", lambda: self.now_us)
        patch.setattr(spray_door, "BUDGET_S", 1e9)
        self.net = Net(self)
        self.rings: list[RingFds] = []
        self.senders: dict[int, socket.socket] = {}
        self.target = _udp()
        both: Any = {"name": "t", "index": 0, "ports": tuple(range(7001, 7001 + ports)), "type": "udp"}
        ours = {
            key: tunnel.pop(key) for key in ("rotate_after_s", "dial_rate_per_s", "hosts", "sources") if key in tunnel
        }
        theirs = {key: tunnel.pop(key) for key in ("max_sessions", "max_conversations") if key in tunnel}
        both |= tunnel
        there = Address(*self.target.getsockname())
        self.client_tunnel = SprayClientTunnel(local=there, **{"hosts": ("192.0.2.1",), **ours}, **both)
        self.server_tunnel = SprayServerTunnel(listen="::", target=there, **theirs, **both)
        self.key = Key("a", SECRET)
        self.servers = [self._server(slot, 100 + slot, servers) for slot in range(servers)]
        self.diallers: list[FakeDiallers] = []
        self.app_addresses: list[Any] = []
        self.clients = [self._client(slot, 200 + slot, clients, session_id=5) for slot in range(clients)]
        self.meet(self.servers)
        self.meet(self.clients)
        self.app = _udp()
        self.app.connect(self.app_addresses[0])

    def _server(self, slot: int, serial: int, workers: int) -> Process:
        process = Process(self, slot, serial, workers, self.key)
        inboxes = {family: Inbox(family) for family in (socket.AF_INET, socket.AF_INET6)}
        self.senders[slot] = process.sender
        process.end = SprayServerEnd(
            process.context, self.server_tunnel, SprayBuffers(RECORD_MAX), inboxes, self.senders
        )
        return process

    def _client(self, slot: int, serial: int, workers: int, session_id: int) -> Process:
        process = Process(self, slot, serial, workers, self.key)
        inboxes = {family: Inbox(family) for family in (socket.AF_INET, socket.AF_INET6)}
        sock = _udp()
        self.app_addresses.append(sock.getsockname())
        self.diallers.append(FakeDiallers(self, process.loop))
        process.end = SprayClientEnd(
            process.context,
            self.client_tunnel,
            self.key,
            session_id,
            [sock],
            cast(Any, dict.fromkeys(("tcp", "udp"), self.diallers[-1])),
            SprayBuffers(RECORD_MAX),
            inboxes,
        )
        return process

    def restart_client(self) -> Process:
        """Another client of the same key, with a session of its own, in place of the first, which falls silent."""
        old = self.clients[0]
        old.end._pause()
        process = self._client(0, 300, 1, session_id=6)
        self.clients[0] = process
        self.app.connect(self.app_addresses[-1])
        return process

    def meet(self, processes: list[Process]) -> None:
        """Each two of these share rings, and each knows the others' serials."""
        for index, one in enumerate(processes):
            for other in processes[index + 1 :]:
                self.introduce(one, other)

    def introduce(self, one: Process, other: Process) -> tuple[Peer, Peer]:
        there, back = create_ring(), create_ring()
        self.rings += [there, back]
        one.context.roster[other.slot] = other.serial
        other.context.roster[one.slot] = one.serial
        return (
            one.mesh.add_peer(PeerFds(other.slot, other.serial, other.arena, there, back)),
            other.mesh.add_peer(PeerFds(one.slot, one.serial, one.arena, back, there)),
        )

    def server_of(self, carrier: int) -> Process:
        return self.servers[self.server_tunnel.owner_of(carrier, len(self.servers))]

    def replace_server(self, slot: int, serial: int) -> Process:
        """That worker of the server dies without a word, and another comes in its place."""
        old = self.servers[slot]
        others = [each for each in self.servers if each is not old]
        for wire in [wire for wire in self.net.servers.values() if self.server_of(wire.carrier) is old]:
            wire.closed = True
        for conversation in old.end.targets.table:
            conversation.state.sock.close()
        for other in others:
            peer = other.mesh.remove_peer(slot, old.serial)
            assert peer is not None
            del other.context.roster[slot]
            other.end.on_peer_lost(peer)
        old.close()
        self.servers[slot] = new = self._server(slot, serial, len(self.servers))
        for other in others:
            peer, _ = self.introduce(other, new)
            other.end.on_peer_joined(peer)
        return new

    # Turns

    def settle(self) -> None:
        """Until nothing is on its way."""
        busy = True
        while busy:
            busy = self.net.turn()
            busy |= any([each.loop.turn() for each in [*self.servers, *self.clients]])
            busy |= any([each.read_inbox() for each in self.servers])

    def advance(self, milliseconds: int) -> None:
        """Let time pass, with everything that happens in it."""
        end_us = self.now_us + milliseconds * 1000
        while self.now_us < end_us:
            self.now_us += min(STEP_US, end_us - self.now_us)
            for process in [*self.servers, *self.clients]:
                process.loop.run_timers()
            if self.now_us % TICK_US < STEP_US:
                for process in [*self.servers, *self.clients]:
                    process.end.on_time(self.now_us)
            self.settle()

    def up(self) -> "World":
        """Let all ports come up."""
        self.advance(400)
        return self

    # What there is

    @property
    def client(self) -> SprayClientEnd:
        return cast(SprayClientEnd, self.clients[0].end)

    @property
    def server(self) -> SprayServerEnd:
        return cast(SprayServerEnd, self.servers[0].end)

    def carriers(self, slot: int = 0) -> dict[int, PortCarrier]:
        """The client's ports."""
        return cast(dict[int, PortCarrier], self.clients[slot].end.session.carriers)

    def wire(self, index: int, slot: int = 0) -> FakeWire:
        """The client's wire of a port that is up."""
        return cast(FakeWire, self.carriers(slot)[index].wire)

    def server_carriers(self, slot: int = 0) -> dict[int, PortCarrier]:
        """Those of the server's only session."""
        (session,) = self.servers[slot].end.sessions()
        return cast(dict[int, PortCarrier], session.carriers)

    def close(self) -> None:
        for process in [*self.clients, *self.servers]:
            process.end.close()
        for ring in self.rings:
            close_ring(ring)
        for process in [*self.clients, *self.servers]:
            process.close()
        self.app.close()
        self.target.close()


def _udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    return sock


def received(sock: socket.socket) -> list[bytes]:
    """What waits at an application's socket."""
    found = []
    while True:
        try:
            found.append(sock.recv(65536))
        except BlockingIOError:
            return found
