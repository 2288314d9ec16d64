"""What all parts of one worker share."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from workers.core.credit import CreditPool
from workers.core.handshake import ROSTER_MAX, WorkerId
from workers.io.endpoint import ResetWatch
from workers.io.give_way import GiveWay
from workers.io.memory import Memory
from workers.io.mesh import Mesh
from workers.io.stripe import Staging
from workers.settings import Settings

TICK_S = 0.1
"""How often every part that has an `on_time` is told the time."""


def clock_us() -> int:
    """Monotonic time in microseconds."""
    return time.monotonic_ns() // 1000


class Generation(NamedTuple):
    """Workers that were started together: so many, from slot `base` on."""

    base: int
    workers: int

    def slot_of(self, number: int) -> int:
        """Who of them has what is counted out by seats."""
        return self.base + number % self.workers

    def __contains__(self, slot: object) -> bool:
        return isinstance(slot, int) and 0 <= slot - self.base < self.workers


@dataclass(slots=True)
class Context:
    """One worker's identity, memory and event loop.

    own: its generation, among which carriers and sockets are shared out. home: the one that new conversations belong
    to, which is the next one once this worker retires.
    in_charge: nobody older serves any more, so that this worker dials, and reads what only one may read. has_ports: nor
    has anybody older ports at a server.
    give_way: let whoever was just woken run first.
    read_inbox: take one packet that another worker has sent to this one's inbox; False if there is none.
    roster: slot -> serial of this end's workers, this one included; it changes with the peers.
    gone: the (slot, serial) of workers of this end that died while this one lives, in order; not those that left.
    """

    loop: Any
    slot: int
    serial: int
    boot_id: int
    own: Generation
    home: Generation
    settings: Settings
    memory: Memory
    staging: Staging
    mesh: Mesh
    watch: ResetWatch
    credit: CreditPool
    roster: dict[int, int]
    gone: list[tuple[int, int]] = field(default_factory=list)
    draining: bool = False
    retiring: bool = False
    in_charge: bool = True
    has_ports: bool = True
    sessions: int = 0
    read_inbox: Callable[[], bool] = lambda: False
    give_way: GiveWay = field(default_factory=GiveWay)

    @property
    def seat(self) -> int:
        """Which of its generation this worker is."""
        return self.slot - self.own.base

    @property
    def workers(self) -> int:
        """How many its generation has."""
        return self.own.workers

    @property
    def is_leaving(self) -> bool:
        """Whether this worker takes nothing new."""
        return self.draining or self.retiring

    def roster_ids(self) -> tuple[WorkerId, ...]:
        """The roster as handshakes carry it: where it is too long, without some of other generations."""
        chosen = sorted(self.roster, key=lambda slot: (slot != self.slot, slot not in self.own, slot))[:ROSTER_MAX]
        return tuple(WorkerId(slot, self.roster[slot]) for slot in sorted(chosen))


def session_number(key_id: str, tunnel: str, session_id: int) -> int:
    """64 bits that name a session within one end: the same at both, and not to be guessed without the session id."""
    text = b"%d\0%s\0%s" % (session_id, key_id.encode(), tunnel.encode())
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
