"""What comes by the mesh finds its session in this worker, or whoever it concerns."""

from typing import Protocol

from workers.change import Tunnels
from workers.io import mesh
from workers.io.context import Context
from workers.io.mesh import Descriptor, Peer
from workers.io.spray_server import SprayServerEnd
from workers.io.succession import Succession


class MeshEnd(Protocol):
    """A session, as the mesh sees it."""

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """One descriptor that names it."""

    def on_turn_end(self) -> None:
        """All descriptors of this turn were handed over."""


class Dispatch:
    """Implements MeshHandler. What names no session that is there goes back to whom it belongs."""

    def __init__(self, context: Context, tunnels: Tunnels, succession: Succession) -> None:
        self._context = context
        self._mesh = context.mesh
        self._set = tunnels
        self._tunnels = tunnels.ends
        self._succession = succession
        self._touched: dict[MeshEnd, None] = {}

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """See MeshHandler."""
        kind, _, tunnel_index, slot, number = descriptor[:5]
        if kind == mesh.FREE:
            if not self._context.memory.give_back(slot, peer.slot):
                self._mesh.dropped_descriptors += 1
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
        elif kind == mesh.BOUND:
            if not self._context.memory.give_back(slot, peer.slot):
                self._mesh.dropped_descriptors += 1
        else:
            self._on_news(peer, descriptor)

    def _on_news(self, peer: Peer, descriptor: Descriptor) -> None:
        """What concerns no session."""
        kind, flags, index = descriptor[:3]
        tunnel = self._tunnels.get(index)
        if kind == mesh.IDLE and flags:
            self._set.on_idle(peer, index)
        elif kind == mesh.IDLE:
            peer.idle = True
        elif kind == mesh.SEATS:
            self._succession.on_descriptor(peer, descriptor)
        elif kind == mesh.STARTED:
            self._set.on_started(peer, index)
        elif kind == mesh.RELEASED and isinstance(tunnel, SprayServerEnd):
            tunnel.on_released(descriptor[9])

    def on_turn_end(self) -> None:
        """See MeshHandler."""
        while self._touched:
            self._touched.popitem()[0].on_turn_end()
