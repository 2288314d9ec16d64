"""The table of conversations: numbers, lookups, expiry and eviction, against a list of what is open."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.core import conversations
from workers.core.conversations import KEEP_US, LOOKS, TICKS, Conversation, Conversations

DURATION_US = 60_000_000
TICK_US = DURATION_US // TICKS


class Table(Conversations[str]):
    """A table that notes what was closed."""

    def __init__(self, slot: int = 0, first: int = 0, most: int = 1000, duration_us: int = DURATION_US) -> None:
        self.closed: list[Conversation[str]] = []
        super().__init__(slot, first, most, duration_us, self.closed.append)

    def opened_at(self, key: bytes, now_us: int) -> Conversation[str]:
        conversation = self.open(key, key.decode(), now_us)
        assert conversation is not None
        return conversation


def test_conversation_is_found_by_source_and_by_number() -> None:
    table = Table(slot=3, first=0xFF000005)
    assert table.by_source(b"a") is None
    conversation = table.opened_at(b"a", 9)
    assert (conversation.id, conversation.key, conversation.state, conversation.touched_us) == (
        0x03000005,
        b"a",
        "a",
        9,
    )
    assert table.by_source(b"a") is table.by_id(0x03000005) is conversation
    assert list(table) == [conversation]


def test_adopted_conversation_keeps_the_number_that_another_worker_gave_it() -> None:
    table, number = Table(slot=3), 0x05000009
    conversation = table.adopt(number, b"a", "heir", 4)
    assert conversation is not None and table.by_source(b"a") is table.by_id(number) is conversation
    assert table.adopt(number, b"b", "another", 5) is None
    table.close(conversation)
    assert table.by_source(b"a") is None and table.closed == [conversation]


def test_accepted_conversation_is_found_by_number_alone() -> None:
    table = Table()
    number = 5 << 32 | 0x03000005
    conversation = table.accept(number, "server", 0)
    assert conversation is not None and table.by_id(number) is conversation
    assert table.by_source(b"") is None
    assert table.by_id(0x03000005) is None


def test_numbers_wrap_and_skip_those_in_use() -> None:
    table = Table(slot=255, first=0xFFFFFE)
    first = [table.opened_at(key, 0).id for key in (b"a", b"b", b"c")]
    assert first == [0xFFFFFFFE, 0xFFFFFFFF, 0xFF000000]
    table._counter = 0xFFFFFE
    assert table.opened_at(b"d", 0).id == 0xFF000001


def test_idle_conversation_closes_after_the_duration_and_within_a_tick() -> None:
    table = Table()
    conversation = table.opened_at(b"a", 123)
    due = table.next_expiry_us()
    assert due is not None and 123 + DURATION_US <= due <= 123 + DURATION_US + TICK_US
    table.expire(due - 1)
    assert not table.closed
    table.expire(due)
    assert table.closed == [conversation]
    assert (table.by_source(b"a"), table.by_id(conversation.id), len(table), table.expired) == (None, None, 0, 1)
    assert table.next_expiry_us() is None


def test_conversation_due_with_its_tick_closes_then() -> None:
    table = Table()
    conversation = table.opened_at(b"a", 0)
    assert table.next_expiry_us() == DURATION_US
    table.expire(DURATION_US - 1)
    assert not table.closed
    table.expire(DURATION_US)
    assert table.closed == [conversation]


def test_touched_conversation_stays() -> None:
    table = Table()
    conversation = table.opened_at(b"a", 0)
    conversation.touched_us = DURATION_US - 1
    table.expire(DURATION_US)
    assert len(table) == 1
    due = table.next_expiry_us()
    assert due is not None and 0 <= due - (2 * DURATION_US - 1) <= TICK_US
    table.expire(due)
    assert table.closed == [conversation]


def test_busy_conversation_is_looked_at_once_in_a_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table()
    conversation = table.opened_at(b"a", 0)
    looks = []
    put = Conversations._put
    monkeypatch.setattr(Conversations, "_put", lambda self, one: (looks.append(one), put(self, one)))
    for now_us in range(0, 10 * DURATION_US, TICK_US // 4):
        conversation.touched_us = now_us
        table.expire(now_us)
    assert 8 <= len(looks) <= 11


def test_closing_is_told_once() -> None:
    table = Table()
    conversation = table.opened_at(b"a", 0)
    table.close(conversation)
    table.close(conversation)
    again = table.opened_at(b"a", 0)
    table.close(conversation)
    assert table.closed == [conversation]
    assert table.by_source(b"a") is again
    table.expire(2 * DURATION_US)
    assert table.closed == [conversation, again]


def test_closing_what_is_closed_leaves_a_later_one_of_its_number() -> None:
    table = Table()
    conversation = table.accept(7, "", 0)
    assert conversation is not None
    table.close(conversation)
    later = table.accept(7, "", 0)
    table.close(conversation)
    assert later is not None and table.by_id(7) is later


def test_one_call_looks_at_a_bounded_number() -> None:
    table = Table()
    for number in range(100):
        table.opened_at(b"%d" % number, 0)
    for expected in (60, 20, 0):
        table.expire(2 * DURATION_US, most=40)
        assert len(table) == expected
    assert len(table.closed) == 100


def test_closing_one_may_close_others() -> None:
    table: Conversations[str] = Conversations(0, 0, 10, DURATION_US, lambda _: [table.close(one) for one in table])
    for key in (b"a", b"b", b"c"):
        table.open(key, "", 0)
    table.expire(2 * DURATION_US)
    assert not len(table) and table.next_expiry_us() is None


def test_longest_idle_makes_room() -> None:
    table = Table(most=3)
    a, b, c = (table.opened_at(key, index * TICK_US) for index, key in enumerate((b"a", b"b", b"c")))
    a.touched_us = 4 * TICK_US
    table.opened_at(b"d", 20 * TICK_US)
    assert table.closed == [b]
    table.opened_at(b"e", 20 * TICK_US)
    assert table.closed == [b, c]
    assert (table.evicted, table.refused, table.opened, len(table)) == (2, 0, 5, 3)


def test_flood_takes_no_busy_place() -> None:
    table = Table(most=50)
    busy = [table.opened_at(b"busy %d" % number, 0) for number in range(50)]
    opened = 0
    for number in range(5_000):
        now_us = number * 1_000
        for conversation in busy:
            conversation.touched_us = now_us
        opened += table.open(b"%d" % number, "", now_us) is not None
    assert (opened, table.refused, table.evicted) == (0, 5_000, 0)
    last_us = busy[0].touched_us
    assert table.open(b"early", "", last_us + KEEP_US - 1) is None
    assert table.open(b"late", "", last_us + KEEP_US) is not None


def test_short_questions_from_ever_new_sources_are_all_served() -> None:
    table = Table(most=100, duration_us=600_000_000)
    for number in range(2_000):
        table.opened_at(b"%d" % number, number * (KEEP_US // 90))
    assert table.evicted == 1_900
    assert [one.key for one in table.closed] == [b"%d" % number for number in range(1_900)]


def test_search_for_an_idle_one_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table()
    for number in range(1_000):
        table.opened_at(b"%d" % number, 0).touched_us = 30_000_000
    puts = []
    put = Conversations._put
    monkeypatch.setattr(Conversations, "_put", lambda self, one: (puts.append(one), put(self, one)))
    assert table.open(b"new", "", 30_000_001) is None
    assert len(puts) == LOOKS


@given(st.lists(st.integers(0, DURATION_US * 3), min_size=1, max_size=30), st.integers(1, 10))
def test_leap_of_the_clock_closes_what_is_due_in_the_end(opened_us: list[int], most: int) -> None:
    table = Table()
    for number, now_us in enumerate(sorted(opened_us)):
        table.opened_at(b"%d" % number, now_us)
    now_us = 50 * DURATION_US
    calls = 0
    while (due := table.next_expiry_us()) is not None and due <= now_us:
        table.expire(now_us, most)
        calls += 1
    assert len(table.closed) == len(opened_us)
    assert calls == -(-len(opened_us) // most)


KEYS = [b"a", b"b", b"c", b"d", b"e", b"f"]


class Model(RuleBasedStateMachine):
    """Every conversation closes when it has been idle for the duration, to the tick, and for no other reason."""

    MOST = 4

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(most=self.MOST)
        self.open: dict[bytes, Conversation[str]] = {}
        self.now_us = 0

    def idle_us(self, conversation: Conversation[str]) -> int:
        return self.now_us - conversation.touched_us

    @rule(key=st.sampled_from(KEYS))
    def datagram(self, key: bytes) -> None:
        known = self.table.by_source(key)
        assert known is self.open.get(key)
        if known is not None:
            known.touched_us = self.now_us
            return
        self.table.closed.clear()
        conversation = self.table.open(key, "", self.now_us)
        if conversation is None:
            assert len(self.open) == self.MOST and not self.table.closed
            assert all(self.idle_us(one) < KEEP_US + TICK_US for one in self.open.values())
            return
        assert len(self.table.closed) == (len(self.open) == self.MOST)
        for evicted in self.table.closed:
            longest = max(map(self.idle_us, self.open.values()))
            assert self.idle_us(evicted) >= max(KEEP_US, longest - TICK_US)
            assert self.open.pop(evicted.key) is evicted
        self.open[key] = conversation

    @rule(key=st.sampled_from(KEYS))
    def close(self, key: bytes) -> None:
        conversation = self.open.pop(key, None)
        if conversation is not None:
            self.table.close(conversation)

    @rule(passed_us=st.one_of(st.integers(0, KEEP_US * 2), st.integers(0, DURATION_US)))
    def time_passes(self, passed_us: int) -> None:
        self.now_us += passed_us
        self.table.closed.clear()
        self.table.expire(self.now_us)
        for conversation in self.table.closed:
            assert self.idle_us(conversation) >= DURATION_US
            assert self.open.pop(conversation.key) is conversation
        assert all(self.idle_us(one) < DURATION_US + TICK_US for one in self.open.values())

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        conversation = data.draw(st.sampled_from(sorted(self.open.values(), key=lambda one: one.key)))
        assert self.table.by_id(conversation.id) is conversation
        conversation.touched_us = self.now_us

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        table = self.table
        assert set(table) == set(self.open.values()) and len(table) == len(self.open)
        standing = [one for bucket in table._buckets.values() for one in bucket.values()]
        assert len(standing) == len(self.open) and set(standing) == set(self.open.values())
        assert sorted(table._ticks) == sorted(table._buckets)
        assert all(one._tick <= table._tick_of(one) for one in standing)
        assert table.opened - len(table) >= table.expired + table.evicted


TestModel = Model.TestCase


def test_bounds_of_the_table_are_asserted() -> None:
    for slot, most in ((256, 1), (-1, 1), (0, 0), (0, conversations.MAX_CONVERSATIONS + 1)):
        with pytest.raises(AssertionError):
            Table(slot=slot, most=most)


def test_conversation_of_another_worker_counts_as_inherited() -> None:
    table: Conversations[str] = Conversations(0, 0, 2, 1_000_000, lambda _: None)
    table.accept(1, "handed on", 0, inherited=True)
    table.adopt(2, b"source", "its owner has gone", 0)
    assert table.accept(3, "no room", 0, inherited=True) is None
    assert (table.opened, table.inherited, table.refused) == (2, 2, 1)
