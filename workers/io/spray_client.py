"""The client's end of a spray tunnel in one worker: an application's datagrams are read here and answers written.

Each source address is a conversation, owned by the worker whose socket it reaches (the kernel chooses by the address).
Answers come in at any worker's ports: each knows the addresses of all conversations (CONVERSATION, CLOSED) and answers
by itself; TOUCHED tells the owner that its conversation lives.
"""

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from workers.core.conversations import Conversation, Conversations
from workers.core.inner import DATA, Opened
from workers.io import mesh
from workers.io.batch import SLOTS
from workers.io.context import Context, clock_us, session_number
from workers.io.mesh import Descriptor, Peer
from workers.io.run_sender import RunSender
from workers.io.sockaddr import address_of
from workers.io.spray_buffers import Inbox, SprayBuffers
from workers.io.spray_dial import SprayDialler
from workers.io.spray_session import SpraySession
from workers.io.spray_waiting import datagrams_in
from workers.io.tally import add_spray_session, add_wires
from workers.io.wire import Diallers
from workers.settings import Key, SprayClientTunnel
from workers.shm.totals import TunnelTotals
from workers.status import TunnelStatus

READ = 1
TURN = 4
"""Batches read in one turn, so that the ports get theirs."""
MAX_CONVERSATIONS = 65_536

log = logging.getLogger("forwarder.spray")


RETIRE_US, RETIRE_MAX_US = 1_000_000, 3_000_000
"""How long the ports of a worker on its way out stay; longer where the next ones have none yet."""


class ClientSpraySession(SpraySession):
    """A session of which this end names the conversations: the name says who owns one, unless `owners` knows better."""

    owners: Callable[[int], int | None]

    def owner_of(self, conversation: int) -> int:
        """See SpraySession."""
        owner = self.owners(conversation)
        return conversation >> 24 if owner is None else owner


