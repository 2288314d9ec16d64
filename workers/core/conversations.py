"""The conversations of one worker, by the source address that they stand for and by the number that names them.

1. A datagram comes: `by_source` (at the end that opens) or `by_id` (at both) finds its conversation. If there is none,
   `open` makes one with a number of its own choice, `accept` one that the other end has named.
2. Whoever moves its traffic, in either direction, stores the time in `touched_us`. That is all a datagram costs here.
3. `expire` closes what was not touched for the table's duration, `close` closes one now, and where there are too many,
   a new one closes the one idle longest. `on_close` is told of each, once, after it has left the table.

Expiry is a lazy timing wheel. Invariant: each conversation stands in exactly one bucket, of a tick that is not past the
one in which it would expire; it may have been touched since. A bucket is looked at when its tick has come, and what was
touched moves to the tick that its last touch asks for. So each is looked at about once in a duration, and closes at
most a tick, 1/64 of the duration, late. A bucket goes from the earliest put there to the latest.

A number is 32 bits: slot of the worker that opened (8), counter (24). A caller that has several peers puts what tells
them apart above those 32 bits.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import Generic, TypeVar

State = TypeVar("State")

COUNTER_BITS = 24
MAX_CONVERSATIONS = 1 << (COUNTER_BITS - 1)
TICKS = 64
"""Ticks in the duration."""
KEEP_US = 1_000_000
"""Idle for less, a conversation is not closed for a new one: a flood of new sources takes nobody's place."""
LOOKS = 64
"""So many conversations at most are looked at to find the one idle longest: some 30 us."""

_COUNTERS = (1 << COUNTER_BITS) - 1


class Conversation(Generic[State]):
    """One source of datagrams.

    key: its source address in the form that the table's owner uses, b"" where it has none. state: what the owner keeps
    of it. touched_us: stored with each run of its traffic.
    """

    __slots__ = ("_tick", "id", "key", "state", "touched_us")

    def __init__(self, number: int, key: bytes, state: State, now_us: int) -> None:
        self.id, self.key, self.state = number, key, state
        self.touched_us = now_us
        self._tick = 0


