"""A worker process after the fork: build, run, drain, exit.

gevent is imported here and below, never in the supervisor. The data path runs in callbacks of the event loop;
greenlets dial, connect to targets and wait for the end.
"""

import gc
import logging
import os
import signal
import socket
from typing import Any, Protocol

import gevent
import msgspec
from gevent._hub_local import set_hub
from gevent.event import Event
from gevent.hub import Hub

from workers import boot as messages
from workers.boot import Boot, PeerFds, RingFds
from workers.core import frame
from workers.core.credit import CreditPool
from workers.io import mesh
from workers.io.client import ClientTunnel
from workers.io.context import TICK_S, Context, clock_us
from workers.io.endpoint import ResetWatch
from workers.io.memory import Memory
from workers.io.mesh import Descriptor, Mesh, Peer
from workers.io.server import HANDOVER, ServerTunnel
from workers.io.session import Session
from workers.io.spray_server import SprayServerEnd
from workers.io.spray_tunnels import SprayEnd, start_spray_tunnels
from workers.io.stripe import Staging
from workers.shm.arena import Arena, Side
from workers.shm.layout import EGRESS_BYTES, INGRESS_BYTES
from workers.status import TunnelStatus, WorkerReport, WorkerStatus

READ = 1
HEARTBEAT_S = 0.5
CRASHED = 70
MESSAGE_BYTES = 65536
PEER_FDS = 7
FINAL_FLUSH_S = 0.2
"""How long resets get to leave after the drain timeout."""

log = logging.getLogger("forwarder.worker")


class MeshEnd(Protocol):
    """A session, as the mesh sees it."""

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """One descriptor that names it."""

    def on_turn_end(self) -> None:
        """All descriptors of this turn were handed over."""


