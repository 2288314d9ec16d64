"""Which stripe takes the next frame."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from workers.io.lineup import EXPRESS_STRIPES, FAR_US, FULL_MAX, LOOK, LOSSY, SLOW_US, SPARED, TOGETHER_US, Lineup
from workers.io.stripe import Stripe

MS = 1000
NOW_US = 100 * TOGETHER_US


class Carrier:
    """What a lineup asks of a stripe. `room`: frames that it still takes."""

    def __init__(self, index: int, trip_us: int = MS, rate_bps: float = 10e6) -> None:
        self.index, self.rtt_us, self.trip_us, self.rate_bps = index, trip_us, trip_us, rate_bps
        self.room = 1
        self.unsent = 0
        self.is_fast = False
        self.in_ready = self.slow = self.stalled = self.closed = False
        self.takes_small = self.clear = True
        self.received_us = 0
        self.path = None
        self.info = SimpleNamespace(unacked_bytes=1000 * index, loss=0.0)

    def __repr__(self) -> str:
        return f"stripe {self.index}"

    def has_room(self) -> bool:
        return self.room > 0

    @property
    def has_budget(self) -> bool:
        return self.room > 0

    def is_clear(self) -> bool:
        return self.clear

    def unsent_us(self) -> float:
        return self.unsent


def lineup_of(*carriers: Carrier) -> Lineup:
    lineup = Lineup(cast(dict[int, Stripe], {each.index: each for each in carriers}))
    lineup.on_time(0, 0.0)
    for each in carriers:
        lineup.make_ready(cast(Stripe, each))
    return lineup


def as_carrier(stripe: Any) -> Any:
    return stripe


def test_the_stripe_used_last_is_next() -> None:
    carriers = [Carrier(index) for index in range(3)]
    lineup = lineup_of(*carriers)
    assert as_carrier(lineup.with_room(True)) is carriers[2]
    carriers[2].room = 0
    assert as_carrier(lineup.with_room(True)) is carriers[1]
    carriers[2].room = 1
    lineup.make_ready(cast(Stripe, carriers[2]))
    assert as_carrier(lineup.with_room(True)) is carriers[2]


def test_few_of_the_fastest_stripes_are_filled() -> None:
    carriers = [Carrier(index) for index in range(2 * FULL_MAX)]
    for each in carriers:
        each.is_fast = True
    lineup = lineup_of(*carriers)
    used = []
    while (stripe := as_carrier(lineup.with_room(True))) is not None:
        stripe.room = 0
        used.append(stripe)
    assert len(used) == FULL_MAX
    used[0].room = 1
    lineup.make_ready(used[0])
    assert as_carrier(lineup.with_room(True)) is used[0]
    used[0].room = 0
    for each in used[:2]:
        each.is_fast = False
    lineup.on_time(0, 0.0)
    assert as_carrier(lineup.with_room(True)) not in (None, *used)


def test_slow_stripe_is_used_when_the_quick_ones_are_full() -> None:
    slow, quick = Carrier(0, 60 * MS), Carrier(1, 10 * MS)
    lineup = lineup_of(quick, slow)
    assert slow.slow and not quick.slow
    assert as_carrier(lineup.with_room(True)) is quick
    quick.room = 0
    assert as_carrier(lineup.with_room(True)) is slow


def test_stripe_of_twice_the_shortest_trip_is_not_slow_yet() -> None:
    quick, other = Carrier(0, 10 * MS), Carrier(1, 20 * MS + SLOW_US)
    lineup = lineup_of(quick, other)
    assert not other.slow and not lineup.meanwhile_bytes(other.trip_us)
    other.trip_us += 1
    lineup.on_time(0, 0.0)
    assert other.slow
    assert lineup.meanwhile_bytes(other.trip_us) > 10e6 / 8 * (other.trip_us - quick.trip_us) / 1e6 - 1


def test_waiting_for_a_quick_stripe_takes_one_that_will_have_room() -> None:
    """Or nothing would ever wake up whoever waits."""
    quick, slow = Carrier(0, 10 * MS), Carrier(1, 60 * MS)
    lineup = lineup_of(quick, slow)
    assert not lineup.is_quick_busy, "it has room now"
    quick.room = 0
    assert as_carrier(lineup.with_room(True)) is slow
    assert lineup.is_quick_busy
    quick.stalled = True
    assert not lineup.is_quick_busy
    quick.stalled = False
    lineup.forget(cast(Stripe, quick))
    assert not lineup.is_quick_busy, "it is lost"


def test_stripes_of_other_workers_make_ours_slow() -> None:
    only = Carrier(0, 60 * MS)
    lineup = lineup_of(only)
    assert not only.slow
    lineup.on_time(10 * MS, 0.0)
    assert only.slow


def test_stalled_stripe_waits_apart_until_it_is_needed_or_recovers() -> None:
    stalled, well = Carrier(0), Carrier(1)
    lineup = lineup_of(well, stalled)
    stalled.stalled = True
    assert as_carrier(lineup.with_room(True)) is well
    well.room = 0
    assert lineup.with_room(True) is None and not lineup.held_all
    stalled.stalled = False
    assert as_carrier(lineup.with_room(True)) is stalled


def test_last_stripe_is_used_though_it_stalls_unless_another_worker_has_some() -> None:
    only = Carrier(0)
    lineup = lineup_of(only)
    only.stalled = True
    assert lineup.with_room(needed=False) is None and lineup.held_all
    assert as_carrier(lineup.with_room(needed=True)) is only


def test_small_frames_beside_bulk_get_a_stripe_of_their_own() -> None:
    carriers = [Carrier(index) for index in range(EXPRESS_STRIPES)]
    lineup = lineup_of(*carriers)
    lineup.on_light(NOW_US)
    assert lineup.for_small() is None, "no bulk, no need"
    lineup.on_heavy(NOW_US)
    lineup.on_light(NOW_US)
    express = lineup.for_small()
    assert as_carrier(express) is carriers[0], "that with least in flight"
    used = []
    while (stripe := as_carrier(lineup.with_room(True))) is not None:
        stripe.room = 0
        used.append(stripe)
    assert sorted(each.index for each in used) == [1, 2, 3]


def test_express_stripe_serves_bulk_again_when_small_frames_are_over() -> None:
    carriers = [Carrier(index) for index in range(EXPRESS_STRIPES)]
    lineup = lineup_of(*carriers)
    lineup.on_heavy(NOW_US)
    lineup.on_light(NOW_US)
    lineup.on_heavy(NOW_US + TOGETHER_US)
    assert lineup.for_small() is not None
    lineup.on_heavy(NOW_US + TOGETHER_US + 1)
    assert lineup.for_small() is None
    assert as_carrier(lineup.with_room(True)) is carriers[0]


def test_express_stripe_that_stalls_or_is_lost_is_replaced() -> None:
    carriers = [Carrier(index) for index in range(EXPRESS_STRIPES + 1)]
    lineup = lineup_of(*carriers)
    lineup.on_heavy(NOW_US)
    lineup.on_light(NOW_US)
    carriers[0].stalled = True
    assert lineup.for_small() is None
    lineup.on_light(NOW_US)
    assert as_carrier(lineup.for_small()) is carriers[1]
    lineup.forget(cast(Stripe, carriers[1]))
    assert lineup.for_small() is None


def lossy_lineup(count: int) -> tuple[list[Carrier], Lineup]:
    """Small frames and bulk together, on a path that loses packets."""
    carriers = [Carrier(index) for index in range(count)]
    carriers[-1].info.loss = 2 * LOSSY
    lineup = lineup_of(*carriers)
    lineup.on_heavy(NOW_US)
    for _ in range(3):
        lineup.on_light(NOW_US)
    return carriers, lineup


def test_small_frames_have_a_second_stripe_where_packets_get_lost() -> None:
    carriers, lineup = lossy_lineup(SPARED[0])
    assert as_carrier(lineup.for_small()) is carriers[0]
    assert as_carrier(lineup.for_copy(carriers[:1])) is carriers[1]
    used = []
    while (stripe := as_carrier(lineup.with_room(True))) is not None:
        stripe.room = 0
        used.append(stripe.index)
    assert sorted(used) == list(range(2, SPARED[0])), "two, and no third"
    assert lineup.for_copy(carriers[:2]) is None
    lineup.on_heavy(NOW_US + TOGETHER_US + 1)
    assert lineup.for_small() is None and lineup.for_copy(carriers[:1]) is None


@pytest.mark.parametrize(("count", "spared"), [(SPARED[1] - 1, 1), (SPARED[1], 2), (SPARED[2], 3)])
def test_more_copies_where_more_stripes_can_be_spared(count: int, spared: int) -> None:
    carriers, lineup = lossy_lineup(count)
    lineup.on_light(NOW_US)
    copies = [as_carrier(lineup.for_copy(carriers[:number])) for number in range(1, 5)]
    assert copies == carriers[1 : 1 + spared] + [None] * (4 - spared)


def test_second_stripe_is_not_spared_without_loss_or_where_stripes_are_few() -> None:
    carriers, lineup = lossy_lineup(SPARED[0] - 1)
    assert lineup.for_small() is not None and lineup.for_copy(carriers[:1]) is None
    carriers, lineup = lossy_lineup(SPARED[0])
    for each in carriers:
        each.info.loss = LOSSY
    lineup.forget(cast(Stripe, carriers[1]))
    lineup.on_time(0, 0.0)
    lineup.on_light(NOW_US)
    assert lineup.for_small() is not None and lineup.for_copy(carriers[:1]) is None


def test_second_stripe_serves_bulk_again_when_loss_is_over() -> None:
    carriers, lineup = lossy_lineup(SPARED[0])
    carriers[-1].info.loss = 0.0
    lineup.on_time(0, 0.0)
    lineup.on_light(NOW_US)
    assert as_carrier(lineup.for_small()) is carriers[0] and lineup.for_copy(carriers[:1]) is None
    assert as_carrier(lineup.with_room(True)) is carriers[1]


def test_second_stripe_that_stalls_gets_no_copies_and_follows_on_the_first() -> None:
    carriers, lineup = lossy_lineup(SPARED[0])
    carriers[1].stalled = True
    assert lineup.for_copy(carriers[:1]) is None
    carriers[1].stalled = False
    lineup.forget(cast(Stripe, carriers[0]))
    assert as_carrier(lineup.for_small()) is carriers[1]
    assert lineup.for_copy([carriers[1]]) is None


def test_too_few_stripes_are_all_for_everything() -> None:
    lineup = lineup_of(*(Carrier(index) for index in range(EXPRESS_STRIPES - 1)))
    lineup.on_heavy(NOW_US)
    lineup.on_light(NOW_US)
    assert lineup.for_small() is None


def test_small_frame_without_room_anywhere_goes_where_least_waits() -> None:
    full, fuller, broken = Carrier(0), Carrier(1), Carrier(2)
    lineup = lineup_of(full, fuller, broken)
    full.unsent, fuller.unsent, broken.unsent, broken.takes_small = 5 * MS, 9 * MS, 0, False
    assert as_carrier(lineup.without_room(slow=False)) is full


def test_stripe_put_aside_comes_back_in_time() -> None:
    first, second = Carrier(0), Carrier(1)
    lineup = lineup_of(first, second)
    assert lineup.put_aside(cast(Stripe, second))
    assert as_carrier(lineup.with_room(True)) is first
    lineup.on_time(0, 0.0)
    assert as_carrier(lineup.with_room(True)) is second
    assert not lineup_of(first).put_aside(cast(Stripe, first)), "the only one is needed"


def test_express_stripe_serves_bulk_when_the_others_are_lost() -> None:
    carriers = [Carrier(index) for index in range(EXPRESS_STRIPES)]
    lineup = Lineup(stripes := cast(dict[int, Stripe], {each.index: each for each in carriers}))
    for each in carriers:
        lineup.make_ready(cast(Stripe, each))
    lineup.on_heavy(NOW_US)
    lineup.on_light(NOW_US)
    for each in carriers[1:]:
        lineup.forget(stripes.pop(each.index))
    assert as_carrier(lineup.with_room(True)) is carriers[0]


def test_express_stripe_serves_bulk_when_all_others_stall() -> None:
    carriers = [Carrier(index) for index in range(EXPRESS_STRIPES)]
    lineup = lineup_of(*carriers)
    lineup.on_heavy(NOW_US)
    lineup.on_light(NOW_US)
    for each in carriers[1:]:
        each.stalled = True
    assert as_carrier(lineup.with_room(True)) is carriers[0]
    lineup.on_light(NOW_US)
    assert as_carrier(lineup.with_room(True)) is carriers[0], "one that is left is not spared"


def test_fast_stripes_that_are_full_and_stall_do_not_hold_up_the_others() -> None:
    carriers = [Carrier(index) for index in range(FULL_MAX + 1)]
    lineup = lineup_of(*carriers)
    for each in carriers[1:]:
        each.is_fast, each.room = True, 0
    assert lineup.with_room(True) is None
    for each in carriers[1:]:
        each.stalled = True
    lineup.on_time(0, 0.0)
    assert as_carrier(lineup.with_room(True)) is carriers[0]


def test_stripe_that_breaks_when_it_is_asked_for_room_is_forgotten() -> None:
    broken, well = Carrier(0), Carrier(1)
    lineup = lineup_of(well, broken)

    def fail() -> bool:
        broken.closed = True
        lineup.forget(cast(Stripe, broken))
        return False

    broken.has_room = fail  # type: ignore[method-assign]
    assert as_carrier(lineup.with_room(True)) is well
    assert not lineup.is_quick_busy


def test_not_all_stripes_are_put_aside() -> None:
    first, second = Carrier(0), Carrier(1)
    lineup = lineup_of(first, second)
    assert lineup.put_aside(cast(Stripe, second))
    assert not lineup.put_aside(cast(Stripe, first))
    assert as_carrier(lineup.with_room(True)) is first


def test_the_stripe_at_hand_is_the_next_if_nothing_speaks_against_it() -> None:
    carriers = [Carrier(index) for index in range(2)]
    lineup = lineup_of(*carriers)
    assert as_carrier(lineup.at_hand()) is carriers[1]
    carriers[1].room = 0
    assert lineup.at_hand() is None, "whether others have room is not looked at"
    carriers[1].room, carriers[1].stalled = 1, True
    assert lineup.at_hand() is None
    carriers[1].stalled, carriers[1].slow = False, True
    assert lineup.at_hand() is None
    assert lineup_of().at_hand() is None


def test_small_frames_far_away_take_a_stripe_where_nothing_waits() -> None:
    carriers = [Carrier(index, FAR_US) for index in range(LOOK + 2)]
    lineup = lineup_of(*carriers)
    assert as_carrier(lineup.at_hand()) is carriers[-1]
    assert as_carrier(lineup.for_small()) is carriers[-1]
    carriers[-1].clear = carriers[-2].clear = False
    carriers[-3].slow = carriers[-4].stalled = True
    assert lineup.at_hand() is None
    assert as_carrier(lineup.for_small()) is carriers[-5]
    assert as_carrier(lineup.with_room(True)) is carriers[-1], "the order of the others stays"
    for each in carriers[2:]:
        each.clear = False
    assert lineup.for_small() is None, "only a few are asked"


def test_nobody_asks_the_kernel_where_the_other_end_is_near() -> None:
    carriers = [Carrier(index, FAR_US - 1) for index in range(2)]
    for each in carriers:
        each.clear = False
    lineup = lineup_of(*carriers)
    assert as_carrier(lineup.at_hand()) is carriers[1]
    assert lineup.for_small() is None


def test_nobody_asks_the_kernel_where_there_is_no_choice() -> None:
    only = Carrier(0, FAR_US)
    only.is_clear = lambda: pytest.fail("asked")  # type: ignore[method-assign]
    lineup = lineup_of(only)
    assert as_carrier(lineup.at_hand()) is only
    assert lineup.for_small() is None


def test_small_frames_take_the_express_stripe_where_nothing_waits() -> None:
    carriers, lineup = lossy_lineup(SPARED[0])
    for each in carriers:
        each.rtt_us = FAR_US
    first, second = carriers[:2]
    assert as_carrier(lineup.for_small()) is first
    first.clear = False
    assert as_carrier(lineup.for_small()) is second
    assert as_carrier(lineup.for_copy([second])) is first, "copies go on the other"
    assert as_carrier(lineup.for_copy([first])) is second, "also of what was sent before"
    second.clear = False
    assert as_carrier(lineup.for_small()) is second, "none is clear: it stays"
    second.takes_small = False
    assert lineup.for_small() is None


def test_stripes_are_not_kept_for_small_frames_alone() -> None:
    _, lineup = lossy_lineup(SPARED[0])
    assert lineup.at_hand() is None
    lineup.on_light(NOW_US + TOGETHER_US + 1)
    assert lineup.for_small() is None and lineup.for_copy([]) is None
    assert lineup.at_hand() is not None


def test_stripes_kept_for_small_frames_serve_bulk_when_all_others_are_lost() -> None:
    carriers = [Carrier(index) for index in range(SPARED[2])]
    for each in carriers:
        each.info.loss = 2 * LOSSY
    stripes = cast(dict[int, Stripe], {each.index: each for each in carriers})
    lineup = Lineup(stripes)
    lineup.on_time(0, 0.0)
    for each in carriers:
        lineup.make_ready(cast(Stripe, each))
    lineup.on_heavy(NOW_US)
    for _ in range(EXPRESS_STRIPES):
        lineup.on_light(NOW_US)
    for each in carriers[EXPRESS_STRIPES:]:
        lineup.forget(stripes.pop(each.index))
    assert as_carrier(lineup.with_room(True)) in carriers[:EXPRESS_STRIPES]
