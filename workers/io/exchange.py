"""Frames that cross between the workers of one end, for one session: ours on others' stripes, theirs on ours.

A frame stays in its flow's arena. OUT lends it to the stripes' worker, BOUND brings it back and says which stripe took
it (`workers.io.mesh`). A worker holds few unsent frames of another, so that they are bound to a stripe late.
"""

from collections import deque

from workers.core import frame
from workers.core.pace import FRAME_INITIAL, FRAME_MIN
from workers.core.path import Path
from workers.core.session import Owner, SessionShare
from workers.io import mesh
from workers.io.context import Context, clock_us
from workers.io.mesh import Descriptor, Peer
from workers.io.stripe import Stripe
from workers.settings import StripeTunnel
from workers.shm.arena import Side

HANDED_MIN, HANDED_MAX = 2, 8
HANDED_BYTES = 1 << 20
"""How many frames another worker may hold unsent: one a stripe, at most HANDED_BYTES of them or HANDED_MAX. Enough for
its stripes not to wait for the mesh, few for late binding."""


class RemoteStripes:
    """The stripes of this session that another worker owns. `handed` is the path of frames that it has not sent yet."""

    __slots__ = ("far", "frame_bytes", "handed", "outstanding", "paths", "peer", "rtt_us", "up")

    def __init__(self, peer: Peer, frame_max_bytes: int) -> None:
        self.peer = peer
        self.up = 0
        self.rtt_us = 0
        self.outstanding = 0
        self.far: Owner | None = None
        self.frame_bytes = min(FRAME_INITIAL, frame_max_bytes)
        self.handed = Path(peer.slot, -1, 0)
        self.paths: dict[tuple[int, int], Path] = {}

    @property
    def has_room(self) -> bool:
        """Whether another frame may be handed over."""
        most = max(HANDED_BYTES // self.frame_bytes, HANDED_MAX)
        return self.up > 0 and self.outstanding < min(max(self.up, HANDED_MIN), most)


class Exchange:
    """One session's part of the mesh. `stripes` are this worker's, by index; they belong to the session.

    `last_guest_us` is when they were last of use to another worker.
    """

    def __init__(
        self,
        context: Context,
        tunnel: StripeTunnel,
        share: SessionShare,
        stripes: dict[int, Stripe],
        number: int,
        key: int,
    ) -> None:
        self.guests: deque[tuple[Peer, int, int, int, int, int]] = deque()
        self.last_guest_us = 0
        self._context = context
        self._tunnel = tunnel
        self._share = share
        self._stripes = stripes
        self._number = number
        self._key_index = key
        self._remotes: dict[int, RemoteStripes] = {}
        for peer in context.mesh.peers.values():
            self.remote(peer)

    # Who has stripes

    @property
    def up(self) -> int:
        """Stripes that other workers have up."""
        return sum(remote.up for remote in self._remotes.values())

    @property
    def rtt_us(self) -> int:
        """The longest round trip of other workers' stripes, 0 if there are none."""
        return max((remote.rtt_us for remote in self._remotes.values()), default=0)

    @property
    def far(self) -> Owner | None:
        """A worker of the other end that another worker's stripes lead to."""
        return next((remote.far for remote in self._remotes.values() if remote.far is not None), None)

    def remote(self, peer: Peer) -> RemoteStripes:
        """What is known of a worker's stripes."""
        remote = self._remotes.get(peer.slot)
        if remote is None or remote.peer is not peer:
            remote = self._remotes[peer.slot] = RemoteStripes(peer, self._tunnel.frame_max_bytes)
        return remote

    def tell_all(self, kind: int, **fields: int) -> None:
        """Send every worker a descriptor of this session."""
        for peer in self._context.mesh.peers.values():
            self._tell(peer, kind, **fields)

    def _tell(self, peer: Peer, kind: int, **fields: int) -> None:
        peer.send(kind, tunnel=self._tunnel.index, session=self._number, **fields)

    def tell_carriers(self, peer: Peer, far: Owner | None, rtt_us: int) -> None:
        """Tell a worker how many stripes we have, how long their round trip takes, and where one of them leads."""
        slot, serial, boot_id = far or (0, 0, 0)
        self._tell(
            peer,
            mesh.CARRIERS,
            flow=boot_id,
            offset=rtt_us,
            length=self._key_index,
            carrier=len(self._stripes),
            value=slot << 32 | serial,
        )

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker is dead: its stripes are lost, and nobody waits for its frames."""
        remote = self._remotes.pop(peer.slot, None)
        if remote is not None:
            for path in [remote.handed, *remote.paths.values()]:
                self._share.lose_path(path)
        for guest in [each for each in self.guests if each[0] is peer]:
            self.guests.remove(guest)

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """OUT, BOUND, LOST, STALLED or CARRIERS of this session."""
        kind, _, _, slot, _, flow, offset, length, carrier, value, _ = descriptor
        remote = self.remote(peer)
        if kind == mesh.OUT:
            self.last_guest_us = clock_us()
            self.guests.append((peer, slot, length, flow, offset, value))
        elif kind == mesh.BOUND:
            self._on_bound(remote, descriptor)
        elif kind == mesh.LOST:
            path = remote.paths.pop((carrier, value), None)
            if path is not None:
                self._share.lose_path(path)
        elif kind == mesh.STALLED:
            path = remote.paths.get((carrier, value))
            if path is not None:
                self._share.ack_elsewhere(path)
        else:
            remote.up, remote.rtt_us = carrier, offset if carrier else 0
            remote.far = (value >> 32, value & 0xFFFFFFFF, flow) if carrier else None

    # Ours on others' stripes

    def remote_with_room(self) -> RemoteStripes | None:
        """The worker that holds fewest of our frames, if any takes another."""
        return min(
            (remote for remote in self._remotes.values() if remote.has_room),
            key=lambda each: each.outstanding,
            default=None,
        )

    def give_bytes(self, remote: RemoteStripes, data: bytes, flow: int, offset: int, kind: int) -> bool:
        """Hand over a frame that stands in no slot; False if there is no memory for it."""
        memory = self._context.memory
        slot = memory.copy_in(data, Side.EGRESS)
        if slot < 0:
            memory.starved = True
            return False
        self.give_slot(remote, slot, len(data), flow, offset, kind)
        memory.arena.release(slot)
        return True

    def give_slot(self, remote: RemoteStripes, slot: int, length: int, flow: int, offset: int, kind: int) -> None:
        """Hand over a frame of `length` bytes in one of our slots."""
        self._context.memory.arena.lend(slot, remote.peer.slot)
        remote.outstanding += 1
        self._tell(
            remote.peer,
            mesh.OUT,
            slot=slot,
            flow=flow,
            offset=offset,
            length=length,
            carrier=self._key_index,
            value=kind,
        )

    def _on_bound(self, remote: RemoteStripes, descriptor: Descriptor) -> None:
        """A frame that was handed over was sent on a stripe, or comes back."""
        _, sent, _, slot, _, flow, offset, size, carrier, generation, kind = descriptor
        share = self._share
        remote.outstanding = max(remote.outstanding - 1, 0)
        if not self._context.memory.give_back(slot, remote.peer.slot):
            self._context.mesh.dropped_descriptors += 1
            return
        path = None
        if sent:
            remote.frame_bytes = min(max(size, FRAME_MIN), self._tunnel.frame_max_bytes)
            path = remote.paths.get((carrier, generation))
            if path is None:
                path = remote.paths[carrier, generation] = Path(remote.peer.slot, carrier, generation)
                share.add_path(path)
        if kind == frame.ACK:
            stream = share.streams.get(flow)
            if stream is not None:
                if path is not None:
                    share.on_ack_sent(stream, path)
                else:
                    share.ack_again(stream)
            return
        kept = share.find_kept(flow, kind, offset)
        if kept is None or kept.path is not remote.handed:
            return
        if path is not None:
            share.on_bound(kept, path, clock_us())
        else:
            share.send_again(kept)

    # Theirs on ours

    def send_guest(self, stripe: Stripe) -> None:
        """Send the next frame of another worker's flow on `stripe`."""
        peer, slot, length, flow, offset, kind = self.guests.popleft()
        assert stripe.path is not None
        try:
            view = peer.view(slot, length)
        except ValueError:
            self._context.mesh.dropped_descriptors += 1
            return
        stripe.send(view)
        self._tell(
            peer,
            mesh.BOUND,
            flags=int(not stripe.closed),
            slot=slot,
            flow=flow,
            offset=offset,
            length=stripe.frame_bytes,
            carrier=stripe.index,
            value=stripe.path.generation,
            value2=kind,
        )

    def return_guests(self) -> None:
        """There is no stripe left: the frames of other workers go back to them."""
        while self.guests:
            peer, slot, _, flow, offset, kind = self.guests.popleft()
            self._tell(peer, mesh.BOUND, slot=slot, flow=flow, offset=offset, value2=kind)
