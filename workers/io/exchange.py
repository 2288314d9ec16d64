"""Frames that cross between the workers of one end, for one session: ours on others' stripes, theirs on ours.

A frame stays in its flow's arena. OUT lends it to the stripes' worker, BOUND brings it back and says which stripe took
it (`workers.io.mesh`). A worker holds few unsent frames of another, so that they are bound to a stripe late.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.pace import FRAME_INITIAL, FRAME_MIN
from workers.core.path import Path
from workers.core.session import Owner, SessionShare
from workers.io import mesh
from workers.io.context import Context, clock_us
from workers.io.memory import SCRATCH_BYTES
from workers.io.mesh import Descriptor, Peer
from workers.io.stripe import Stripe
from workers.settings import StripeTunnel
from workers.shm.arena import Side

HANDED_MIN, HANDED_MAX = 2, 8
HANDED_BYTES = 1 << 20
"""How many frames another worker may hold unsent: one a stripe, at most HANDED_BYTES of them or HANDED_MAX. Enough for
its stripes not to wait for the mesh, few for late binding."""
LAG_BYTES = 128 << 10
"""What one worker's streams may have had more, each, than another's, before that counts no more."""


class RemoteStripes:
    """The stripes of this session that another worker owns. `handed` is the path of frames that it has not sent yet.

    `quickest` is that whose round trip is shortest, of those which took frames of ours, and `least_us` that round trip;
    or the worker's own word, where none did.
    """

    __slots__ = (
        "far",
        "frame_bytes",
        "full",
        "handed",
        "least_us",
        "outstanding",
        "paths",
        "peer",
        "quickest",
        "rtt_us",
        "tag",
        "up",
        "usable",
        "virtual",
    )

    def __init__(self, peer: Peer, frame_max_bytes: int) -> None:
        self.peer = peer
        self.up = self.usable = 0
        self.tag = self.virtual = self.least_us = 0
        self.quickest: Path | None = None
        self.rtt_us = 0
        self.outstanding = 0
        self.far: Owner | None = None
        self.full = False
        self.frame_bytes = min(FRAME_INITIAL, frame_max_bytes)
        self.handed = Path(peer.slot, -1, 0)
        self.paths: dict[tuple[int, int], Path] = {}

    def on_time(self) -> None:
        """Every 100 ms: find the quickest of its stripes."""
        known = (path for path in self.paths.values() if path.rtt.srtt_us and not path.stalled)
        self.quickest = min(known, key=lambda path: path.rtt.srtt_us, default=None)
        self.least_us = self.quickest.rtt.srtt_us if self.quickest is not None else self.rtt_us

    @property
    def has_room(self) -> bool:
        """Whether another frame may be handed over."""
        most = max(HANDED_BYTES // self.frame_bytes, HANDED_MAX)
        return self.usable > 0 and self.outstanding < min(max(self.up, HANDED_MIN), most)


class Guest(NamedTuple):
    """A frame of another worker, in a slot of its arena. `virtual`: see `Exchange._virtual_of`.

    `lazy`: nobody waits for it to be bound.
    """

    peer: Peer
    slot: int
    length: int
    flow: int
    offset: int
    kind: int
    virtual: int
    lazy: bool


class Exchange:
    """One session's part of the mesh. `stripes` are this worker's, by index; they belong to the session.

    `last_guest_us` is when they were last of use to another worker. `light_us`, `heavy_us`: when one last told of small
    frames, and of bulk (TRAFFIC); `small_us`: how long the small ones queue in the network, if it knows. `pass_guest`
    sends a frame at once, if it can.
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
        self.guests: deque[Guest] = deque()
        self.small_guests: deque[Guest] = deque()
        self.last_guest_us = self.light_us = self.heavy_us = 0
        self.small_us: int | None = None
        self.pass_guest: Callable[[Guest], bool] = lambda guest: False
        self._context = context
        self.tunnel = tunnel
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
    def up_elsewhere(self) -> int:
        """Those of workers that do not retire."""
        return sum(remote.up for remote in self._remotes.values() if not remote.peer.is_retiring)

    @property
    def usable(self) -> int:
        """Those of them that do not stall."""
        return sum(remote.usable for remote in self._remotes.values())

    @property
    def is_wanted_elsewhere(self) -> bool:
        """Whether a worker that has usable stripes takes applications."""
        return any(each.usable and not (each.full or each.peer.is_retiring) for each in self._remotes.values())

    @property
    def rtt_us(self) -> int:
        """The longest round trip of other workers' stripes, 0 if there are none."""
        return max((remote.rtt_us for remote in self._remotes.values()), default=0)

    def on_time(self) -> None:
        """Every 100 ms."""
        for remote in self._remotes.values():
            remote.on_time()

    @property
    def least_us(self) -> int:
        """The shortest round trip that is known of other workers' stripes, 0 if none is."""
        return min((each.least_us for each in self._remotes.values() if each.usable and each.least_us), default=0)

    @property
    def far(self) -> Owner | None:
        """A worker of the other end that another worker's stripes lead to."""
        return next((remote.far for remote in self._remotes.values() if remote.far is not None), None)

    def remote(self, peer: Peer) -> RemoteStripes:
        """What is known of a worker's stripes."""
        remote = self._remotes.get(peer.slot)
        if remote is None or remote.peer is not peer:
            remote = self._remotes[peer.slot] = RemoteStripes(peer, self.tunnel.frame_max_bytes)
        return remote

    def tell_all(self, kind: int, **fields: int) -> None:
        """Send every worker a descriptor of this session."""
        for peer in self._context.mesh.peers.values():
            self.tell(peer, kind, lazy=False, **fields)

    def tell(self, peer: Peer, kind: int, *, lazy: bool = False, **fields: int) -> None:
        """Send a worker a descriptor of this session, with the fields of `Peer.send`."""
        peer.send(kind, tunnel=self.tunnel.index, session=self._number, lazy=lazy, **fields)

    def tell_carriers(self, peer: Peer, far: Owner | None, rtt_us: int, usable: int, full: bool) -> None:
        """Tell a worker how many stripes we have, how many of them do not stall, how long their round trip takes, where
        one of them leads, and whether we have room for more applications."""
        slot, serial, boot_id = far or (0, 0, 0)
        self.tell(
            peer,
            mesh.CARRIERS,
            flags=full,
            flow=boot_id,
            offset=rtt_us,
            length=self._key_index,
            carrier=len(self._stripes),
            value=slot << 32 | serial,
            value2=usable,
        )

    def tell_traffic(self, light: bool, heavy: bool, small_us: int | None) -> None:
        """Tell every worker what was sent here lately, and how long small frames queue."""
        flags = light * mesh.LIGHT | heavy * mesh.HEAVY | (small_us is not None) * mesh.KNOWN
        self.tell_all(mesh.TRAFFIC, flags=flags, value=small_us or 0)

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker is dead: its stripes are lost, and nobody waits for its frames."""
        remote = self._remotes.pop(peer.slot, None)
        if remote is not None:
            for path in [remote.handed, *remote.paths.values()]:
                self._share.lose_path(path)
        for queue in (self.guests, self.small_guests):
            for guest in [each for each in queue if each.peer is peer]:
                queue.remove(guest)

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """LOST, STALLED, TRAFFIC or CARRIERS of this session."""
        kind, flags, _, _, _, flow, offset, _, carrier, value, value2 = descriptor
        remote = self.remote(peer)
        if kind == mesh.LOST:
            path = remote.paths.pop((carrier, value), None)
            if path is remote.quickest:
                remote.quickest = None
            if path is not None:
                self._share.lose_path(path)
        elif kind == mesh.STALLED:
            path = remote.paths.get((carrier, value))
            if path is not None:
                self._share.on_held_up([path])
        elif kind == mesh.CARRIERS:
            remote.up, remote.usable, remote.rtt_us = carrier, value2, offset if carrier else 0
            remote.far = (value >> 32, value & 0xFFFFFFFF, flow) if carrier else None
            remote.full = bool(flags)
        elif kind == mesh.TRAFFIC:
            if flags & mesh.LIGHT:
                self.light_us = clock_us()
                self.small_us = value if flags & mesh.KNOWN else None
            if flags & mesh.HEAVY:
                self.heavy_us = clock_us()
        else:
            self._context.mesh.dropped_descriptors += 1

    def _virtual_of(self, remote: RemoteStripes, tag: int) -> int:
        """How much each stream of that worker has had, on our scale. Start-time fair queueing (Goyal and others, 1996)
        between its streams and ours: `tag` counts what each of its streams has sent, and only its growth tells, within
        LAG_BYTES of ours."""
        own = self._share.virtual
        grown = remote.virtual + max(tag - remote.tag, 0)
        remote.tag, remote.virtual = tag, min(max(grown, own - LAG_BYTES), own + LAG_BYTES)
        return remote.virtual

    @property
    def has_guests(self) -> bool:
        """Whether any frame of another worker waits."""
        return bool(self.guests or self.small_guests)

    def is_guests_turn(self, virtual: int) -> bool:
        """Whether the streams of the next guest have had less than ours, which have sent `virtual` bytes each; small
        guests go first."""
        return bool(self.small_guests) or self.guests[0].virtual <= virtual

    # Ours on others' stripes

    def is_quicker_busy(self, rtt_us: int) -> bool:
        """Whether a worker whose stripes have a shorter round trip than that will give frames back."""
        return any(each.outstanding and each.usable and each.least_us < rtt_us for each in self._remotes.values())

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

    def give_slot(
        self, remote: RemoteStripes, slot: int, length: int, flow: int, offset: int, kind: int, *, now: bool = False
    ) -> None:
        """Hand over a frame of `length` bytes in one of our slots. `now`: the other worker is told at once."""
        peer = remote.peer
        self._context.memory.arena.lend(slot, peer.slot)
        remote.outstanding += 1
        flags = int(not remote.has_room)
        tunnel, virtual = self.tunnel.index, self._share.virtual
        peer.give((mesh.OUT, flags, tunnel, slot, self._number, flow, offset, length, 0, kind, virtual), now=now)

    def hand_in(self, peer: Peer, slot: int, length: int, origin: int, *, now: bool) -> None:
        """Give a received frame, in one of our slots, to the worker of its flow. `now`: it is told at once."""
        self._context.memory.arena.lend(slot, peer.slot)
        tunnel, key = self.tunnel.index, self._key_index
        peer.give((mesh.IN, 0, tunnel, slot, self._number, 0, 0, length, key, origin, 0), now=now)

    def on_bound(self, peer: Peer, descriptor: Descriptor) -> None:
        """BOUND: a frame that was handed over was sent on a stripe, or comes back."""
        remote = self.remote(peer)
        _, sent, _, slot, _, flow, offset, size, carrier, generation, kind = descriptor
        share = self._share
        remote.outstanding = max(remote.outstanding - 1, 0)
        if not self._context.memory.give_back(slot, remote.peer.slot):
            self._context.mesh.dropped_descriptors += 1
            return
        path = None
        if sent:
            remote.frame_bytes = min(max(size, FRAME_MIN), self.tunnel.frame_max_bytes)
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

    def on_out(self, peer: Peer, descriptor: Descriptor) -> None:
        """OUT: a frame of another worker's."""
        _, flags, _, slot, _, flow, offset, length, _, kind, tag = descriptor
        is_small = length <= SCRATCH_BYTES
        virtual = self._virtual_of(self.remote(peer), tag)
        guest = Guest(peer, slot, length, flow, offset, kind, virtual, is_small and not flags)
        if not is_small or not self.pass_guest(guest):
            (self.small_guests if is_small else self.guests).append(guest)
        self.last_guest_us = clock_us()

    def next_guest(self) -> Guest:
        """The frame of another worker's that is sent next. Precondition: `has_guests`."""
        return (self.small_guests or self.guests).popleft()

    def send_guest(self, guest: Guest, stripe: Stripe, now: bool = False) -> None:
        """Send a frame of another worker's flow on `stripe`. `now`: not only at the next `flush`."""
        peer, slot, length, flow, offset, kind, _, is_lazy = guest
        assert stripe.path is not None
        try:
            view = peer.view(slot, length)
            frame.unpack(view)
        except (ValueError, RemoteProtocolError):
            self._context.mesh.dropped_descriptors += 1
            return
        if now:
            stripe.send_now(view)
        else:
            stripe.send(view)
        self.tell(
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
            lazy=is_lazy,
        )

    def return_guests(self) -> None:
        """There is no stripe left: the frames of other workers go back to them."""
        while self.has_guests:
            peer, slot, _, flow, offset, kind, _, _ = self.next_guest()
            self.tell(peer, mesh.BOUND, slot=slot, flow=flow, offset=offset, value2=kind)