class SprayClientEnd:
    """Applications send to `sockets`, which are this worker's own."""

    def __init__(
        self,
        context: Context,
        tunnel: SprayClientTunnel,
        key: Key,
        session_id: int,
        sockets: list[socket.socket],
        diallers: dict[str, Diallers],
        buffers: SprayBuffers,
        inboxes: dict[int, Inbox],
    ) -> None:
        self.context = context
        self.tunnel = tunnel
        self._key = key
        self.session = ClientSpraySession(
            context, tunnel, session_number(key.key_id, tunnel.name, session_id), 0, buffers
        )
        self.name = tunnel.name
        self.session.deliver = self._deliver
        self.session.owners = self._owner_of
        self.session.room = self._resume
        self._dialler = SprayDialler(context, tunnel, key, self.session, session_id, diallers, buffers.staging)
        self._diallers = diallers
        self.reassembler = buffers.reassembler
        self.session.lost = self._dialler.on_lost
        duration_us = int(tunnel.duration_s * 1e6)
        self._touch_us = duration_us // 4
        self._table: Conversations[tuple[socket.socket, Any]] = Conversations(
            context.slot, int.from_bytes(os.urandom(4), "big"), MAX_CONVERSATIONS, duration_us, self._on_closed
        )
        self._foreign: dict[int, tuple[int, Any, int]] = {}
        self._foreign_keys: dict[bytes, int] = {}
        self._swept_us = self._retired_us = 0
        self._sender = RunSender()
        self._sockets = sockets
        self._inboxes = inboxes
        self._reading = False
        self._watchers = [context.loop.io(sock.fileno(), READ) for sock in sockets]
        self.unknown = 0
        self._resume()

    # From the application

    def _resume(self) -> None:
        """Read what applications send."""
        if not self._reading and self.context.in_charge and not self.context.is_leaving:
            self._reading = True
            for watcher, sock in zip(self._watchers, self._sockets, strict=True):
                watcher.start(self._on_readable, sock)

    def _pause(self) -> None:
        """No port takes more now: what comes waits in the kernel."""
        if self._reading:
            self._reading = False
            for watcher in self._watchers:
                watcher.stop()

    def _on_readable(self, sock: socket.socket) -> None:
        inbox = self._inboxes[sock.family]
        batch, session, most = inbox.batch, self.session, SLOTS
        for _ in range(TURN):
            try:
                count = batch.receive(sock, most)
            except OSError as error:
                log.warning("cannot read tunnel=%s reason=%s", self.tunnel.name, error)
                return
            if not count:
                return
            now_us = clock_us()
            for run in batch.runs():
                conversation = self._table.by_source(run[4]) or self._open(run[4], sock, now_us)
                if conversation is not None:
                    conversation.touched_us = now_us
                    source = inbox.source_of(run)
                    if not session.exchange.spread(conversation.id, *source):
                        session.send(conversation.id, *source, now_us)
            if not session.has_room:
                self._pause()
                return
            most = inbox.most_next
            if count < most:
                return

    def _open(self, key: bytes, sock: socket.socket, now_us: int) -> Conversation[Any] | None:
        state, number = (sock, address_of(key)), self._inherited(key)
        if number is None:
            conversation = self._table.open(key, state, now_us)
        else:
            conversation = self._table.adopt(number, key, state, now_us)
        if conversation is not None:
            for peer in self.context.mesh.peers.values():
                self._introduce(peer, conversation)
        return conversation

    def _inherited(self, key: bytes) -> int | None:
        """The number of that source's conversation, if its owner has gone or goes: the target sees no other source."""
        number = self._foreign_keys.get(key)
        owner = self._owner_of(number) if number is not None else None
        if number is None or owner is None:
            return None
        peer = self.context.mesh.peers.get(owner)
        if peer is not None and not peer.is_retiring:
            return None
        self._forget_foreign(number)
        return number

    def _owner_of(self, number: int) -> int | None:
        """The slot of whoever owns that conversation, -1 if nobody does any more; None if it is not known."""
        if self._table.by_id(number) is not None:
            return self.context.slot
        known = self._foreign.get(number)
        return known[0] if known is not None else None

    def _forget_foreign(self, number: int) -> None:
        if self._foreign.pop(number, None) is not None:
            self._foreign_keys = {key: each for key, each in self._foreign_keys.items() if each != number}

    def _introduce(self, peer: Peer, conversation: Conversation[Any]) -> None:
        """Tell a worker where the answers of a conversation go."""
        key = conversation.key.ljust(32, b"\0")
        high, low, rest = (int.from_bytes(key[at : at + 8], "big") for at in (0, 8, 16))
        self.session.exchange.tell(
            peer,
            mesh.CONVERSATION,
            flow=conversation.id,
            length=len(conversation.key),
            offset=int.from_bytes(key[24:32], "big"),
            value=high,
            value2=low,
            slot=rest >> 32,
            carrier=rest & 0xFFFFFFFF,
        )

    def _on_closed(self, conversation: Conversation[Any]) -> None:
        self.session.forget(conversation.id)
        if not self.context.retiring:
            self.session.exchange.tell_all(mesh.CLOSED, flow=conversation.id)

    # To the application

    def _deliver(self, number: int, size: int, payload: bytes, now_us: int) -> bool:
        conversation = self._table.by_id(number)
        if conversation is not None:
            conversation.touched_us = now_us
            sock, address = conversation.state
        else:
            known = self._foreign.get(number)
            if known is None:
                # An answer may overtake what its conversation's owner tells the other workers.
                owner = self.session.owner_of(number)
                if owner != self.context.slot and self.session.exchange.hand_in(
                    owner, Opened(DATA, number, size, payload)
                ):
                    return False
                self.unknown += 1
                self.session.forget(number)
                return True
            owner, address, told_us = known
            sock = self._socket_of(address)
            if now_us - told_us > self._touch_us:
                self._foreign[number] = (owner, address, now_us)
                peer = self.context.mesh.peers.get(owner)
                if peer is not None:
                    self.session.exchange.tell(peer, mesh.TOUCHED, flow=number)
        taken = self._sender.send_run(sock, memoryview(payload), max(size, 1), address)
        if taken < len(payload):
            self.session.undelivered += datagrams_in(size, payload[max(taken, 0) :])
        return True

    def _socket_of(self, address: Any) -> socket.socket:
        """Ours that has the address of the one which the application sent to, as far as families tell."""
        family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
        return next((sock for sock in self._sockets if sock.family == family), self._sockets[0])

    # Mesh

    def find(self, number: int) -> "SprayClientEnd | None":
        """This end, if the number is its session's."""
        return self if number == self.session.number else None

    def create(self, number: int, key_index: int) -> "SprayClientEnd | None":
        """A client has its session from the start."""
        return None

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """One descriptor that names the session."""
        kind, _, _, slot, _, flow, offset, length, carrier, value, value2 = descriptor
        if kind == mesh.CONVERSATION:
            packed = (value, value2, slot << 32 | carrier, offset)
            key = b"".join(each.to_bytes(8, "big") for each in packed)[:length]
            self._foreign[flow & 0xFFFFFFFF] = (peer.slot, address_of(key), clock_us())
            self._foreign_keys[key] = flow & 0xFFFFFFFF
        elif kind == mesh.CLOSED:
            self._forget_foreign(flow & 0xFFFFFFFF)
        elif kind == mesh.TOUCHED:
            conversation = self._table.by_id(flow & 0xFFFFFFFF)
            if conversation is not None:
                conversation.touched_us = clock_us()
        else:
            self.session.on_descriptor(peer, descriptor)

    def on_turn_end(self) -> None:
        """All descriptors of this turn were handed over."""

    def on_peer_joined(self, peer: Peer) -> None:
        """A worker has taken a dead one's place."""
        self.session.on_peer_joined(peer)
        for conversation in self._table:
            self._introduce(peer, conversation)

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker is dead, and so are its conversations; those of one that retired wait for an heir."""
        self.session.on_peer_lost(peer)
        for number, (owner, address, told_us) in list(self._foreign.items()):
            if owner == peer.slot and peer.is_retiring:
                self._foreign[number] = (-1, address, told_us)
            elif owner == peer.slot:
                self._forget_foreign(number)

    # Life

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        self._table.expire(now_us)
        self._sweep(now_us)
        self._dialler.on_time(now_us)
        self.session.on_time(now_us)
        if self.context.retiring:
            self._leave(now_us)
        elif self.session.has_room:
            self._resume()

    def _sweep(self, now_us: int) -> None:
        """Forget conversations that nobody has inherited."""
        if now_us - self._swept_us > self._touch_us:
            self._swept_us = now_us
            for number in [each for each, known in self._foreign.items() if known[0] < 0]:
                if now_us - self._foreign[number][2] > 4 * self._touch_us:
                    self._forget_foreign(number)

    def use_key(self) -> None:
        """The key may be another one for dials that follow."""
        self._key = self._dialler.key = self.context.settings.keys[0]

    def begin(self) -> None:
        """This worker is in charge now: it dials, and reads what applications send."""
        self._resume()
        self._dialler.on_time(clock_us())

    def take_ports(self) -> None:
        """See SprayServerEnd: a client's are dialled."""

    def retire(self) -> None:
        """Others read and dial; the ports here stay until they have some."""
        self._pause()
        self._dialler.stop()
        self._retired_us = clock_us()

    @property
    def has_conversations(self) -> bool:
        """Whether any are to be handed on: a client's are taken over by whoever hears of their source."""
        return False

    @property
    def is_busy(self) -> bool:
        """Whether ports are still up."""
        return bool(self.session.carriers)

    def _leave(self, now_us: int) -> None:
        since_us = now_us - self._retired_us
        if since_us > (RETIRE_US if self.session.exchange.up_elsewhere else RETIRE_MAX_US):
            for carrier in list(self.session.carriers.values()):
                self.session.remove(carrier, now_us)

    def stop_accepting(self) -> None:
        """Part of draining: datagrams have no end to wait for."""

    def close(self) -> None:
        """Give all ports up."""
        self._pause()
        for watcher in self._watchers:
            watcher.close()
        for sock in self._sockets:
            sock.close()
        self._dialler.stop()
        self.session.close()

    def status(self, now_us: int) -> TunnelStatus:
        """This worker's part of the tunnel."""
        session, table = self.session, self._table
        part = session.status(self._key.key_id, len(self.tunnel.carriers), now_us)
        up, wanted = part.carriers_up, self._dialler.wanted
        state = "draining" if self.context.is_leaving else "up" if up >= wanted else "degraded" if up else "connecting"
        return TunnelStatus(
            name=self.tunnel.name,
            mode="spray",
            state=state,
            bytes_in=session.bytes_in,
            bytes_out=session.bytes_out,
            flows_open=len(table),
            flows_total=table.opened,
            flows_reset=0,
            sessions=[part],
        )

    def totals(self) -> TunnelTotals:
        """The same for statistics."""
        table, dialler = self._table, self._dialler
        totals = TunnelTotals(self.tunnel.name, "spray")
        add_spray_session(totals, self.session)
        add_wires(totals, self._diallers.values())
        totals.flows_open, totals.flows_total = len(table), table.opened - table.inherited
        totals.flows_refused, totals.flows_evicted = table.refused, table.evicted
        totals.drop("receiver", self._sender.undelivered)
        totals.drop("too_large", self._sender.too_large)
        totals.drop("unknown", self.unknown)
        for kind, wanted in dialler.wanted_of_kind.items():
            ports = totals.kind(kind)
            ports.dialled, ports.failed, ports.wanted = dialler.dialled[kind], dialler.failed[kind], wanted
        return totals

    def count_open(self) -> dict[str, int]:
        """What must be level when nothing goes on, and what was lost."""
        totals = self.totals()
        lost = totals.dropped
        return {
            "spray_dialling": self._dialler.dialling,
            "spray_refused_frames": self._dialler.lost,
            "spray_dropped": sum(lost[reason] for reason in ("no_port", "receiver", "exchange")),
            "spray_too_large": lost["too_large"],
            "spray_unknown": self.unknown,
            "spray_rejected": totals.records_rejected,
            "spray_replayed": totals.records_replayed,
        }
