"""The tunnels of one worker, and how they change while it runs: new ones start, others take new settings or go.

A tunnel that goes accepts nothing more. A spray tunnel's carriers close at once. A stripe tunnel's stripes stay as long
as any worker needs them (IDLE of that tunnel), its streams until they have ended or the deadline resets them.
"""

import logging
import socket
from collections.abc import Iterable

from workers.core import frame
from workers.io import mesh
from workers.io.client import ClientTunnel
from workers.io.context import Context
from workers.io.mesh import Peer
from workers.io.server import ServerTunnel
from workers.io.session import Session
from workers.io.spray_tunnels import SprayEnd, SprayMaker
from workers.settings import (
    Settings,
    SprayClientTunnel,
    SprayServerTunnel,
    StripeClientTunnel,
    StripeServerTunnel,
    Tunnel,
)

FINAL_FLUSH_US = 200_000
"""How long resets get to leave after the deadline."""

End = ClientTunnel | ServerTunnel | SprayEnd

log = logging.getLogger("forwarder.worker")


class Departure:
    """A stripe tunnel on its way out. `idle`: the slots of workers without streams in it."""

    def __init__(self, end: ClientTunnel | ServerTunnel, deadline_us: int) -> None:
        self.end = end
        self.deadline_us = deadline_us
        self.idle: set[int] = set()
        self.told = self.resetting = False

    @property
    def is_busy(self) -> bool:
        """Whether there are streams here, or somebody waits for one."""
        return self.end.is_busy or any(session.share.streams for session in self.end.sessions())


