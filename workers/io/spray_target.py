"""Conversations at the server: one UDP socket each towards the target, so that the target sees one source for each.

The worker that owns a conversation opens the socket and reads it. Any worker whose ports bring datagrams for it writes
to it, once the owner has passed it on (`_share`, SCM_RIGHTS); until then they are handed in. When the owner dies, those
who have the socket give it to the worker that takes its place.
"""

import errno
import logging
import socket
import struct
from contextlib import suppress
from typing import Any, Protocol

import gevent
from gevent import socket as green_socket

from workers.core.conversations import Conversation, Conversations
from workers.core.inner import DATA, Opened
from workers.io import mesh, sockets
from workers.io.batch import SLOTS, prepare_datagrams
from workers.io.context import Context, clock_us
from workers.io.mesh import Descriptor, Peer
from workers.io.run_sender import RunSender
from workers.io.spray_buffers import Inbox
from workers.io.spray_session import SpraySession
from workers.io.spray_waiting import datagrams_in
from workers.settings import SprayServerTunnel

READ = 1
TURN = 4
"""Batches read in one turn, so that the ports get theirs."""
LOOKUP_US = 30_000_000
"""How often a target's name is looked up."""
RETRY_US = 1_000_000
WARN_US = 10_000_000
TUNNEL = struct.Struct("=H")
SHARED = struct.Struct("=QIBH")
"""What comes along with a socket that is passed on in an inbox, after the tunnel's index: session, conversation, slot
of the owner, index of the client's key."""

log = logging.getLogger("forwarder.spray")


class Sessions(Protocol):
    """Who knows the sessions of a tunnel."""

    def find_session(self, number: int) -> SpraySession | None:
        """The session of that number."""

    def make_session(self, number: int, key_index: int) -> SpraySession | None:
        """The same, new if need be; None where there may be no more."""

    def heir_of(self, session: SpraySession, conversation: int) -> int:
        """The slot of the worker that a retiring one's conversation goes to."""


class TargetFlow:
    """A conversation's socket towards the target, at the worker that owns it. `told`: the workers that have it, too."""

    __slots__ = ("closed", "conversation", "reading", "session", "sock", "told", "watcher")

    def __init__(self, session: SpraySession, conversation: int, sock: socket.socket, watcher: Any) -> None:
        self.session = session
        self.conversation = conversation
        self.sock = sock
        self.watcher = watcher
        self.reading = self.closed = False
        self.told: set[int] = set()


