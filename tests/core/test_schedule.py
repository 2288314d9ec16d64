"""Turns among streams: fair by bytes, and nothing to gain by leaving."""

from hypothesis import given
from hypothesis import strategies as st

from workers.core.schedule import FEW_LIGHT, LIGHT_BYTES, LIGHT_US, QUANTUM, DeficitRoundRobin, Turns

MAX_FRAME = 256 << 10
NOW_US = 1_000_000


class Member:
    def __init__(self, name: int) -> None:
        self.name = name
        self.deficit = 0
        self.scheduled = self.light = False
        self.light_bytes = 0
        self.light_since_us = 0
        self.sent = 0

    def __repr__(self) -> str:
        return f"member {self.name}"


def send(turns: DeficitRoundRobin[Member], length: int) -> Member:
    member = turns.next()
    assert member is not None
    assert turns.next() is member, "asking twice changes nothing"
    member.sent += length
    turns.charge(member, length)
    return member


def members(count: int) -> tuple[DeficitRoundRobin[Member], list[Member]]:
    turns: DeficitRoundRobin[Member] = DeficitRoundRobin()
    all_members = [Member(number) for number in range(count)]
    for member in all_members:
        turns.add(member)
    return turns, all_members


def test_nobody_has_no_turn() -> None:
    turns, _ = members(0)
    assert turns.next() is None and len(turns) == 0


def test_one_alone_always_has_the_turn() -> None:
    turns, (only,) = members(1)
    for _ in range(100):
        assert send(turns, MAX_FRAME) is only


def test_debt_of_one_that_was_alone_does_not_grow() -> None:
    turns, (first,) = members(1)
    for _ in range(100):
        send(turns, MAX_FRAME)
    second = Member(1)
    turns.add(second)
    for _ in range(100):
        send(turns, QUANTUM)
    assert abs(second.sent - (first.sent - 100 * MAX_FRAME)) <= MAX_FRAME + QUANTUM


def test_leaving_and_coming_back_gains_nothing() -> None:
    turns, (honest, sly) = members(2)
    for _ in range(1000):
        if send(turns, MAX_FRAME) is sly:
            turns.remove(sly)
            turns.add(sly)
    assert sly.sent <= honest.sent + MAX_FRAME + QUANTUM


def test_small_frames_get_as_many_bytes_as_large_ones() -> None:
    turns, (small, large) = members(2)
    while large.sent < 100 * MAX_FRAME:
        member = turns.next()
        send(turns, 1000 if member is small else MAX_FRAME)
    assert abs(small.sent - large.sent) <= MAX_FRAME + QUANTUM + 1000


def test_add_and_remove_may_be_repeated() -> None:
    turns, (first, second) = members(2)
    turns.add(first)
    assert len(turns) == 2
    turns.remove(second)
    turns.remove(second)
    assert len(turns) == 1 and not second.scheduled
    turns.remove(first)
    assert turns.next() is None


actions = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, MAX_FRAME)),
        st.tuples(st.just("send many"), st.integers(1, 4 * QUANTUM)),
        st.tuples(st.just("add"), st.integers(0, 5)),
        st.tuples(st.just("remove"), st.integers(0, 5)),
    ),
    max_size=60,
)


@given(actions)
def test_backlogged_members_get_the_same_within_a_quantum_and_a_frame(actions: list[tuple[str, int]]) -> None:
    """Whatever others do: between any two that are backlogged all along, the bytes differ by a bounded amount."""
    turns, all_members = members(6)
    always = all_members[:2]
    present = set(all_members)
    for name, number in actions:
        member = all_members[number % 6]
        if name == "add":
            turns.add(member)
            present.add(member)
        elif name == "remove" and member not in always:
            turns.remove(member)
            present.discard(member)
        elif name == "send":
            assert send(turns, number) in present
        elif name == "send many":
            for _ in range(30):
                assert send(turns, number) in present
        assert len(turns) == len(present)
        assert {each for each in all_members if each.scheduled} == present
        assert abs(always[0].sent - always[1].sent) <= 2 * (QUANTUM + MAX_FRAME)
        assert all(-MAX_FRAME <= each.deficit <= QUANTUM for each in all_members)


