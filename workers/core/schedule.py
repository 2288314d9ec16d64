"""Deficit round robin over the streams that have data (Shreedhar and Varghese, 1996), in O(1) a frame."""

from collections import deque
from typing import Generic, Protocol, TypeVar

QUANTUM = 64 << 10


class Scheduled(Protocol):
    """What the scheduler keeps in each of its members."""

    deficit: int
    scheduled: bool


Member = TypeVar("Member", bound=Scheduled)


class DeficitRoundRobin(Generic[Member]):
    """Members take turns of QUANTUM bytes on average.

    A member's debt stays when it leaves, so coming back early gains nothing.
    """

    __slots__ = ("_turn",)

    def __init__(self) -> None:
        self._turn: deque[Member] = deque()

    def __len__(self) -> int:
        return len(self._turn)

    def add(self, member: Member) -> None:
        """Let `member` take part, if it does not yet."""
        if not member.scheduled:
            member.scheduled = True
            member.deficit = min(member.deficit, 0)
            self._turn.append(member)

    def remove(self, member: Member) -> None:
        """`member` has nothing to send now."""
        if member.scheduled:
            member.scheduled = False
            if self._turn and self._turn[0] is member:
                self._turn.popleft()
            else:
                self._turn.remove(member)

    def next(self) -> Member | None:
        """Whose turn it is."""
        turn = self._turn
        while turn:
            member = turn[0]
            if len(turn) == 1:
                member.deficit = max(member.deficit, 1)
            if member.deficit > 0:
                return member
            member.deficit += QUANTUM
            if member.deficit > 0:
                return member
            turn.rotate(-1)
        return None

    def charge(self, member: Member, length: int) -> None:
        """`member` sent `length` bytes; its turn ends when it has used up its quantum."""
        member.deficit -= length
        if member.deficit <= 0 and self._turn and self._turn[0] is member:
            self._turn.rotate(-1)
