"""A worker process after the fork: build, run, change, drain or retire, exit.

gevent is imported here and below, never in the supervisor. The data path runs in callbacks of the event loop;
greenlets dial, connect to targets and wait for the end.
"""

import gc
import logging
import os
import signal
import socket
from typing import Any

import gevent
import msgspec
from gevent._hub_local import set_hub
from gevent.event import Event
from gevent.hub import Hub

from workers import boot as messages
from workers.boot import Boot, PeerFds, RingFds
from workers.change import Tunnels, reset_streams
from workers.core import frame
from workers.core.credit import CreditPool
from workers.dispatch import Dispatch
from workers.io import mesh
from workers.io.context import TICK_S, Context, Generation, clock_us
from workers.io.endpoint import ResetWatch
from workers.io.memory import Memory
from workers.io.mesh import Mesh
from workers.io.retirement import Retirement
from workers.io.server import HANDOVER, ServerTunnel
from workers.io.session import Session
from workers.io.spray_server import SprayServerEnd
from workers.io.spray_tunnels import SprayEnd
from workers.io.stripe import Staging
from workers.io.succession import Succession
from workers.publisher import LOOK_S, Publisher
from workers.report import report
from workers.settings import Settings
from workers.shm.arena import Arena
from workers.shm.layout import EGRESS_BYTES, INGRESS_BYTES

READ = 1
HEARTBEAT_S = 0.5
CRASHED = 70
MESSAGE_BYTES = 65536
MESSAGE_FDS = 64
PEER_FDS, PEER_FDS_MAX = 7, 8
FINAL_FLUSH_S = 0.2
"""How long resets get to leave after the drain timeout."""

log = logging.getLogger("forwarder.worker")


