"""The server's end of a spray tunnel in one worker: who comes in by its ports, and the sessions.

Strangers are met at `workers.io.spray_door`; conversations with the target are `workers.io.spray_target`'s part.
"""

import logging
import socket
from collections.abc import Container, Iterable, Iterator

from workers.core.cuts import Records
from workers.core.errors import RemoteProtocolError
from workers.core.handshake import Hello
from workers.core.inner import CLOSE_INNER
from workers.core.port import Port
from workers.core.standing import Standing
from workers.io import mesh
from workers.io.capturing import Capture
from workers.io.context import Context, clock_us, session_number
from workers.io.mesh import Descriptor, Peer
from workers.io.port_carrier import PortCarrier
from workers.io.spray_buffers import Inbox, SprayBuffers
from workers.io.spray_door import Pending, SprayDoor
from workers.io.spray_release import Release
from workers.io.spray_session import SpraySession, jitter
from workers.io.spray_target import Targets
from workers.io.tally import add_spray_session, add_wires
from workers.io.tcp_wire import TcpPorts
from workers.io.udp_wire import UdpPorts
from workers.settings import SprayServerTunnel
from workers.shm.totals import TunnelTotals
from workers.status import TunnelStatus

MAX_PORTS = 2 * 4096
"""Carriers of one session: the most ports that a tunnel can have, both ways."""

FORGET_US = 1_000_000
"""How often carriers that are closed are forgotten: a loop over all ports."""

log = logging.getLogger("forwarder.spray")


class ServerSpraySession(SpraySession):
    """A session at the server. `key_id`: of its client."""

    key_id = ""

    def owner_of(self, conversation: int) -> int:
        """See SpraySession: workers of the newest generation in turn, as far as they live. One of ours that has not
        handed on its conversations yet still has them."""
        context = self.context
        if context.retiring:
            peer = context.mesh.peers.get(context.own.slot_of(conversation ^ conversation >> 24))
            if peer is not None and not peer.seats & mesh.HANDED_ON:
                return peer.slot
        return self.heir_of(conversation)

    def heir_of(self, conversation: int) -> int:
        """The same, of the newest generation alone."""
        slot = self.context.home.slot_of(conversation ^ conversation >> 24)
        return slot if slot in self.context.roster else self.context.slot


