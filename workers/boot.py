"""What passes between the supervisor and a worker: the start parameters, and messages while it runs.

`Boot` crosses by fork. Messages cross a SOCK_SEQPACKET socket pair, one msgpack value a packet, with descriptors
(SCM_RIGHTS) where a message says so.
"""

import socket
from dataclasses import dataclass, field

import msgspec

from workers.settings import Settings


@dataclass(frozen=True, slots=True)
class RingFds:
    """One direction between two workers: the ring's memfd, the eventfd of new entries, the eventfd of freed ones."""

    memory: int
    published: int
    freed: int


@dataclass(frozen=True, slots=True)
class PeerFds:
    """What a worker needs to meet another: its slot and serial, its arena, the ring to it and the ring from it."""

    slot: int
    serial: int
    arena: int
    to_peer: RingFds
    from_peer: RingFds


@dataclass(frozen=True, slots=True)
class Boot:
    """All that a worker is born with. The worker owns the descriptors; the supervisor's copies stay its own.

    serial: of this process; never used before by this supervisor, starts at random per boot, 32 bits, not 0.
    base: the first slot of this worker's generation, which has the `workers` slots from there on; carriers and
        listening sockets are shared out among these by seat, which is the slot less `base`. Slots outside hold workers
        of an earlier generation, on their way out.
    boot_id: 64 random bits of this supervisor's start.
    session_ids: client only: tunnel index -> 64-bit session id, the same in every worker and after a replacement.
    listeners: tunnel index -> non-blocking sockets. Stripe: listening (client: applications; server: stripes). Spray
        client: this worker's own UDP sockets for applications, one for each address of `local`. Spray server: for each
        carrier in the order of `carriers`, one for each address of `listen`, of a UDP port the UDP socket, of a
        fake-TCP port the listening one; every worker has those of all carriers.
    inboxes: worker slot, of this generation -> the sending end of that worker's SOCK_DGRAM inbox, for handing over
        accepted stripes; `inbox` is the receiving end of this worker's own.
    lifetime: read end of a pipe whose write end only the supervisor holds: readable means that the supervisor is gone.
    stats: memfd of `workers.shm.stats`, of which this worker writes the page of its slot; -1: none.
    heartbeat: a shared memory page of native u64, one per slot; this worker adds 1 to its own every half second.
    """

    slot: int
    workers: int
    serial: int
    boot_id: int
    settings: Settings
    arena: int
    arena_bytes: int
    channel: socket.socket
    inbox: socket.socket
    lifetime: int
    heartbeat: memoryview
    base: int = 0
    stats: int = -1
    inboxes: dict[int, socket.socket] = field(default_factory=dict)
    session_ids: dict[int, int] = field(default_factory=dict)
    listeners: dict[int, list[socket.socket]] = field(default_factory=dict)
    peers: list[PeerFds] = field(default_factory=list)

    @property
    def seat(self) -> int:
        """Which of its generation this worker is."""
        return self.slot - self.base


# worker -> supervisor


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker serves."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker cannot start, and another would not either: the supervisor stops with `code` and this one line."""

    code: int
    message: str


class StatusReply(msgspec.Struct, frozen=True, tag="status_reply"):
    """Comes with one descriptor: a memfd that holds a `WorkerReport` as JSON, from offset 0 to its end."""

    request: int


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """Nothing is left to finish; the worker exits by itself with code 0."""


# supervisor -> worker


class StatusRequest(msgspec.Struct, frozen=True, tag="status"):
    """Answer with StatusReply. counts: with what is open, which takes looking at every object of the process."""

    request: int
    counts: bool = False


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Accept nothing new, finish what is open, exit at the latest after `timeout_s`."""

    timeout_s: float


class Quit(msgspec.Struct, frozen=True, tag="quit"):
    """Close everything and exit now."""


class PeerGone(msgspec.Struct, frozen=True, tag="peer_gone"):
    """That worker is dead and reaped: nobody reads or writes its memory but the receiver of this."""

    slot: int
    serial: int


class PeerJoined(msgspec.Struct, frozen=True, tag="peer_joined"):
    """A new worker in that slot. Comes with seven descriptors: arena, then memory, published, freed of the ring to
    it, then of the ring from it."""

    slot: int
    serial: int


class Retire(msgspec.Struct, frozen=True, tag="retire"):
    """A newer generation serves: accept nothing new, have the other end move its carriers there, finish what is open
    without a deadline (Drain may still set one), then say Drained and exit. The session goes on."""


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """Listening sockets of a tunnel that the next Reconfigure brings, as in `Boot.listeners`, in order; they come as
    descriptors, at most 64 a message. Messages for the same tunnel add up."""

    tunnel: int


class Reconfigure(msgspec.Struct, frozen=True, tag="reconfigure"):
    """New settings. Comes with one descriptor: a memfd that holds the `Settings` in msgpack. Answered by Reconfigured.

    Tunnels are told apart by `index`, which is never used twice: an index that is gone drains for `drain_timeout_s`, an
    index that is new starts, with its listening sockets from Opened and its session id from `session_ids` (client only:
    all tunnels, by index); one that stays takes its new settings for what is opened from now on. A key keeps its place
    in `keys`; one that is no longer valid has `revoked` set.
    """

    number: int
    session_ids: dict[int, int] = {}


class Reconfigured(msgspec.Struct, frozen=True, tag="reconfigured"):
    """The settings of that Reconfigure are in effect."""

    number: int


FromWorker = Ready | Failed | StatusReply | Drained | Reconfigured
ToWorker = StatusRequest | Drain | Quit | PeerGone | PeerJoined | Retire | Opened | Reconfigure
