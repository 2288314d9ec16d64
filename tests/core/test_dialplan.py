"""What is dialled when, and by which route: at full pace while it works, a fresh attempt now and then while not."""

import itertools

from workers.core.dialplan import (
    CONCURRENT,
    HANG_US,
    MOVE_US,
    PAUSE_MAX_US,
    SETTLED_US,
    YOUNG_US,
    Attempt,
    DialPlan,
)

SPACING_US = 10_000
LIFE_US = 10_000_000
TICK_US = 100_000
SECOND_US = 1_000_000


class Clock:
    """A plan and a time that passes; every attempt fails at the end of its life unless `settle` decides."""

    def __init__(self, stripes: int, routes: int = 1) -> None:
        self.plan = DialPlan(routes, SPACING_US, LIFE_US, lambda: 0.75)
        self.plan.want(range(stripes))
        self.now_us = SECOND_US
        self.hanging: list[Attempt] = []

    def dial(self) -> list[Attempt]:
        """All that may start now and, at the plan's pace, right after."""
        started = []
        while True:
            attempt = self.plan.next_dial(self.now_us)
            if attempt is not None:
                started.append(attempt)
                continue
            wait_us = self.plan.wait_us(self.now_us)
            if wait_us is None or not 0 < wait_us <= SPACING_US:
                break
            self.now_us += wait_us
        self.hanging += started
        return started

    def passes(self, time_us: int) -> list[Attempt]:
        """Time passes tick by tick; returns what was started."""
        started = []
        end_us = self.now_us + time_us
        while self.now_us < end_us:
            self.now_us += TICK_US
            for attempt in [each for each in self.hanging if self.now_us - each.started_us >= LIFE_US]:
                self.fails(attempt)
            self.plan.on_time(self.now_us)
            started += self.dial()
        return started

    def fails(self, attempt: Attempt) -> bool:
        self.hanging.remove(attempt)
        return self.plan.on_failed(attempt, self.now_us)

    def succeeds(self, attempt: Attempt) -> list[Attempt]:
        """Returns what is given up."""
        self.hanging.remove(attempt)
        given_up = self.plan.on_up(attempt, self.now_us)
        self.hanging = [each for each in self.hanging if each not in given_up]
        return given_up

    def all_up(self) -> None:
        for attempt in self.dial():
            self.succeeds(attempt)


def up(clock: Clock) -> dict[int, int]:
    """Index -> route."""
    return {index: route.number for route in clock.plan.routes for index in route.up}


def test_all_stripes_are_dialled_at_the_pace_told() -> None:
    clock = Clock(10)
    started = clock.dial()
    assert [each.index for each in started] == list(range(10))
    assert clock.now_us - SECOND_US == 9 * SPACING_US
    for attempt in started:
        clock.succeeds(attempt)
    assert up(clock) == dict.fromkeys(range(10), 0) and clock.passes(SECOND_US) == []