class Worker:
    """One worker. `boot` is what it was born with."""

    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._loop = gevent.get_hub().loop
        settings = boot.settings
        arena = Arena(boot.arena, boot.arena_bytes, INGRESS_BYTES, EGRESS_BYTES)
        memory = Memory(arena, frame.MAX_PAYLOAD_BYTES)
        memory.on_room = self._on_memory
        self._mesh = Mesh(self._loop, memory, boot.arena_bytes)
        self._mesh.handler = self
        self._context = Context(
            loop=self._loop,
            slot=boot.slot,
            serial=boot.serial,
            boot_id=boot.boot_id,
            workers=boot.workers,
            settings=settings,
            memory=memory,
            staging=Staging(memory.outbound),
            mesh=self._mesh,
            watch=ResetWatch(self._loop),
            credit=CreditPool(INGRESS_BYTES // boot.workers * 9 // 10),
            roster={boot.slot: boot.serial, **{peer.slot: peer.serial for peer in boot.peers}},
        )
        for peer in boot.peers:
            self._mesh.add_peer(peer)
        self._tunnels: dict[int, ClientTunnel | ServerTunnel | SprayEnd] = {}
        self._touched: dict[MeshEnd, None] = {}
        self._done = Event()
        self._drain_deadline_us: int | None = None
        self._idle = False
        self._waking = False
        self._timers: list[Any] = []

    # Life

    def run(self) -> None:
        """Serve until told otherwise."""
        self._start_tunnels()
        self._watch(self._boot.channel.fileno(), self._on_message)
        self._watch(self._boot.lifetime, self._on_orphaned)
        self._watch(self._boot.inbox.fileno(), self._on_inbox)
        self._every(TICK_S, self._on_tick)
        self._every(HEARTBEAT_S, self._on_heartbeat)
        gc.collect()
        gc.freeze()
        self._send(messages.Ready())
        self._done.wait()
        self._close()

    def _start_tunnels(self) -> None:
        boot = self._boot
        for tunnel in boot.settings.client_tunnels:
            self._tunnels[tunnel.index] = ClientTunnel(
                self._context,
                tunnel,
                boot.settings.keys[0],
                boot.session_ids[tunnel.index],
                boot.listeners[tunnel.index],
            )
        for server in boot.settings.server_tunnels:
            self._tunnels[server.index] = ServerTunnel(
                self._context, server, boot.listeners[server.index], boot.inboxes
            )
        self._tunnels.update(start_spray_tunnels(self._context, boot))

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
        for tunnel in self._tunnels.values():
            tunnel.on_time(now_us)
        self._context.memory.arena.trim(now_us / 1e6)
        if self._drain_deadline_us is not None and (self._is_drained() or now_us > self._drain_deadline_us):
            self._done.set()

    def _is_drained(self) -> bool:
        """No stream is left here, nor in a worker that may need the stripes of this one."""
        if len(self._context.watch) or any(session.share.streams for session in self._sessions()):
            return False
        peers = self._mesh.peers.values()
        if not self._idle:
            self._idle = True
            for peer in peers:
                peer.send(mesh.IDLE)
        return all(peer.idle for peer in peers)

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
        return [session for tunnel in self._stripe_tunnels() for session in tunnel.sessions()]

    def _stripe_tunnels(self) -> list[ClientTunnel | ServerTunnel]:
        return [tunnel for tunnel in self._tunnels.values() if isinstance(tunnel, ClientTunnel | ServerTunnel)]

    def _spray_ends(self) -> list[SprayEnd]:
        return [tunnel for tunnel in self._tunnels.values() if isinstance(tunnel, SprayEnd)]

    def _close(self) -> None:
        """Leave: reset what is unfinished and give the resets a moment to go out."""
        unfinished = False
        for session in self._sessions():
            for stream in list(session.share.streams.values()):
                unfinished = True
                session.share.reset_stream(stream, frame.Reason.SHUTDOWN)
            session.egress.pump()
        if unfinished:
            gevent.sleep(FINAL_FLUSH_S)
        for tunnel in self._tunnels.values():
            tunnel.close()
        self._mesh.flush()
        self._send(messages.Drained())

    # Supervisor

    def _send(self, message: messages.FromWorker, fds: tuple[int, ...] = ()) -> None:
        try:
            socket.send_fds(self._boot.channel, [msgspec.msgpack.encode(message)], list(fds))
        except OSError as error:
            log.warning("supervisor does not listen reason=%s", error)

    def _on_message(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._boot.channel, MESSAGE_BYTES, 16)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._on_orphaned()
        message = msgspec.msgpack.decode(data, type=messages.ToWorker)
        if isinstance(message, messages.StatusRequest):
            self._report(message)
        elif isinstance(message, messages.Drain):
            self._drain(message.timeout_s)
        elif isinstance(message, messages.Quit):
            self._done.set()
        elif isinstance(message, messages.PeerGone):
            self._on_peer_gone(message.slot, message.serial)
        elif len(fds) != PEER_FDS:
            log.critical("no descriptors left to meet a worker slot=%d", message.slot)
            os._exit(CRASHED)
        else:
            to_peer, from_peer = RingFds(*fds[1:4]), RingFds(*fds[4:7])
            self._on_peer_joined(PeerFds(message.slot, message.serial, fds[0], to_peer, from_peer))

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
        self._context.gone.append((slot, serial))
        for session in self._sessions():
            session.on_peer_lost(peer)
        for end in self._spray_ends():
            end.on_peer_lost(peer)
        for fd in _descriptors(peer.fds):
            os.close(fd)

    def _on_peer_joined(self, fds: PeerFds) -> None:
        peer = self._mesh.add_peer(fds)
        self._context.roster[fds.slot] = fds.serial
        for session in self._sessions():
            session.on_peer_joined(peer)
        for end in self._spray_ends():
            end.on_peer_joined(peer)

    def _on_inbox(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._boot.inbox, MESSAGE_BYTES, 4)
        except BlockingIOError:
            return
        received = [socket.socket(fileno=fd) for fd in fds]
        tunnel = self._tunnels.get(HANDOVER.unpack_from(data)[0])
        if len(received) == 1 and isinstance(tunnel, ServerTunnel | SprayServerEnd):
            tunnel.take_over(received[0], data[HANDOVER.size :])
            return
        for sock in received:
            sock.close()

    # Mesh

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """See MeshHandler."""
        kind, _, tunnel_index, slot, number = descriptor[:5]
        if kind == mesh.FREE:
            if not self._context.memory.give_back(slot, peer.slot):
                self._mesh.dropped_descriptors += 1
            return
        if kind == mesh.IDLE:
            peer.idle = True
            return
        tunnel = self._tunnels.get(tunnel_index)
        session: MeshEnd | None = tunnel.find(number) if tunnel is not None else None
        if session is None and tunnel is not None and kind in (mesh.CARRIERS, mesh.IN):
            session = tunnel.create(number, descriptor[7] if kind == mesh.CARRIERS else descriptor[8])
        if session is not None:
            self._touched[session] = None
            session.on_descriptor(peer, descriptor)
        elif kind == mesh.IN:
            peer.return_slot(slot)
        elif kind == mesh.OUT:
            _, _, _, _, _, flow, offset, _, _, value, _ = descriptor
            peer.send(
                mesh.BOUND, tunnel=tunnel_index, slot=slot, session=number, flow=flow, offset=offset, value2=value
            )
        elif kind == mesh.BOUND and not self._context.memory.give_back(slot, peer.slot):
            self._mesh.dropped_descriptors += 1

    def on_turn_end(self) -> None:
        """See MeshHandler."""
        while self._touched:
            self._touched.popitem()[0].on_turn_end()

    # Status

    def _report(self, request: messages.StatusRequest) -> None:
        """Where descriptors are short there is no answer, and the supervisor says so."""
        try:
            self._send_report(request)
        except OSError as error:
            log.warning("cannot report reason=%s", error)

    def _send_report(self, request: messages.StatusRequest) -> None:
        now_us = clock_us()
        tunnels = [tunnel.status(now_us) for tunnel in self._tunnels.values()]
        counts = self._count_open() if request.counts else {}
        report = WorkerReport(worker=self._status(tunnels), tunnels=tunnels, open=counts)
        fd = os.memfd_create("forwarder-status", os.MFD_CLOEXEC)
        try:
            with open(os.dup(fd), "wb") as file:
                file.write(msgspec.json.encode(report))
            self._send(messages.StatusReply(request.request), (fd,))
        finally:
            os.close(fd)

    def _status(self, tunnels: list[TunnelStatus]) -> WorkerStatus:
        boot, arena = self._boot, self._context.memory.arena
        return WorkerStatus(
            id=boot.slot,
            serial=boot.serial,
            pid=os.getpid(),
            state="draining" if self._context.draining else "up",
            streams=sum(tunnel.flows_open for tunnel in tunnels if tunnel.mode == "stripe"),
            conversations=sum(tunnel.flows_open for tunnel in tunnels if tunnel.mode == "spray"),
            carriers=sum(len(session.carriers) for tunnel in tunnels for session in tunnel.sessions),
            restarts=0,
            arena_used_bytes=arena.used_bytes(Side.INGRESS) + arena.used_bytes(Side.EGRESS),
            arena_bytes=INGRESS_BYTES + EGRESS_BYTES,
        )

    def _count_open(self) -> dict[str, int]:
        context = self._context
        counts = {
            "descriptors": len(os.listdir("/proc/self/fd")) - 1,
            "watchers": self._loop.activecnt,
            "greenlets": sum(isinstance(each, gevent.Greenlet) and not each.dead for each in gc.get_objects()),
            "slots": context.memory.arena.slots_in_use,
            "slots_lent": context.memory.arena.slots_lent,
            "credit_reserved_bytes": context.credit.reserved,
            "endpoints": len(context.watch),
            "dropped_frames": context.memory.dropped_frames,
            "dropped_descriptors": self._mesh.dropped_descriptors,
        }
        for tunnel in self._tunnels.values():
            for name, value in tunnel.count_open().items():
                counts[name] = counts.get(name, 0) + value
        return counts


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