class Worker:
    """One worker. `boot` is what it was born with."""

    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._loop = gevent.get_hub().loop
        arena = Arena(boot.arena, boot.arena_bytes, INGRESS_BYTES, EGRESS_BYTES)
        memory = Memory(arena, frame.MAX_PAYLOAD_BYTES)
        memory.on_room = self._on_memory
        self._mesh = Mesh(self._loop, memory, boot.arena_bytes)
        own = Generation(boot.base, boot.workers)
        self._context = Context(
            loop=self._loop,
            slot=boot.slot,
            serial=boot.serial,
            boot_id=boot.boot_id,
            own=own,
            home=own,
            settings=boot.settings,
            memory=memory,
            staging=Staging(memory.outbound),
            mesh=self._mesh,
            watch=ResetWatch(self._loop),
            credit=CreditPool(INGRESS_BYTES // boot.workers * 9 // 10),
            roster={boot.slot: boot.serial, **{peer.slot: peer.serial for peer in boot.peers}},
        )
        for peer in boot.peers:
            self._mesh.add_peer(peer)
        self._context.read_inbox = self._on_inbox
        self._succession = Succession(self._context, self._begin, self._take_ports)
        self._set = Tunnels(self._context, boot.inboxes)
        self._tunnels = self._set.ends
        self._mesh.handler = Dispatch(self._context, self._set, self._succession)
        self._opened: dict[int, list[socket.socket]] = {}
        self._done = Event()
        self._drain_deadline_us: int | None = None
        self._retirement: Retirement | None = None
        self._idle = False
        self._waking = False
        self._timers: list[Any] = []
        self._publisher = Publisher(boot, self._context, self._tunnels) if boot.stats >= 0 else None

    # Life

    def run(self) -> None:
        """Serve until told otherwise."""
        self._start_tunnels()
        self._watch(self._boot.channel.fileno(), self._on_message)
        self._watch(self._boot.lifetime, self._on_orphaned)
        self._watch(self._boot.inbox.fileno(), self._on_inbox)
        self._every(TICK_S, self._on_tick)
        self._every(HEARTBEAT_S, self._on_heartbeat)
        if self._publisher is not None:
            self._every(LOOK_S, self._publisher.on_time)
        gc.collect()
        gc.freeze()
        self._send(messages.Ready())
        self._done.wait()
        self._close()

    def _start_tunnels(self) -> None:
        boot = self._boot
        for tunnel in boot.settings.tunnels:
            self._set.start(tunnel, boot.session_ids.get(tunnel.index, 0), boot.listeners[tunnel.index])

    def _watch(self, fd: int, callback: Any) -> None:
        watcher = self._loop.io(fd, READ)
        watcher.start(callback)
        self._timers.append(watcher)

    def _every(self, seconds: float, callback: Any) -> None:
        timer = self._loop.timer(seconds, seconds)
        timer.start(callback)
        self._timers.append(timer)

    def _on_orphaned(self) -> None:
        """The supervisor is gone: applications read a reset, since their sockets carry SO_LINGER 0."""
        os._exit(1)

    def _on_heartbeat(self) -> None:
        beats = self._boot.heartbeat
        beats[self._boot.slot] = (beats[self._boot.slot] + 1) & 0xFFFFFFFFFFFFFFFF

    def _on_tick(self) -> None:
        now_us = clock_us()
        self._set.on_time(now_us)
        self._context.memory.arena.trim(now_us / 1e6)
        if self._retirement is not None:
            if not any(end.has_conversations for end in self._spray_ends()):
                self._succession.hand_on()
            if not any(end.is_busy for end in self._spray_ends()):
                self._succession.let_go()
            if self._retirement.is_over(now_us):
                self._done.set()
        if self._drain_deadline_us is not None and (self._is_drained() or now_us > self._drain_deadline_us):
            self._done.set()

    def _is_drained(self) -> bool:
        """No stream is left here, nor in a worker that may need the stripes of this one."""
        if len(self._context.watch) or any(session.share.streams for session in self._sessions()):
            return False
        self._tell_idle()
        return all(peer.idle for peer in self._mesh.peers.values())

    def _tell_idle(self) -> None:
        if not self._idle:
            self._idle = True
            for peer in self._mesh.peers.values():
                peer.send(mesh.IDLE)

    def _on_memory(self) -> None:
        if not self._waking:
            self._waking = True
            self._loop.run_callback(self._wake_starved)

    def _wake_starved(self) -> None:
        self._waking = False
        for session in self._sessions():
            for stream in session.share.streams.values():
                if stream.readable and not stream.scheduled:
                    session.share.on_readable(stream)
            session.egress.arm()

    def _sessions(self) -> list[Session]:
        return self._set.sessions()

    def _spray_ends(self) -> list[SprayEnd]:
        return self._set.spray_ends()

    def _close(self) -> None:
        """Leave: reset what is unfinished and give the resets a moment to go out."""
        if reset_streams(self._sessions()):
            gevent.sleep(FINAL_FLUSH_S)
        elif self._retirement is not None:
            self._tell_idle()
        while self._on_inbox():
            pass
        if self._publisher is not None:
            self._publisher.publish(clock_us() / 1e6)
        self._set.close()
        self._mesh.flush()
        self._send(messages.Drained())

    # Generations

    def _begin(self) -> None:
        """Nobody older serves."""
        log.debug("in charge slot=%d", self._context.slot)
        for end in self._tunnels.values():
            end.begin()

    def _take_ports(self) -> None:
        for end in self._spray_ends():
            end.take_ports()

    def _retire(self) -> None:
        if self._retirement is None:
            log.info("a newer generation serves slot=%d", self._context.slot)
            self._succession.retire()
            self._retirement = Retirement(self._sessions, self._tunnels.values, self._context.watch, clock_us())
            for end in self._tunnels.values():
                end.retire()
            self._mesh.flush()

    # Supervisor

    def _send(self, message: messages.FromWorker, fds: tuple[int, ...] = ()) -> None:
        try:
            socket.send_fds(self._boot.channel, [msgspec.msgpack.encode(message)], list(fds))
        except OSError as error:
            log.warning("supervisor does not listen reason=%s", error)

    def _on_message(self) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(
                self._boot.channel, MESSAGE_BYTES, MESSAGE_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, fds, flags = b"", [], 0
        if not data:
            self._on_orphaned()
        if flags & socket.MSG_CTRUNC:
            log.critical("no descriptors left for what the supervisor sends slot=%d", self._context.slot)
            os._exit(CRASHED)
        match msgspec.msgpack.decode(data, type=messages.ToWorker):
            case messages.StatusRequest() as request:
                self._report(request)
            case messages.Drain(timeout_s):
                self._drain(timeout_s)
            case messages.Quit():
                self._done.set()
            case messages.Retire():
                self._retire()
            case messages.PeerGone(slot, serial):
                self._on_peer_gone(slot, serial)
            case messages.Opened(index):
                self._opened.setdefault(index, []).extend(socket.socket(fileno=fd) for fd in fds)
            case messages.Reconfigure() as change:
                self._reconfigure(change, fds)
            case messages.PeerJoined(slot, serial):
                self._meet(slot, serial, fds)

    def _meet(self, slot: int, serial: int, fds: list[int]) -> None:
        """Seven descriptors, and perhaps the sending end of its inbox, which the own generation's are known of."""
        assert PEER_FDS <= len(fds) <= PEER_FDS_MAX
        for fd in fds[PEER_FDS:]:
            sender = socket.socket(fileno=fd)
            if self._boot.inboxes.setdefault(slot, sender) is not sender:
                sender.close()
        self._on_peer_joined(PeerFds(slot, serial, fds[0], RingFds(*fds[1:4]), RingFds(*fds[4:7])))

    def _reconfigure(self, change: messages.Reconfigure, fds: list[int]) -> None:
        with open(fds[0], "rb") as file:
            file.seek(0)
            settings = msgspec.msgpack.decode(file.read(), type=Settings)
        logging.getLogger().setLevel(settings.log.level.upper())
        opened, self._opened = self._opened, {}
        self._set.change(settings, change.session_ids, opened, clock_us())
        self._mesh.flush()
        self._send(messages.Reconfigured(change.number))

    def _drain(self, timeout_s: float) -> None:
        self._context.draining = True
        self._drain_deadline_us = clock_us() + int(timeout_s * 1e6)
        for tunnel in self._tunnels.values():
            tunnel.stop_accepting()

    def _on_peer_gone(self, slot: int, serial: int) -> None:
        peer = self._mesh.remove_peer(slot, serial)
        if peer is None:
            return
        self._context.roster.pop(slot, None)
        if not peer.idle:
            self._context.gone.append((slot, serial))
        for session in self._sessions():
            session.on_peer_lost(peer)
        for end in self._spray_ends():
            end.on_peer_lost(peer)
        self._set.on_peer_lost(peer)
        if slot not in self._context.own and slot in self._boot.inboxes:
            self._boot.inboxes.pop(slot).close()
        for fd in _descriptors(peer.fds):
            os.close(fd)
        self._succession.on_peer_lost(peer)

    def _on_peer_joined(self, fds: PeerFds) -> None:
        peer = self._mesh.add_peer(fds)
        self._context.roster[fds.slot] = fds.serial
        self._succession.on_peer_joined(peer)
        self._set.on_peer_joined(peer)
        for session in self._sessions():
            session.on_peer_joined(peer)
        for end in self._spray_ends():
            end.on_peer_joined(peer)

    def _on_inbox(self) -> bool:
        """Take one packet; False if there is none."""
        try:
            data, fds, _, _ = socket.recv_fds(self._boot.inbox, MESSAGE_BYTES, 4)
        except BlockingIOError:
            return False
        received = [socket.socket(fileno=fd) for fd in fds]
        tunnel = self._tunnels.get(HANDOVER.unpack_from(data)[0])
        if len(received) == 1 and isinstance(tunnel, ServerTunnel | SprayServerEnd):
            tunnel.take_over(received[0], data[HANDOVER.size :])
            return True
        for sock in received:
            sock.close()
        return True

    # Status

    def _report(self, request: messages.StatusRequest) -> None:
        """Where descriptors are short there is no answer, and the supervisor says so."""
        try:
            self._send_report(request)
        except OSError as error:
            log.warning("cannot report reason=%s", error)

    def _send_report(self, request: messages.StatusRequest) -> None:
        answer = report(self._context, self._tunnels.values(), counts=request.counts)
        fd = os.memfd_create("forwarder-status", os.MFD_CLOEXEC)
        try:
            with open(os.dup(fd), "wb") as file:
                file.write(msgspec.json.encode(answer))
            self._send(messages.StatusReply(request.request), (fd,))
        finally:
            os.close(fd)


def _descriptors(fds: PeerFds) -> list[int]:
    rings = (fds.to_peer, fds.from_peer)
    return [fds.arena, *(fd for ring in rings for fd in (ring.memory, ring.published, ring.freed))]


class CrashingHub(Hub):
    """An exception that nobody caught is a bug: this worker ends, and another takes its place."""

    def handle_error(self, context: Any, type: Any, value: Any, tb: Any) -> None:
        """Called by gevent for a callback or a greenlet that raised, and for what a resolver thread passes on to its
        caller, such as a name that is not known: `NOT_ERROR`."""
        if issubclass(type, self.NOT_ERROR):
            return
        log.critical("worker crashes", exc_info=(type, value, tb))
        os._exit(CRASHED)


def run(boot: Boot) -> None:
    """The worker's main function, called after the fork; returns when the worker is to exit with code 0."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_IGN)
    set_hub(CrashingHub())
    for sock in (boot.channel, boot.inbox):
        sock.setblocking(False)
    Worker(boot).run()