def light_members(count: int) -> tuple[Turns[Member], list[Member]]:
    turns: Turns[Member] = Turns()
    return turns, [Member(number) for number in range(count)]


def test_member_is_light_until_it_has_sent_much_in_a_short_time() -> None:
    turns, (bulk, small) = light_members(2)
    turns.add(bulk, NOW_US)
    turns.charge(bulk, LIGHT_BYTES)
    assert turns.next() is bulk and turns.heavy == 1 and not turns.light
    turns.add(small, NOW_US)
    for _ in range(LIGHT_BYTES // 64):
        assert turns.next() is small, "before any bulk"
        turns.charge(small, 64)
    assert turns.next() is bulk and turns.heavy == 2


def test_light_members_take_turns() -> None:
    turns, members = light_members(3)
    for member in members:
        turns.add(member, NOW_US)
    order = []
    for _ in range(6):
        member = turns.next()
        assert member is not None
        order.append(member.name)
        turns.charge(member, 100)
    assert order == [0, 1, 2, 0, 1, 2]


def test_many_light_members_together_are_a_bulk_transfer() -> None:
    turns, members = light_members(2 * FEW_LIGHT)
    for member in members:
        turns.add(member, NOW_US)
    assert len(turns.light) == turns.heavy == FEW_LIGHT and turns.waiting == 2 * FEW_LIGHT


def test_member_is_light_again_after_a_while() -> None:
    turns, (member,) = light_members(1)
    turns.add(member, NOW_US)
    turns.charge(member, LIGHT_BYTES)
    turns.remove(member)
    turns.add(member, NOW_US + LIGHT_US - 1)
    assert not turns.light
    turns.remove(member)
    turns.add(member, NOW_US + LIGHT_US)
    assert turns.light


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["add", "remove", "send"])), max_size=60))
def test_every_present_member_has_a_turn_and_no_other(steps: list[tuple[int, str]]) -> None:
    turns, members = light_members(5)
    present: set[int] = set()
    for now_us, (name, step) in enumerate(steps):
        member = members[name]
        if step == "add":
            turns.add(member, now_us * LIGHT_US // 3)
            present.add(name)
        elif step == "remove":
            turns.remove(member)
            present.discard(name)
        elif (chosen := turns.next()) is not None:
            turns.charge(chosen, 5000)
        assert bool(turns) == bool(present)
        assert turns.heavy + len(turns.light) == len(present)
        following = turns.next()
        assert following is None if not present else following is not None and following.name in present


def test_member_that_sends_alone_is_light_until_it_has_sent_much() -> None:
    turns, (alone, other) = light_members(2)
    turns.remove(alone)
    turns.remove(other)
    assert turns.pass_alone(alone, LIGHT_BYTES - 1, NOW_US)
    assert not turns.pass_alone(alone, 1, NOW_US + LIGHT_US - 1)
    turns.add(alone, NOW_US + LIGHT_US - 1)
    assert turns.heavy == 1, "what was sent alone counts"
    assert turns.pass_alone(other, LIGHT_BYTES - 1, NOW_US)
    assert turns.pass_alone(other, LIGHT_BYTES - 1, NOW_US + LIGHT_US)


def test_member_that_sent_much_on_average_is_not_light_at_the_start_of_a_period() -> None:
    turns, (bulk,) = light_members(1)
    turns.add(bulk, NOW_US)
    turns.charge(bulk, LIGHT_BYTES)
    assert turns.heavy == 1
    turns.charge(bulk, 10 * LIGHT_BYTES)
    turns.remove(bulk)
    assert not turns.pass_alone(bulk, 1, NOW_US + 2 * LIGHT_US), "eleven in two periods"
    turns.add(bulk, NOW_US + 3 * LIGHT_US - 1)
    assert turns.heavy == 1
    turns.remove(bulk)
    assert turns.pass_alone(bulk, 1, NOW_US + 4 * LIGHT_US)
