"""The client's end of a spray tunnel in one worker: an application's datagrams are read here and answers written.

Each source address is a conversation, owned by the worker whose socket it reaches (the kernel chooses by the address).
Answers come in at any worker's ports: each knows the addresses of all conversations (CONVERSATION, CLOSED) and answers
by itself; TOUCHED tells the owner that its conversation lives.
"""

import logging
import os
import socket
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
from workers.io.wire import Diallers
from workers.settings import Key, SprayClientTunnel
from workers.status import TunnelStatus

READ = 1
TURN = 4
"""Batches read in one turn, so that the ports get theirs."""
MAX_CONVERSATIONS = 65_536

log = logging.getLogger("forwarder.spray")


class ClientSpraySession(SpraySession):
    """A session of which this end names the conversations: the name says who owns one."""

    def owner_of(self, conversation: int) -> int:
        """See SpraySession."""
        return conversation >> 24


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
        self.session.deliver = self._deliver
        self.session.room = self._resume
        self._dialler = SprayDialler(context, tunnel, key, self.session, session_id, diallers, buffers.staging)
        self.session.lost = self._dialler.on_lost
        duration_us = int(tunnel.duration_s * 1e6)
        self._touch_us = duration_us // 4
        self._table: Conversations[tuple[socket.socket, Any]] = Conversations(
            context.slot, int.from_bytes(os.urandom(4), "big"), MAX_CONVERSATIONS, duration_us, self._on_closed
        )
        self._foreign: dict[int, tuple[int, Any, int]] = {}
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
        if not self._reading and not self.context.draining:
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
        conversation = self._table.open(key, (sock, address_of(key)), now_us)
        if conversation is not None:
            for peer in self.context.mesh.peers.values():
                self._introduce(peer, conversation)
        return conversation

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
            self.session.dropped += datagrams_in(size, payload[max(taken, 0) :])
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
        elif kind == mesh.CLOSED:
            self._foreign.pop(flow & 0xFFFFFFFF, None)
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
        """A worker is dead, and so are its conversations."""
        self.session.on_peer_lost(peer)
        for number in [number for number, known in self._foreign.items() if known[0] == peer.slot]:
            del self._foreign[number]

    # Life

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        self._table.expire(now_us)
        self._dialler.on_time(now_us)
        self.session.on_time(now_us)
        if self.session.has_room:
            self._resume()

    def stop_accepting(self) -> None:
        """Part of draining: datagrams have no end to wait for."""

    def close(self) -> None:
        """Give all ports up."""
        self._pause()
        for watcher in self._watchers:
            watcher.close()
        self._dialler.stop()
        self.session.close()

    def status(self, now_us: int) -> TunnelStatus:
        """This worker's part of the tunnel."""
        session, table = self.session, self._table
        part = session.status(self._key.key_id, len(self.tunnel.carriers), now_us)
        up, wanted = part.carriers_up, self._dialler.wanted
        state = "draining" if self.context.draining else "up" if up >= wanted else "degraded" if up else "connecting"
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

    def count_open(self) -> dict[str, int]:
        """What must be level when nothing goes on, and what was lost."""
        session = self.session
        return {
            "spray_dialling": self._dialler.dialling,
            "spray_refused_frames": self._dialler.lost,
            "spray_dropped": session.dropped + session.exchange.dropped + self._sender.undelivered,
            "spray_too_large": session.too_large + self._sender.too_large,
            "spray_unknown": self.unknown,
            "spray_rejected": session.refused_records[0],
            "spray_replayed": session.refused_records[1],
        }