class SprayServerEnd:
    """Implements Host of `workers.io.spray_door`."""

    def __init__(
        self,
        context: Context,
        tunnel: SprayServerTunnel,
        buffers: SprayBuffers,
        inboxes: dict[int, Inbox],
        senders: dict[int, socket.socket],
        record: Capture | None = None,
    ) -> None:
        """`inboxes`: where datagrams are received, by address family. `senders`: to the other workers, by slot."""
        self._record = record
        self.context = context
        self.tunnel = tunnel
        self.door = SprayDoor(self, buffers.staging)
        self.name = tunnel.name
        self.udp: UdpPorts | None = None
        self.tcp: TcpPorts | None = None
        self.taken: set[int] = set()
        self._held: list[tuple[int, socket.socket]] = []
        self._release = Release(self)
        self._buffers = buffers
        self._sessions: dict[int, ServerSpraySession] = {}
        self._came_by: dict[int, dict[PortCarrier, None]] = {}
        self._standings: dict[tuple[int, int], Standing] = {}
        self.targets = Targets(context, tunnel, self, inboxes, senders)
        self.reassembler = buffers.reassembler
        self._forget_us = 0
        self._past = TunnelTotals(tunnel.name, "spray")

    # Ports

    def hold(self, carrier: int, sock: socket.socket) -> None:
        """A socket of that carrier's port, which an older worker may still read."""
        self._held.append((carrier, sock))

    def begin(self) -> None:
        """Nobody older accepts any more."""
        self._take("tcp", range(len(self.tunnel.carriers)))

    def take_ports(self) -> None:
        """Nobody older has any port."""
        for kind in self.tunnel.kinds:
            self._take(kind, range(len(self.tunnel.carriers)))

    def on_released(self, carrier: int) -> None:
        """An older worker has let go of that port."""
        self._take("udp", (carrier,))

    def _take(self, kind: str, carriers: Container[int]) -> None:
        def is_taken(carrier: int) -> bool:
            return carrier in carriers and self.tunnel.carriers[carrier][0] == kind

        found = [each for each in self._held if is_taken(each[0])]
        self._held = [each for each in self._held if not is_taken(each[0])]
        if not found or self.context.retiring:
            _close(found)
            return
        self.taken.update(carrier for carrier, _ in found)
        if kind == "tcp":
            self.tcp = TcpPorts(self.context, self.tunnel, found, self.door, self._record)
        elif self.udp is None:
            self.udp = UdpPorts(self.context, self.tunnel, found, self.door, self._record)
        else:
            for carrier, sock in found:
                self.udp.open(carrier, sock)

    def retire(self) -> None:
        """Others take the ports, one after the other, and the conversations."""
        _close(self._held)
        self._held.clear()
        if self.tcp is not None:
            self.tcp.retire()
        self._release.begin(clock_us())

    @property
    def has_conversations(self) -> bool:
        """Whether any are to be handed on."""
        return self.targets.has_own

    @property
    def is_busy(self) -> bool:
        """Whether there is anything left to let go of."""
        return self._release.is_busy

    def let_go(self, carrier: int, now_us: int) -> None:
        """Close what came in by that port, which others read from now on."""
        for each in self.carriers_of(carrier):
            # And once more in `remove`: until it comes, what is sent here is lost.
            each.send_control(CLOSE_INNER, now_us)
            for session in self._sessions.values():
                if session.carriers.get(each.index) is each:
                    session.remove(each, now_us)
        if self.udp is not None:
            self.udp.release(carrier)
        for peer in self.context.mesh.peers.values():
            peer.send(mesh.RELEASED, tunnel=self.tunnel.index, value=carrier)

    def use_key(self) -> None:
        """Keys are looked up for each handshake."""

    # Who comes in

    def find_key(self, key_id: str) -> tuple[int, bytes] | None:
        """See Host."""
        for index, key in enumerate(self.context.settings.keys):
            if key.key_id == key_id and not key.revoked:
                return index, key.secret
        return None

    def check_hello(self, key_id: str, key_index: int, hello: Hello) -> bool:
        """See Host."""
        allowed = self.context.settings.keys[key_index].tunnels
        if hello.tunnel != self.tunnel.name or (allowed is not None and hello.tunnel not in allowed):
            raise RemoteProtocolError(f"tunnel {hello.tunnel!r} is not for this key here")
        if hello.carrier_index >= MAX_PORTS:
            raise RemoteProtocolError(f"port {hello.carrier_index} of at most {MAX_PORTS}")
        return session_number(key_id, self.tunnel.name, hello.session_id) in self._sessions

    def admit(self, pending: Pending, now_us: int) -> PortCarrier | None:
        """See Host."""
        hello, keys = pending.hello, pending.keys
        assert hello is not None and keys is not None
        number = session_number(pending.key_id, self.tunnel.name, hello.session_id)
        session = self._session(number, pending.key_index)
        if session is None:
            self.targets.warn("too many sessions")
            return None
        index = hello.carrier_index
        standing = self._standings.setdefault((number, index), Standing(jitter))
        port = Port(index, session.port_settings(), now_us, jitter, accepted=True, standing=standing)
        before = pending.wire.owner
        if isinstance(before, PortCarrier):  # the client has begun anew from the same address
            before.abandon()
        carrier = PortCarrier(index, pending.wire, port, keys, self._buffers.staging, session)
        carrier.proven = True
        pending.wire.owner = carrier
        pending.wire.on_proven()
        session.peer_text = pending.wire.peer
        self._came_by.setdefault(pending.port, {})[carrier] = None
        session.add(carrier, now_us)
        session.past.kind(carrier.wire.kind).dialled += 1
        return carrier

    def carriers_of(self, port: int) -> Iterable[PortCarrier]:
        """See Host."""
        carriers = self._came_by.get(port, {})
        for carrier in [each for each in carriers if each.closed]:
            del carriers[carrier]
        return list(carriers)

    def _on_unknown(self, carrier: PortCarrier, records: Records, start: int, end: int, now_us: int) -> None:
        self.door.on_unknown(carrier, self._port_of, records, start, end, now_us)

    def _port_of(self, carrier: PortCarrier) -> int:
        """The port that a carrier came in by."""
        return next((port for port, carriers in self._came_by.items() if carrier in carriers), -1)

    def _session(self, number: int, key_index: int) -> ServerSpraySession | None:
        session = self._sessions.get(number)
        keys = self.context.settings.keys
        if session is not None or self.context.is_leaving or not 0 <= key_index < len(keys):
            return session
        if not self._has_place(key_index):
            return None
        session = ServerSpraySession(self.context, self.tunnel, number, key_index, self._buffers)
        self._sessions[number] = session
        session.key_id = keys[key_index].key_id
        session.deliver = lambda conversation, size, payload, now_us: self.targets.deliver(
            session, conversation, size, payload, now_us
        )
        session.unknown = self._on_unknown
        session.room = lambda: self.targets.resume(session)
        return session

    def _has_place(self, key_index: int) -> bool:
        """Where there are several keys, none gets more sessions than it leaves free: one cannot take all."""
        left = self.tunnel.max_sessions - len(self._sessions)
        if len(self.context.settings.keys) == 1:
            return left > 0
        return left > sum(session.key_index == key_index for session in self._sessions.values())

    # Mesh

    def find(self, number: int) -> "SessionEnd | None":
        """The session of that number."""
        session = self._sessions.get(number)
        return SessionEnd(self, session) if session is not None else None

    def create(self, number: int, key_index: int) -> "SessionEnd | None":
        """The same, new if need be."""
        session = self._session(number, key_index)
        return SessionEnd(self, session) if session is not None else None

    def find_session(self, number: int) -> ServerSpraySession | None:
        """See Sessions."""
        return self._sessions.get(number)

    def make_session(self, number: int, key_index: int) -> ServerSpraySession | None:
        """See Sessions."""
        return self._session(number, key_index)

    def heir_of(self, session: SpraySession, conversation: int) -> int:
        """See Sessions."""
        found = self._sessions.get(session.number)
        return found.heir_of(conversation) if found is not None else self.context.slot

    def take_over(self, sock: socket.socket, data: bytes) -> None:
        """A conversation's socket comes from another worker."""
        self.targets.take_over(sock, data)

    def on_peer_joined(self, peer: Peer) -> None:
        """A worker has taken a dead one's place."""
        for session in self._sessions.values():
            session.on_peer_joined(peer)
        self.targets.on_peer_joined(peer)

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker is dead."""
        for session in self._sessions.values():
            session.on_peer_lost(peer)
        self.targets.on_peer_lost(peer)

    # Life

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        self.door.on_time(now_us)
        self.targets.on_time(now_us)
        self._release.on_time(now_us)
        if now_us >= self._forget_us:
            self._forget_us = now_us + FORGET_US
            for port in self._came_by:
                self.carriers_of(port)
        for number, session in list(self._sessions.items()):
            session.on_time(now_us)
            if session.is_idle(now_us):
                self._end(number, session)

    def _end(self, number: int, session: ServerSpraySession) -> None:
        self.targets.forget(session)
        for place in [place for place in self._standings if place[0] == number]:
            del self._standings[place]
        session.close()
        add_spray_session(self._past, session)
        self._past = self._past.past()
        del self._sessions[number]

    def stop_accepting(self) -> None:
        """Part of draining: datagrams have no end to wait for."""

    def close(self) -> None:
        """Give all ports up."""
        for number, session in list(self._sessions.items()):
            self._end(number, session)
        self.door.close()
        _close(self._held)
        self._held.clear()
        for ports in self._wires:
            ports.close()

    def sessions(self) -> Iterator[ServerSpraySession]:
        """The sessions of this tunnel."""
        return iter(list(self._sessions.values()))

    def status(self, now_us: int) -> TunnelStatus:
        """This worker's part of the tunnel."""
        sessions = list(self._sessions.values())
        return TunnelStatus(
            name=self.tunnel.name,
            mode="spray",
            state="draining" if self.context.is_leaving else "up",
            bytes_in=self._past.bytes_in + sum(each.bytes_in for each in sessions),
            bytes_out=self._past.bytes_out + sum(each.bytes_out for each in sessions),
            flows_open=len(self.targets.table),
            flows_total=self.targets.table.opened,
            flows_reset=0,
            sessions=[each.status(each.key_id, each.total_up, now_us) for each in sessions],
        )

    @property
    def _wires(self) -> list[UdpPorts | TcpPorts]:
        return [ports for ports in (self.udp, self.tcp) if ports is not None]

    def totals(self) -> TunnelTotals:
        """The same for statistics."""
        targets, table = self.targets, self.targets.table
        totals = self._past.past()
        for session in self._sessions.values():
            add_spray_session(totals, session)
        add_wires(totals, self._wires)
        for reason, count in zip(("too_large", "receiver"), targets.counts, strict=True):
            totals.drop(reason, count)
        for reason in ("no_port", "exchange"):
            totals.drop(reason, 0)
        totals.flows_open, totals.flows_total = len(table), table.opened - table.inherited
        totals.flows_refused, totals.flows_evicted = table.refused, table.evicted
        totals.handshakes_refused, totals.moved = self.door.refused, self.door.moved
        totals.strangers = len(self.door)
        return totals

    def count_open(self) -> dict[str, int]:
        """What must be level when nothing goes on, and what was lost."""
        totals = self.totals()
        lost = totals.dropped
        return {
            "spray_pending": len(self.door),
            "spray_refused": self.door.refused,
            "spray_refused_frames": sum(ports.lost for ports in self._wires),
            "spray_dropped": sum(lost[reason] for reason in ("no_port", "receiver", "exchange")),
            "spray_too_large": lost["too_large"],
            "spray_rejected": totals.records_rejected,
            "spray_replayed": totals.records_replayed,
        }


def _close(held: list[tuple[int, socket.socket]]) -> None:
    for _, sock in held:
        sock.close()


class SessionEnd:
    """A session of the tunnel, as the mesh sees it."""

    __slots__ = ("_end", "_session")

    def __init__(self, end: SprayServerEnd, session: ServerSpraySession) -> None:
        self._end = end
        self._session = session

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """One descriptor that names this session."""
        self._end.targets.on_descriptor(self._session, peer, descriptor)

    def on_turn_end(self) -> None:
        """All descriptors of this turn were handed over."""