def test_lost_stripe_is_dialled_at_once_and_a_young_one_after_a_pause() -> None:
    clock = Clock(2)
    clock.all_up()
    assert clock.plan.on_lost(0, clock.now_us) is clock.plan.routes[0], "news"
    assert clock.dial() == []
    (attempt,) = clock.passes(SECOND_US // 5)
    assert attempt.index == 0
    clock.succeeds(attempt)
    clock.passes(YOUNG_US)
    assert clock.plan.on_lost(1, clock.now_us) is None
    assert [each.index for each in clock.dial()] == [1]


def test_refused_dials_are_tried_again_with_pauses_that_stay_short() -> None:
    clock = Clock(4)
    news = 0
    times_us = []
    for _ in range(40):
        for attempt in clock.passes(TICK_US):
            times_us.append(clock.now_us)
            news += clock.fails(attempt)
    assert news == 1
    gaps = [after - before for before, after in itertools.pairwise(times_us[6:])]
    assert gaps and all(PAUSE_MAX_US // 2 <= gap <= PAUSE_MAX_US + TICK_US for gap in gaps), gaps


def test_while_nothing_answers_fresh_attempts_start_beside_those_that_hang() -> None:
    clock = Clock(2)
    assert len(clock.dial()) == 2
    assert clock.passes(HANG_US - TICK_US) == []
    started = clock.passes(30 * SECOND_US)
    assert 30 <= len(started) <= 65 and len(clock.hanging) <= CONCURRENT
    given_up = clock.succeeds(clock.hanging[-1])
    assert given_up, "others for the same stripe"
    assert len(up(clock)) == 1


def test_blackout_of_all_stripes_is_no_storm_and_ends_with_the_first_that_comes_through() -> None:
    clock = Clock(100)
    clock.plan.want(range(30))
    clock.all_up()
    clock.passes(YOUNG_US)
    for index in range(30):
        clock.plan.on_stale(index)
    started = clock.dial() + clock.passes(20 * SECOND_US)
    assert 20 <= len(started) <= 50
    clock.succeeds(clock.hanging[-1])
    clock.passes(2 * SECOND_US)
    for attempt in list(clock.hanging):
        if attempt in clock.hanging:
            clock.succeeds(attempt)
    assert len(clock.passes(2 * SECOND_US)) + len(up(clock)) >= 29, "the others are replaced at the usual pace"


def test_stale_stripe_is_replaced_and_one_that_recovers_is_not() -> None:
    clock = Clock(5)
    clock.all_up()
    clock.plan.on_stale(3)
    (attempt,) = clock.passes(TICK_US)
    assert attempt.index == 3 and clock.plan.is_current(attempt)
    clock.plan.on_fresh(3)
    assert not clock.plan.is_current(attempt)
    clock.plan.end(attempt)
    clock.plan.on_stale(2)
    clock.plan.on_fresh(2)
    assert clock.passes(SECOND_US) == []


def test_stripe_that_works_is_replaced_on_request_once() -> None:
    clock = Clock(3)
    clock.all_up()
    clock.plan.refresh(1)
    (attempt,) = clock.dial()
    clock.plan.refresh(1)
    assert clock.dial() == [] and attempt.index == 1 and clock.plan.is_current(attempt)
    clock.succeeds(attempt)
    assert set(up(clock)) == {0, 1, 2}


def test_stripe_that_the_other_end_wants_moved_is_dialled_again_whatever_becomes_of_it() -> None:
    clock = Clock(3)
    clock.all_up()
    for index in range(3):
        clock.plan.move(index)
    first, second, third = clock.dial()
    assert clock.now_us - SECOND_US == 5 * SPACING_US, "at the usual pace"
    clock.plan.move(0)
    assert clock.plan.on_lost(0, clock.now_us) is None, "no failure"
    assert clock.plan.is_current(first)
    for attempt in (first, second):
        clock.succeeds(attempt)
    assert clock.fails(third), "news"
    clock.succeeds(clock.passes(SECOND_US)[0])
    clock.plan.move(7)
    assert set(up(clock)) == {0, 1, 2} and clock.passes(SECOND_US) == []


def test_what_is_not_wanted_any_more_is_not_dialled() -> None:
    clock = Clock(6)
    clock.all_up()
    clock.plan.want([0, 1])
    for index in range(2, 6):
        assert clock.plan.on_lost(index, clock.now_us) is None
    assert clock.passes(SECOND_US) == []
    clock.plan.want(range(4))
    assert [each.index for each in clock.dial()] == [2, 3]


def test_stripes_of_a_failing_route_go_to_the_other_and_return() -> None:
    clock = Clock(6, routes=2)
    for attempt in clock.dial():
        assert attempt.route == attempt.index % 2
        if attempt.route == 0:
            clock.succeeds(attempt)
    for _ in range((HANG_US + 2 * MOVE_US) // TICK_US):
        for attempt in clock.passes(TICK_US):
            if attempt.route == 0:
                clock.succeeds(attempt)
    assert up(clock) == dict.fromkeys(range(6), 0)
    assert clock.hanging and all(each.route == 1 for each in clock.hanging), "home is tried on"
    for _ in range(4 * SETTLED_US // TICK_US):
        for attempt in list(clock.hanging):
            if attempt in clock.hanging and clock.plan.is_current(attempt):
                clock.succeeds(attempt)
        clock.passes(TICK_US)
    assert up(clock) == {index: index % 2 for index in range(6)}
