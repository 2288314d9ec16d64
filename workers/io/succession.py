"""How one generation of workers follows another: who waits for whom.

1. A new worker meets the older ones at its birth. Until each of them retires or is gone, it does nothing that only one
   of them may do: dialling, and reading sockets of datagrams (`Context.in_charge`).
2. Whoever retires tells all (SEATS), stops that at once, and names the new generation `home` for its conversations.
3. A server's spray ports change hands one after the other (RELEASED), and the rest when the older worker has let go of
   all (SEATS) or is gone.
"""

from collections.abc import Callable

from workers.io import mesh
from workers.io.context import Context, Generation
from workers.io.mesh import Descriptor, Peer


class Succession:
    """`begin` is called when this worker comes to be in charge, `take_ports` when nobody older has any ports."""

    def __init__(self, context: Context, begin: Callable[[], None], take_ports: Callable[[], None]) -> None:
        self._context = context
        self._begin = begin
        self._take_ports = take_ports
        self._older = {slot for slot in context.mesh.peers if slot not in context.own}
        self._serving, self._holding = set(self._older), set(self._older)
        self._flags = 0
        context.in_charge = context.has_ports = not self._older
        for peer in context.mesh.peers.values():
            self._tell(peer)

    def _tell(self, peer: Peer) -> None:
        own = self._context.own
        peer.send(mesh.SEATS, flags=self._flags, value=own.base, value2=own.workers)

    def retire(self) -> None:
        """This worker is on its way out."""
        self._context.retiring = True
        self._set(mesh.RETIRING)
        self._find_home()

    def hand_on(self) -> None:
        """The next generation has this worker's conversations."""
        self._set(mesh.HANDED_ON)

    def let_go(self) -> None:
        """This worker has no ports any more."""
        self._set(mesh.LET_GO)

    def _set(self, flag: int) -> None:
        if not self._flags & flag:
            self._flags |= flag
            for peer in self._context.mesh.peers.values():
                self._tell(peer)

    def on_peer_joined(self, peer: Peer) -> None:
        """A new worker, or one in the place of an older one that died."""
        self._tell(peer)
        if peer.slot in self._older:
            if not self._context.in_charge:
                self._serving.add(peer.slot)
            if self._holding:
                self._holding.add(peer.slot)

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker is gone."""
        self._look(serving=peer.slot, holding=peer.slot)
        if self._context.retiring:
            self._find_home()

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """SEATS."""
        flags, base, workers = descriptor[1], descriptor[9], descriptor[10]
        if not 0 < workers <= 128 or base > 127:
            self._context.mesh.dropped_descriptors += 1
            return
        peer.generation, peer.seats = (base, workers), flags
        if self._context.retiring:
            self._find_home()
        retires, has_let_go = flags & mesh.RETIRING, flags & mesh.LET_GO
        self._look(peer.slot if retires else None, peer.slot if has_let_go else None)

    def _look(self, serving: int | None, holding: int | None) -> None:
        """One of the older workers may not serve, or hold ports, any more."""
        if serving in self._serving:
            self._serving.discard(serving)
            if not self._serving:
                self._context.in_charge = True
                self._begin()
        if holding in self._holding:
            self._holding.discard(holding)
            if not self._holding:
                self._context.has_ports = True
                self._take_ports()

    def _find_home(self) -> None:
        for peer in self._context.mesh.peers.values():
            if peer.generation is not None and not peer.is_retiring and peer.slot not in self._context.own:
                self._context.home = Generation(*peer.generation)
                return
