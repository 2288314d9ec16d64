"""Whose turn it is: streams that send little go first, then deficit round robin over all that have data.

Deficit round robin (Shreedhar and Varghese, 1996) costs O(1) a frame. What goes before it is the idea of new flows in
FQ-CoDel (RFC 8290, 4.1): requests and keystrokes are not held up by bulk transfers, and cannot hold these up.
"""

from collections import deque
from typing import Generic, Protocol, TypeVar

QUANTUM = 64 << 10
FEW_LIGHT = 16
"""More at a time are not light: together they are a bulk transfer."""
LIGHT_BYTES, LIGHT_US = 16 << 10, 100_000
"""A stream is light while it sends no more than LIGHT_BYTES in LIGHT_US, and did so on average before."""


class Scheduled(Protocol):
    """What the scheduler keeps in each of its members."""

    deficit: int
    scheduled: bool


Member = TypeVar("Member", bound=Scheduled)


class DeficitRoundRobin(Generic[Member]):
    """Members take turns of QUANTUM bytes on average.

    A member's debt stays when it leaves, so coming back early gains nothing. `members`: in the order of their turns.
    """

    __slots__ = ("members",)

    def __init__(self) -> None:
        self.members: deque[Member] = deque()

    def __len__(self) -> int:
        return len(self.members)

    def add(self, member: Member) -> None:
        """Let `member` take part, if it does not yet."""
        if not member.scheduled:
            member.scheduled = True
            member.deficit = min(member.deficit, 0)
            self.members.append(member)

    def remove(self, member: Member) -> None:
        """`member` has nothing to send now."""
        if member.scheduled:
            member.scheduled = False
            if self.members and self.members[0] is member:
                self.members.popleft()
            else:
                self.members.remove(member)

    def next(self) -> Member | None:
        """Whose turn it is."""
        turn = self.members
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
        if member.deficit <= 0 and self.members and self.members[0] is member:
            self.members.rotate(-1)


class Light(Scheduled, Protocol):
    """What `Turns` keeps in each of its members. `light`: it has its turn among the light ones."""

    light: bool
    light_bytes: int
    light_since_us: int


LightMember = TypeVar("LightMember", bound=Light)


class Turns(Generic[LightMember]):
    """Light members in turn (`light`), and only then the others, by deficit round robin."""

    __slots__ = ("_heavy", "light")

    def __init__(self) -> None:
        self.light: deque[LightMember] = deque()
        self._heavy: DeficitRoundRobin[LightMember] = DeficitRoundRobin()

    def __bool__(self) -> bool:
        return bool(self.light or self._heavy.members)

    @property
    def heavy(self) -> int:
        """How many share what the light ones leave."""
        return len(self._heavy.members)

    @property
    def waiting(self) -> int:
        """How many take part."""
        return len(self.light) + len(self._heavy.members)

    def add(self, member: LightMember, now_us: int) -> None:
        """Let `member` take part, if it does not yet."""
        if member.light or member.scheduled:
            return
        _forget_old(member, now_us)
        if member.light_bytes < LIGHT_BYTES and len(self.light) < FEW_LIGHT:
            member.light = True
            self.light.append(member)
        else:
            self._heavy.add(member)

    def remove(self, member: LightMember) -> None:
        """`member` has nothing to send now."""
        if member.light:
            member.light = False
            if self.light[0] is member:
                self.light.popleft()
            else:
                self.light.remove(member)
        else:
            self._heavy.remove(member)

    def pass_alone(self, member: LightMember, length: int, now_us: int) -> bool:
        """`member` sent `length` bytes while nobody took part; whether it is light."""
        _forget_old(member, now_us)
        member.light_bytes += length
        return member.light_bytes < LIGHT_BYTES

    def next(self) -> LightMember | None:
        """Whose turn it is."""
        return self.light[0] if self.light else self._heavy.next()

    def charge(self, member: LightMember, length: int) -> None:
        """`member` sent `length` bytes."""
        member.light_bytes += length
        if not member.light:
            self._heavy.charge(member, length)
        elif member.light_bytes < LIGHT_BYTES:
            self.light.rotate(-1)
        else:
            self.remove(member)
            self._heavy.add(member)


def _forget_old(member: Light, now_us: int) -> None:
    """Begin a new period if the last is over. Whoever sent much on average is not light at the start of it."""
    elapsed_us = now_us - member.light_since_us
    if elapsed_us >= LIGHT_US:
        was_light = member.light_bytes * LIGHT_US <= LIGHT_BYTES * elapsed_us
        member.light_since_us, member.light_bytes = now_us, 0 if was_light else LIGHT_BYTES
