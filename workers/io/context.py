"""What all parts of one worker share."""

import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

from workers.core.credit import CreditPool
from workers.core.handshake import WorkerId
from workers.io.endpoint import ResetWatch
from workers.io.memory import Memory
from workers.io.mesh import Mesh
from workers.io.stripe import Staging
from workers.settings import Settings

TICK_S = 0.1
"""How often every part that has an `on_time` is told the time."""


def clock_us() -> int:
    """Monotonic time in microseconds."""
    return time.monotonic_ns() // 1000


@dataclass(slots=True)
class Context:
    """One worker's identity, memory and event loop.

    roster: slot -> serial of this end's workers, this one included; it changes with the peers.
    gone: the (slot, serial) of workers of this end that died while this one lives, in order.
    """

    loop: Any
    slot: int
    serial: int
    boot_id: int
    workers: int
    settings: Settings
    memory: Memory
    staging: Staging
    mesh: Mesh
    watch: ResetWatch
    credit: CreditPool
    roster: dict[int, int]
    gone: list[tuple[int, int]] = field(default_factory=list)
    draining: bool = False
    sessions: int = 0

    def roster_ids(self) -> tuple[WorkerId, ...]:
        """The roster as handshakes carry it."""
        return tuple(WorkerId(slot, serial) for slot, serial in sorted(self.roster.items()))


def session_number(key_id: str, tunnel: str, session_id: int) -> int:
    """64 bits that name a session within one end: the same at both, and not to be guessed without the session id."""
    text = b"%d\0%s\0%s" % (session_id, key_id.encode(), tunnel.encode())
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