class Tunnels:
    """`ends` by index, those on their way out included. `inboxes`: to other workers, by slot."""

    def __init__(self, context: Context, inboxes: dict[int, socket.socket]) -> None:
        self.ends: dict[int, End] = {}
        self._context = context
        self._inboxes = inboxes
        self._spray = SprayMaker(context, inboxes)
        self._departures: dict[int, Departure] = {}
        self._early: dict[int, set[int]] = {}

    # What there is

    def stripe_ends(self) -> list[ClientTunnel | ServerTunnel]:
        """Those of mode stripe."""
        return [end for end in self.ends.values() if isinstance(end, ClientTunnel | ServerTunnel)]

    def spray_ends(self) -> list[SprayEnd]:
        """Those of mode spray."""
        return [end for end in self.ends.values() if isinstance(end, SprayEnd)]

    def sessions(self) -> list[Session]:
        """The stripe sessions of all tunnels."""
        return [session for end in self.stripe_ends() for session in end.sessions()]

    # Changes

    def start(self, tunnel: Tunnel, session_id: int, listeners: list[socket.socket]) -> None:
        """A tunnel begins. `session_id`: at a client."""
        context = self._context
        if isinstance(tunnel, StripeClientTunnel):
            self.ends[tunnel.index] = ClientTunnel(context, tunnel, context.settings.keys[0], session_id, listeners)
        elif isinstance(tunnel, StripeServerTunnel):
            self.ends[tunnel.index] = ServerTunnel(context, tunnel, listeners, self._inboxes)
        elif isinstance(tunnel, SprayClientTunnel):
            self.ends[tunnel.index] = self._spray.client(tunnel, session_id, listeners)
        else:
            assert isinstance(tunnel, SprayServerTunnel)
            self.ends[tunnel.index] = self._spray.server(tunnel, listeners)

    def change(
        self, settings: Settings, session_ids: dict[int, int], opened: dict[int, list[socket.socket]], now_us: int
    ) -> None:
        """Make this the settings that are in effect. What is `opened` and of no use is closed."""
        context = self._context
        context.settings = settings
        wanted = {tunnel.index: tunnel for tunnel in settings.tunnels}
        for index in [index for index in self.ends if index not in wanted]:
            self._depart(index, now_us + int(settings.drain_timeout_s * 1e6))
        for index, tunnel in wanted.items():
            if index in self.ends:
                if index not in self._departures:
                    self._update(self.ends[index], tunnel, opened.pop(index, []))
            elif not context.is_leaving:
                self.start(tunnel, session_ids.get(index, 0), opened.pop(index, []))
                self._ask(index)
        for sockets in opened.values():
            for sock in sockets:
                sock.close()

    def _ask(self, index: int) -> None:
        """Others may have begun before, and told us what we could not understand yet."""
        for peer in self._context.mesh.peers.values():
            peer.send(mesh.STARTED, tunnel=index)

    def on_started(self, peer: Peer, index: int) -> None:
        """STARTED: the peer has to learn what a new worker has to learn."""
        end = self.ends.get(index)
        if isinstance(end, SprayEnd):
            end.on_peer_joined(peer)
        elif end is not None:
            for session in end.sessions():
                session.on_peer_joined(peer)

    def _update(self, end: End, tunnel: Tunnel, listeners: list[socket.socket]) -> None:
        if self._context.is_leaving:
            for sock in listeners:
                sock.close()
            listeners = []
        if isinstance(end, ClientTunnel) and isinstance(tunnel, StripeClientTunnel):
            end.update(tunnel, self._context.settings.keys[0], listeners)
        elif isinstance(end, ServerTunnel) and isinstance(tunnel, StripeServerTunnel):
            end.update(tunnel, listeners)
        elif isinstance(end, SprayEnd):
            end.use_key()
            for sock in listeners:
                sock.close()

    # Tunnels that go

    def _depart(self, index: int, deadline_us: int) -> None:
        end = self.ends[index]
        log.info("tunnel ends tunnel=%s", end.name)
        if isinstance(end, SprayEnd):
            end.close()
            del self.ends[index]
        elif index not in self._departures:
            end.depart()
            departure = self._departures[index] = Departure(end, deadline_us)
            departure.idle = self._early.pop(index, set())

    def on_idle(self, peer: Peer, index: int) -> None:
        """IDLE of one tunnel, which that worker may have heard of first that it goes."""
        departure = self._departures.get(index)
        if departure is not None:
            departure.idle.add(peer.slot)
        elif index in self.ends:
            self._early.setdefault(index, set()).add(peer.slot)

    def on_peer_joined(self, peer: Peer) -> None:
        """A new worker, which has nothing of tunnels that go."""
        for departure in self._departures.values():
            departure.idle.add(peer.slot)

    def on_peer_lost(self, peer: Peer) -> None:
        """Another process in that slot has not said that it is idle."""
        for idle in (*(each.idle for each in self._departures.values()), *self._early.values()):
            idle.discard(peer.slot)

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        for end in list(self.ends.values()):
            end.on_time(now_us)
        for index, departure in list(self._departures.items()):
            if self._is_gone(index, departure, now_us):
                departure.end.close()
                del self.ends[index], self._departures[index]

    def _is_gone(self, index: int, departure: Departure, now_us: int) -> bool:
        if departure.resetting:
            return now_us >= departure.deadline_us
        if not departure.is_busy:
            if not departure.told:
                departure.told = True
                for peer in self._context.mesh.peers.values():
                    peer.send(mesh.IDLE, flags=1, tunnel=index)
            if departure.idle.issuperset(self._context.mesh.peers):
                return True
        if now_us >= departure.deadline_us:
            departure.resetting, departure.deadline_us = True, now_us + FINAL_FLUSH_US
            reset_streams(departure.end.sessions())
        return False

    def close(self) -> None:
        """Give everything up."""
        for end in self.ends.values():
            end.close()


def reset_streams(sessions: Iterable[Session]) -> bool:
    """Reset what is unfinished; whether anything was."""
    unfinished = False
    for session in sessions:
        for stream in list(session.share.streams.values()):
            unfinished = True
            session.share.reset_stream(stream, frame.Reason.SHUTDOWN)
        session.egress.pump()
    return unfinished
