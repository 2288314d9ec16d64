"""When a worker whose generation is followed by another may go: nothing of it is missed then.

1. Its streams end; applications and strangers that were there before are served, and have read what came for them.
2. A client's stripes are left as soon as other workers have some; a server's are replaced by its clients, as they were
asked to, and what remains is left when that does not go on. 3. What is still under way to this worker, as a stream that
was just opened to it or sent again, has LINGER_US to arrive.
"""

from collections.abc import Callable, Iterable, Sized
from typing import Protocol

from workers.core import frame
from workers.io.session import Session

MOVE_US, REPLACE_US = 5_000_000, 1_000_000
"""No stripe was replaced for so long: the rest is not, by the clients of a server, or by a client's next workers."""
LINGER_US = 2_000_000
"""More than a few round trips, and what is lost on one stripe was sent on another by then."""


class Retiring(Protocol):
    """A tunnel of a worker on its way out."""

    @property
    def is_busy(self) -> bool:
        """Whether it has anything else to finish than streams."""


class Retirement:
    """`sessions` are the stripe sessions of the worker, `tunnels` all of its tunnels, `connections` those of
    applications and to targets: one may outlast its stream, with bytes that are not read yet."""

    def __init__(
        self,
        sessions: Callable[[], list[Session]],
        tunnels: Callable[[], Iterable[Retiring]],
        connections: Sized,
        now_us: int,
    ) -> None:
        self._sessions = sessions
        self._tunnels = tunnels
        self._connections = connections
        self._busy_us = self._progress_us = now_us
        self._stripes = -1

    def is_over(self, now_us: int) -> bool:
        """Every 100 ms: do what is to be done next; whether the worker may go."""
        sessions = self._sessions()
        stripes = sum(len(session.stripes) for session in sessions)
        if stripes != self._stripes:
            self._stripes, self._progress_us = stripes, now_us
        is_serving = len(self._connections) > 0 or any(session.share.streams for session in sessions)
        if is_serving or any(each.is_busy for each in self._tunnels()):
            self._busy_us = self._progress_us = now_us
            return False
        for session in sessions:
            patience_us = REPLACE_US if _has_others(session) else MOVE_US
            if session.stripes and now_us - self._progress_us > patience_us:
                session.leave_all()
        if stripes or any(len(session.parting) for session in sessions):
            self._busy_us = now_us
            return False
        return now_us - self._busy_us > LINGER_US


def _has_others(session: Session) -> bool:
    """Whether a client's session goes on by other stripes."""
    return session.share.end == frame.CLIENT and session.exchange.up_elsewhere > 0 and not session.exchange.has_guests