class Conversations(Generic[State]):
    """The table. Lookups are those of a dict; the rest is O(1) amortised, and bounded for any one call.

    by_source, by_id: the conversation, or None. opened, of them inherited (which another worker has counted, too),
    expired, evicted (closed for a new one) and refused (there were too many, all busy) count.
    """

    __slots__ = (
        "_buckets",
        "_by_id",
        "_by_source",
        "_counter",
        "_duration_us",
        "_most",
        "_on_close",
        "_slot",
        "_tick_us",
        "_ticks",
        "by_id",
        "by_source",
        "evicted",
        "expired",
        "inherited",
        "opened",
        "refused",
    )

    def __init__(
        self, slot: int, first: int, most: int, duration_us: int, on_close: Callable[[Conversation[State]], None]
    ) -> None:
        """The table of worker `slot` (0..255).

        first: random bits, where the counter begins. most: at a time, 1..MAX_CONVERSATIONS. on_close: it may
        close others, but not open any.
        """
        assert 0 <= slot < 256 and 0 < most <= MAX_CONVERSATIONS and duration_us > 0
        self._slot, self._most, self._duration_us, self._on_close = slot, most, duration_us, on_close
        self._counter = first & _COUNTERS
        self._by_id: dict[int, Conversation[State]] = {}
        self._by_source: dict[bytes, Conversation[State]] = {}
        self.by_id: Callable[[int], Conversation[State] | None] = self._by_id.get
        self.by_source: Callable[[bytes], Conversation[State] | None] = self._by_source.get
        self._tick_us = max(1, duration_us // TICKS)
        self._buckets: dict[int, OrderedDict[int, Conversation[State]]] = {}
        self._ticks: list[int] = []  # the keys of the buckets, a heap
        self.opened = self.inherited = self.expired = self.evicted = self.refused = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Conversation[State]]:
        """Those open when the iteration began."""
        return iter(list(self._by_id.values()))

    def open(self, key: bytes, state: State, now_us: int) -> Conversation[State] | None:
        """A new conversation of source `key`, which has none; None where there are too many, all busy."""
        assert key and key not in self._by_source
        slot, counter = self._slot << COUNTER_BITS, self._counter
        while slot | counter in self._by_id:
            counter = (counter + 1) & _COUNTERS
        self._counter = (counter + 1) & _COUNTERS
        conversation = self._add(slot | counter, key, state, now_us)
        if conversation is not None:
            self._by_source[key] = conversation
        return conversation

    def accept(self, number: int, state: State, now_us: int, *, inherited: bool = False) -> Conversation[State] | None:
        """The conversation that the other end has named `number`, which is not open; None as for `open`. `inherited`:
        from another worker."""
        assert number not in self._by_id
        conversation = self._add(number, b"", state, now_us)
        self.inherited += inherited and conversation is not None
        return conversation

    def adopt(self, number: int, key: bytes, state: State, now_us: int) -> Conversation[State] | None:
        """A conversation of source `key` that another worker has named; None as for `open`."""
        assert key and key not in self._by_source
        conversation = self._add(number, key, state, now_us) if number not in self._by_id else None
        if conversation is not None:
            self._by_source[key] = conversation
            self.inherited += 1
        return conversation

    def _add(self, number: int, key: bytes, state: State, now_us: int) -> Conversation[State] | None:
        if len(self._by_id) >= self._most and not self._evict(now_us):
            self.refused += 1
            return None
        conversation = Conversation(number, key, state, now_us)
        self._by_id[number] = conversation
        self._put(conversation)
        self.opened += 1
        return conversation

    def _tick_of(self, conversation: Conversation[State]) -> int:
        """The first tick in which it has expired, if it is not touched again."""
        return -(-(conversation.touched_us + self._duration_us) // self._tick_us)

    def _put(self, conversation: Conversation[State]) -> None:
        tick = conversation._tick = self._tick_of(conversation)
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = OrderedDict()
            heappush(self._ticks, tick)
        bucket[conversation.id] = conversation

    def _first_bucket(self) -> OrderedDict[int, Conversation[State]] | None:
        """The bucket of the earliest tick that has one with anything in it."""
        ticks, buckets = self._ticks, self._buckets
        while ticks:
            bucket = buckets[ticks[0]]
            if bucket:
                return bucket
            del buckets[heappop(ticks)]
        return None

    def close(self, conversation: Conversation[State]) -> None:
        """Close it, if it is open."""
        if self._by_id.get(conversation.id) is conversation:
            del self._buckets[conversation._tick][conversation.id]
            self._remove(conversation)

    def _remove(self, conversation: Conversation[State]) -> None:
        """Take out of the table what stands in no bucket any more."""
        del self._by_id[conversation.id]
        if conversation.key:
            del self._by_source[conversation.key]
        self._on_close(conversation)

    def _evict(self, now_us: int) -> bool:
        """Close the one idle longest, to the tick; False if it was not found idle for KEEP_US."""
        for _ in range(LOOKS):
            bucket = self._first_bucket()
            if bucket is None:
                return False
            _, conversation = bucket.popitem(last=False)
            if self._tick_of(conversation) > conversation._tick:
                self._put(conversation)
                continue
            if now_us - conversation.touched_us < KEEP_US:
                self._put(conversation)
                return False
            self.evicted += 1
            self._remove(conversation)
            return True
        return False

    def next_expiry_us(self) -> int | None:
        """When `expire` has something to look at; None while nothing is open."""
        return self._ticks[0] * self._tick_us if self._first_bucket() is not None else None

    def expire(self, now_us: int, most: int = 256) -> None:
        """Close what has been idle for the duration; looks at `most`, so call again while `next_expiry_us` is past."""
        for _ in range(most):
            bucket = self._first_bucket()
            if bucket is None or self._ticks[0] * self._tick_us > now_us:
                return
            _, conversation = bucket.popitem(last=False)
            if conversation.touched_us + self._duration_us > now_us:
                self._put(conversation)
                continue
            self.expired += 1
            self._remove(conversation)