class Targets:
    """The conversations of one tunnel in one worker. `senders`: to the other workers' inboxes, by slot.

    `_foreign` has what other workers own: their slot, the socket, and when they were told last that it is in use.
    """

    def __init__(
        self,
        context: Context,
        tunnel: SprayServerTunnel,
        sessions: Sessions,
        inboxes: dict[int, Inbox],
        senders: dict[int, socket.socket],
    ) -> None:
        self.context = context
        self.tunnel = tunnel
        self._sessions = sessions
        self._inboxes = inboxes
        self._senders = senders
        duration_us = int(tunnel.duration_s * 1e6)
        self.table: Conversations[TargetFlow] = Conversations(
            context.slot, 0, tunnel.max_conversations, duration_us, self._on_closed
        )
        self._foreign: dict[int, tuple[int, socket.socket, int]] = {}
        self._touch_us = duration_us // 4
        self._sender = RunSender()
        self._target: tuple[int, Any] | None = None
        self._paused: dict[SpraySession, list[TargetFlow]] = {}
        self._looked_up_us = self._warned_us = -WARN_US
        self._find_target(clock_us())

    @property
    def counts(self) -> tuple[int, int]:
        """Datagrams that were too large for the target's path, and those that it did not take."""
        return self._sender.too_large, self._sender.undelivered

    def warn(self, reason: str) -> None:
        """Log why datagrams are lost, now and then."""
        now_us = clock_us()
        if now_us - self._warned_us >= WARN_US:
            self._warned_us = now_us
            log.warning("datagrams are lost tunnel=%s reason=%s", self.tunnel.name, reason)

    # The target

    def _find_target(self, now_us: int) -> None:
        """Only a name goes to gevent's resolver threads, now and then."""
        self._looked_up_us = now_us
        target = self.tunnel.target
        try:
            found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            gevent.spawn(self._look_up)
            return
        self._target = (int(found[0][0]), found[0][4])

    def _look_up(self) -> None:
        target = self.tunnel.target
        try:
            found = green_socket.getaddrinfo(target.host, target.port, 0, socket.SOCK_DGRAM)
        except OSError as error:
            self.warn(f"target {target.host}: {error}")
            return
        self._target = (int(found[0][0]), found[0][4])

    # To the target

    def deliver(self, session: SpraySession, conversation: int, size: int, payload: bytes, now_us: int) -> bool:
        """Send datagrams of `size` bytes, the last perhaps shorter; False if another worker was given them."""
        key = session.number << 32 | conversation
        known = self.table.by_id(key)
        if known is not None:
            known.touched_us = now_us
            sock = known.state.sock
        else:
            passed = self._foreign.get(key)
            if passed is not None:
                sock = self._touch(session, key, passed, now_us)
            else:
                owner = session.owner_of(conversation)
                if owner != self.context.slot and session.exchange.hand_in(
                    owner, Opened(DATA, conversation, size, payload)
                ):
                    return False
                flow = self._find_handed_on(key) or self._open(session, conversation, now_us)
                if flow is None:
                    session.dropped += datagrams_in(size, payload)
                    session.forget(conversation)
                    return True
                sock = flow.sock
        taken = self._sender.send_run(sock, memoryview(payload), max(size, 1))
        if taken < len(payload):
            session.undelivered += datagrams_in(size, payload[max(taken, 0) :])
        return True

    def _find_handed_on(self, key: int) -> TargetFlow | None:
        """Its socket may have been sent to this worker, and wait in the inbox."""
        while self.context.read_inbox():
            pass
        known = self.table.by_id(key)
        return known.state if known is not None else None

    def _touch(
        self, session: SpraySession, key: int, passed: tuple[int, socket.socket, int], now_us: int
    ) -> socket.socket:
        """The socket of another worker's conversation, which that one hears of now and then."""
        owner, sock, told_us = passed
        if now_us - told_us > self._touch_us:
            self._foreign[key] = (owner, sock, now_us)
            peer = self.context.mesh.peers.get(owner)
            if peer is not None:
                session.exchange.tell(peer, mesh.TOUCHED, flow=key & 0xFFFFFFFF)
        return sock

    def _open(self, session: SpraySession, conversation: int, now_us: int) -> TargetFlow | None:
        if self._target is None:
            self.warn(f"target {self.tunnel.target.host} is not known")
            return None
        family, address = self._target
        sock: socket.socket | None = None
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            if sockets.is_of_reserve(sock):
                raise OSError(errno.EMFILE, "few descriptors are left")
            prepare_datagrams(sock)
            sock.connect(address)
        except OSError as error:
            if sock is not None:
                sock.close()
            self.warn(f"target {self.tunnel.target}: {error}")
            return None
        return self._adopt(session, conversation, sock, now_us)

    def _adopt(
        self, session: SpraySession, conversation: int, sock: socket.socket, now_us: int, *, inherited: bool = False
    ) -> TargetFlow | None:
        flow = TargetFlow(session, conversation, sock, self.context.loop.io(sock.fileno(), READ))
        opened = self.table.accept(session.number << 32 | conversation, flow, now_us, inherited=inherited)
        if opened is None:
            self.warn("too many conversations")
            flow.watcher.close()
            sock.close()
            return None
        self._read(flow)
        return flow

    def _on_closed(self, conversation: Conversation[TargetFlow]) -> None:
        flow = conversation.state
        flow.closed = True
        flow.watcher.stop()
        flow.watcher.close()
        flow.sock.close()
        flow.session.forget(flow.conversation)
        for slot in flow.told:
            peer = self.context.mesh.peers.get(slot)
            if peer is not None:
                flow.session.exchange.tell(peer, mesh.CLOSED, flow=flow.conversation)

    # From the target

    def _read(self, flow: TargetFlow) -> None:
        if not flow.reading:
            flow.reading = True
            flow.watcher.start(self._on_readable, flow)

    def resume(self, session: SpraySession) -> None:
        """Read what targets send to the session: there is room again."""
        for flow in self._paused.pop(session, ()):
            if not flow.closed:
                self._read(flow)

    def _pause(self, flow: TargetFlow) -> None:
        """No port takes more now: what comes waits in the kernel."""
        flow.reading = False
        flow.watcher.stop()
        self._paused.setdefault(flow.session, []).append(flow)

    def _on_readable(self, flow: TargetFlow) -> None:
        inbox, session = self._inboxes[flow.sock.family], flow.session
        batch, most = inbox.batch, SLOTS
        for _ in range(TURN):
            if not session.has_room:
                self._pause(flow)
                return
            try:
                count = batch.receive(flow.sock, most)
            except OSError as error:
                self.warn(f"target {self.tunnel.target}: {error}")
                return
            if not count:
                return
            now_us = clock_us()
            known = self.table.by_id(session.number << 32 | flow.conversation)
            if known is not None:
                known.touched_us = now_us
            for run in batch.runs():
                source = inbox.source_of(run)
                if not session.exchange.spread(flow.conversation, *source):
                    session.send(flow.conversation, *source, now_us)
            most = inbox.most_next
            if count < most:
                return

    # Mesh

    def on_descriptor(self, session: SpraySession, peer: Peer, descriptor: Descriptor) -> None:
        """One descriptor that names the session."""
        kind, flow = descriptor[0], descriptor[5] & 0xFFFFFFFF
        key = session.number << 32 | flow
        if kind == mesh.TOUCHED:
            known = self.table.by_id(key)
            if known is not None:
                known.touched_us = clock_us()
            elif key not in self._foreign:  # nobody reads the socket that the peer writes to
                session.exchange.tell(peer, mesh.CLOSED, flow=flow)
        elif kind == mesh.CLOSED:
            passed = self._foreign.pop(key, None)
            if passed is not None:
                passed[1].close()
        else:
            session.on_descriptor(peer, descriptor)
            if kind == mesh.IN:
                known = self.table.by_id(key)
                if known is not None and peer.slot not in known.state.told:
                    self._share(known.state, peer.slot)

    def _share(self, flow: TargetFlow, slot: int) -> None:
        """Pass the socket on to a worker whose ports bring datagrams for it."""
        sender = self._senders.get(slot)
        if sender is None:
            return
        session = flow.session
        names = SHARED.pack(session.number, flow.conversation, self.context.slot, session.key_index)
        message = TUNNEL.pack(self.tunnel.index) + names
        try:
            socket.send_fds(sender, [message], [flow.sock.fileno()])
        except OSError:
            return  # what it gets is handed in, as before
        flow.told.add(slot)

    def hand_on(self, now_us: int) -> None:
        """This worker retires: the conversations go to workers of the next generation, as many as they take now. What
        still comes here for them is written as before."""
        for conversation in self.table:
            flow = conversation.state
            owner = self._sessions.heir_of(flow.session, flow.conversation)
            sender = self._senders.get(owner)
            if owner == self.context.slot or sender is None:
                continue
            names = SHARED.pack(flow.session.number, flow.conversation, owner, flow.session.key_index)
            try:
                socket.send_fds(sender, [TUNNEL.pack(self.tunnel.index) + names], [flow.sock.fileno()])
            except OSError:
                continue  # its inbox is full
            flow.told.clear()
            self._foreign[conversation.id] = (owner, flow.sock.dup(), now_us)
            self.table.close(conversation)

    @property
    def has_own(self) -> bool:
        """Whether conversations are still this worker's."""
        return len(self.table) > 0

    def drop_own(self) -> None:
        """Nobody takes what is left."""
        for conversation in self.table:
            self.table.close(conversation)

    def take_over(self, sock: socket.socket, data: bytes) -> None:
        """A conversation's socket comes from another worker."""
        if len(data) != SHARED.size or sockets.is_of_reserve(sock):
            sock.close()
            return
        number, conversation, owner, key_index = SHARED.unpack(data)
        # A new process may hear of a session by this first.
        session = self._sessions.make_session(number, key_index)
        if session is None:
            sock.close()
            return
        if owner == self.context.slot:  # it was ours before this process: whoever kept it gives it back
            if self.table.by_id(number << 32 | conversation) is not None:
                sock.close()
            else:
                self._adopt(session, conversation, sock, clock_us(), inherited=True)
            return
        old = self._foreign.get(number << 32 | conversation)
        if old is not None:
            old[1].close()
        self._foreign[number << 32 | conversation] = (owner, sock, clock_us())

    def on_peer_joined(self, peer: Peer) -> None:
        """A worker has taken a dead one's place: the sockets of its conversations go back to it, so that the target
        sees the same source."""
        sender = self._senders.get(peer.slot)
        for key, (owner, sock, _) in list(self._foreign.items()):
            session = self._sessions.find_session(key >> 32)
            if owner != peer.slot or sender is None or session is None:
                continue
            names = SHARED.pack(session.number, key & 0xFFFFFFFF, owner, session.key_index)
            message = TUNNEL.pack(self.tunnel.index) + names
            with suppress(OSError):
                socket.send_fds(sender, [message], [sock.fileno()])
            # Ours no longer: it comes back like any other once there is something to write to it.
            sock.close()
            del self._foreign[key]

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker is dead. Who has its conversations' sockets keeps them for the next one in its place."""
        for conversation in self.table:
            conversation.state.told.discard(peer.slot)

    # Time

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        self.table.expire(now_us)
        if now_us - self._looked_up_us > (LOOKUP_US if self._target is not None else RETRY_US):
            self._find_target(now_us)

    def forget(self, session: SpraySession) -> None:
        """The session ends, and its conversations with it."""
        self._paused.pop(session, None)
        for conversation in self.table:
            if conversation.state.session is session:
                self.table.close(conversation)
        for key in [key for key in self._foreign if key >> 32 == session.number]:
            self._foreign.pop(key)[1].close()
