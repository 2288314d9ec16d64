"""Datagrams that are too long for one record: split by their sender, put together again by their receiver.

The pieces are FRAGMENTs of `core.inner`: each names its datagram by a number of 32 bits that wraps and begins anywhere,
and says which of how many pieces it is. On top of what is rejected there, a piece is rejected that has another count
than the one before it, or makes its datagram longer than MAX_DATAGRAM_BYTES: it is counted and ignored.

A datagram that misses a piece is given up after TIMEOUT_US, or earlier, oldest first, where more are under way than a
conversation or a worker may hold.
"""

from collections import OrderedDict

from workers.core.deduplicate import SequenceWindow
from workers.core.inner import FRAGMENT_HEAD, Bytes, Fragment, pack_fragment

HEADER_BYTES = FRAGMENT_HEAD.size
MAX_COUNT = 255
MAX_DATAGRAM_BYTES = 65_535
"""More than any UDP datagram carries."""

TIMEOUT_US = 1_000_000
MAX_DATAGRAMS = 256
"""Incomplete ones of one conversation."""
CONVERSATION_BYTES = 2 << 20
"""What the incomplete ones of one conversation may hold: 32 of the longest, less their pieces' cost."""
TOTAL_BYTES = 16 << 20
MAX_FLOWS = 16_384
"""Conversations with a memory of what is complete, some 10 MB: a late piece makes one that nobody forgets."""
PIECE_COST = 128
"""What a piece, and a datagram itself, counts for beside its payload, so that tiny pieces are bounded, too."""


def split(conversation: int, datagram: int, payload: Bytes, room: int) -> list[bytes]:
    """The FRAGMENT inners, each of `room` bytes or less, that `payload` goes in: all of one size, the last may be less.

    A payload that one inner would take goes in two. Empty where it takes more than MAX_COUNT, or has less than 2 bytes.
    """
    length, most = len(payload), room - HEADER_BYTES
    if length < 2 or most < 1 or length > MAX_COUNT * most:
        return []
    size = -(-length // max(2, -(-length // most)))
    starts, view = range(0, length, size), memoryview(payload)
    return [
        pack_fragment(conversation, Fragment(datagram, index, len(starts), bytes(view[start : start + size])))
        for index, start in enumerate(starts)
    ]


class _Partial:
    """A datagram of which pieces are missing."""

    __slots__ = ("cost", "datagram", "flow", "length", "missing", "pieces", "since_us")

    def __init__(self, flow: "_Flow", datagram: int, count: int, now_us: int) -> None:
        self.flow, self.datagram, self.since_us = flow, datagram, now_us
        self.pieces: list[bytes | None] = [None] * count
        self.missing = count
        self.length = 0
        self.cost = PIECE_COST


class _Flow:
    """What is under way in one conversation, the oldest first, and which datagrams are complete."""

    __slots__ = ("complete", "cost", "partials")

    def __init__(self) -> None:
        self.partials: OrderedDict[int, _Partial] = OrderedDict()
        self.complete = SequenceWindow()
        self.cost = 0


class Reassembler:
    """The split datagrams of all conversations that one worker receives.

    Invariant: `_partials` holds the partials of all flows in the order in which they began, and `held_bytes` is the sum
    of their costs.
    completed, expired (timed out), evicted (no room), repeated (pieces that came again) and rejected (pieces) count.
    """

    __slots__ = (
        "_flows",
        "_partials",
        "_total_bytes",
        "completed",
        "evicted",
        "expired",
        "held_bytes",
        "rejected",
        "repeated",
    )

    def __init__(self, total_bytes: int = TOTAL_BYTES) -> None:
        self._total_bytes = total_bytes
        self._flows: OrderedDict[int, _Flow] = OrderedDict()
        self._partials: OrderedDict[_Partial, None] = OrderedDict()
        self.held_bytes = 0
        self.completed = self.expired = self.evicted = self.repeated = self.rejected = 0

    def __len__(self) -> int:
        """How many datagrams are incomplete."""
        return len(self._partials)

    def receive(self, key: int, fragment: Fragment, now_us: int) -> bytes | None:
        """Take a well-formed piece; the datagram that it completes, if any.

        key: the caller's name of the conversation, which is open: `forget` ends it.
        """
        self.expire(now_us)
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow()
            while len(self._flows) > MAX_FLOWS:
                self.forget(next(iter(self._flows)))
        else:
            self._flows.move_to_end(key)
        datagram, index, count, payload = fragment
        partial = flow.partials.get(datagram)
        if partial is None:
            if flow.complete.has(datagram):
                self.repeated += 1
                return None
            partial = self._begin(flow, datagram, count, now_us)
        return self._add(partial, index, count, payload)

    def _begin(self, flow: _Flow, datagram: int, count: int, now_us: int) -> _Partial:
        if len(flow.partials) >= MAX_DATAGRAMS:
            self._evict(next(iter(flow.partials.values())))
        partial = flow.partials[datagram] = _Partial(flow, datagram, count, now_us)
        self._partials[partial] = None
        self._charge(partial, partial.cost)
        return partial

    def _add(self, partial: _Partial, index: int, count: int, payload: bytes) -> bytes | None:
        pieces, size = partial.pieces, len(payload)
        if count != len(pieces) or partial.length + size > MAX_DATAGRAM_BYTES:
            self.rejected += 1
            return None
        if pieces[index] is not None:
            self.repeated += 1
            return None
        pieces[index] = payload
        partial.length += size
        partial.missing -= 1
        if not partial.missing:
            return self._complete(partial)
        partial.cost += size + PIECE_COST
        self._charge(partial, size + PIECE_COST)
        return None

    def _complete(self, partial: _Partial) -> bytes:
        self._drop(partial)
        partial.flow.complete.admit(partial.datagram)
        self.completed += 1
        return b"".join([piece for piece in partial.pieces if piece is not None])

    def _charge(self, partial: _Partial, cost: int) -> None:
        """Count what `partial` has grown by; the oldest make room for it, in its conversation first."""
        flow = partial.flow
        flow.cost += cost
        self.held_bytes += cost
        while flow.cost > CONVERSATION_BYTES:
            self._evict(next(iter(flow.partials.values())))
        while self.held_bytes > self._total_bytes:
            self._evict(next(iter(self._partials)))

    def _evict(self, partial: _Partial) -> None:
        self._drop(partial)
        self.evicted += 1

    def _drop(self, partial: _Partial) -> None:
        flow = partial.flow
        del flow.partials[partial.datagram], self._partials[partial]
        flow.cost -= partial.cost
        self.held_bytes -= partial.cost

    def next_expiry_us(self) -> int | None:
        """When the oldest incomplete datagram is to be given up."""
        return next(iter(self._partials)).since_us + TIMEOUT_US if self._partials else None

    def expire(self, now_us: int) -> None:
        """Give up what misses a piece for too long."""
        partials = self._partials
        while partials:
            oldest = next(iter(partials))
            if now_us - oldest.since_us < TIMEOUT_US:
                break
            self._drop(oldest)
            self.expired += 1

    def forget(self, key: int) -> None:
        """That conversation is closed: drop all that is kept of it, if anything."""
        flow = self._flows.pop(key, None)
        if flow is not None:
            for partial in list(flow.partials.values()):
                self._drop(partial)
