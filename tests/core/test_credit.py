"""Windows and the pool behind them: when credit is due, how far it grows, and that all of it comes back."""

from hypothesis import given
from hypothesis import strategies as st

from workers.core.credit import (
    INITIAL_FRAMES,
    INITIAL_WINDOW,
    MIN_SLOT,
    CreditPool,
    ReceiveWindow,
    frames_allowed,
    reserve_bytes,
)

RTT_US = 10_000
CAP = 1 << 20


def opened(pool: CreditPool, cap: int = CAP) -> ReceiveWindow:
    assert pool.reserve(reserve_bytes(INITIAL_WINDOW))
    return ReceiveWindow(pool, cap, 0)


def test_new_window_starts_small() -> None:
    window = opened(CreditPool(1 << 30))
    assert window.announce() == (INITIAL_WINDOW, INITIAL_FRAMES) == (16 << 10, 16)
    assert not window.due()


def test_credit_is_due_after_an_eighth_of_the_window() -> None:
    window = opened(CreditPool(1 << 30))
    window.on_consumed((INITIAL_WINDOW >> 3) - 1, 1, RTT_US, 1)
    assert not window.due()
    window.on_consumed(1, 0, 2 * RTT_US, 1)
    assert window.due()
    assert window.announce()[0] == INITIAL_WINDOW + (INITIAL_WINDOW >> 3)
    assert not window.due()


def test_credit_is_due_after_three_quarters_of_the_frames() -> None:
    window = opened(CreditPool(1 << 30))
    window.on_consumed(11, 11, RTT_US, 1)
    assert not window.due()
    window.on_consumed(1, 1, 2 * RTT_US, 1)
    assert window.due()
    assert window.announce() == (INITIAL_WINDOW + 12, INITIAL_FRAMES + 12)


def test_window_doubles_while_a_round_trip_takes_more_than_half_of_it() -> None:
    window, now_us = opened(CreditPool(1 << 30)), 0
    seen = [window.window]
    while window.window < CAP:
        now_us += RTT_US // 4
        window.on_consumed(window.window // 6, 1, now_us, RTT_US)
        if window.window != seen[-1]:
            seen.append(window.window)
    assert seen == [INITIAL_WINDOW << n for n in range(len(seen))] and seen[-1] == CAP
    assert now_us <= 7 * RTT_US


def test_grown_window_reserves_the_difference_and_gives_all_of_it_back() -> None:
    pool = CreditPool(2 * reserve_bytes(2 * INITIAL_WINDOW))
    window = opened(pool)
    window.on_consumed(INITIAL_WINDOW, 1, 1, RTT_US)
    assert window.window == 2 * INITIAL_WINDOW and pool.reserved == reserve_bytes(2 * INITIAL_WINDOW)
    window.on_consumed(2 * INITIAL_WINDOW, 1, 2, RTT_US)
    assert window.window == 2 * INITIAL_WINDOW
    window.close()
    assert pool.reserved == 0


def test_growth_leaves_a_quarter_for_new_streams_and_no_session_takes_everything() -> None:
    worker = CreditPool(12_000)
    greedy, modest = worker.for_session(), worker.for_session()
    assert greedy.reserve_growth(6_000) and not greedy.reserve_growth(1)
    assert modest.reserve_growth(3_000) and not modest.reserve_growth(1), "three quarters of the worker's are taken"
    assert modest.reserve(3_000) and not greedy.reserve(1)
    assert (worker.reserved, greedy.reserved, modest.reserved) == (12_000, 6_000, 6_000)
    greedy.give_back(6_000)
    modest.give_back(6_000)
    assert worker.reserved == greedy.reserved == modest.reserved == 0


def test_slow_reader_keeps_its_first_window() -> None:
    window, now_us = opened(CreditPool(1 << 30)), 0
    for _ in range(1000):
        now_us += RTT_US
        window.on_consumed(INITIAL_WINDOW // 3, 1, now_us, RTT_US)
    assert window.window == INITIAL_WINDOW


def test_burst_after_a_pause_is_not_taken_for_a_rate() -> None:
    window = opened(CreditPool(1 << 30))
    window.on_consumed(INITIAL_WINDOW, 1, 1000 * RTT_US, RTT_US)
    assert window.window == INITIAL_WINDOW


def test_exhausted_pool_stops_the_growth_and_not_the_stream() -> None:
    pool = CreditPool(reserve_bytes(INITIAL_WINDOW) + 1000)
    window = opened(pool)
    window.on_consumed(INITIAL_WINDOW, 4, 1, RTT_US)
    assert window.window == INITIAL_WINDOW
    assert window.announce() == (2 * INITIAL_WINDOW, INITIAL_FRAMES + 4)
    assert not pool.reserve(1001)


def test_reservation_covers_the_worst_frames_of_a_window() -> None:
    """As many frames as are allowed, in slots of twice their length or MIN_SLOT."""
    window = INITIAL_WINDOW
    while window <= 64 << 20:
        frames = frames_allowed(window)
        for large in range(0, frames + 1, max(frames // 16, 1)):
            size = (window - (frames - large)) // large if large else 0
            occupied = large * max(2 * size, MIN_SLOT) + (frames - large) * MIN_SLOT
            assert occupied <= reserve_bytes(window)
        window *= 2


steps = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(0, INITIAL_WINDOW), st.integers(0, 4), st.integers(0, 3 * RTT_US), st.booleans()
    ),
    max_size=80,
)


@given(steps, st.integers(0, 600 << 10), st.integers(1, 200 << 10))
def test_promises_are_kept(steps: list[tuple[int, int, int, int, bool]], total: int, cap: int) -> None:
    """Credit never shrinks and never exceeds what was consumed and the cap; reserved is what the windows need."""
    pool, now_us = CreditPool(total), 0
    windows: dict[int, ReceiveWindow] = {}
    last: dict[int, tuple[int, int]] = {}
    for number, length, frames, passed_us, close in steps:
        now_us += passed_us
        window = windows.get(number)
        if window is None:
            if pool.reserve(reserve_bytes(INITIAL_WINDOW)):
                windows[number], last[number] = ReceiveWindow(pool, cap, now_us), (0, 0)
        elif close:
            windows.pop(number).close()
        else:
            taken = min(length, window.credit - window.consumed)
            window.on_consumed(taken, min(frames, window.frames - window.consumed_frames), now_us, RTT_US)
            due = window.due()
            credit = window.announce()
            assert credit[0] >= last[number][0] and credit[1] >= last[number][1]
            assert due or credit[0] - last[number][0] <= window.window >> 3 or last[number] == (0, 0)
            assert credit[0] <= window.consumed + max(cap, INITIAL_WINDOW)
            assert credit[0] == window.consumed + window.window
            last[number] = credit
        assert pool.reserved == sum(reserve_bytes(each.window) for each in windows.values()) <= max(total, 0)
    for window in windows.values():
        window.close()
    assert pool.reserved == 0


def grown(pool: CreditPool, window_bytes: int) -> tuple[ReceiveWindow, int]:
    """A window of that size, all of it announced, and the time."""
    window, now_us = opened(pool, window_bytes), 0
    while window.window < window_bytes:
        now_us += RTT_US // 2
        window.on_consumed(window.window - 1, 1, now_us, RTT_US)
    window.announce()
    return window, now_us


def test_window_that_is_hardly_used_shrinks_where_the_pool_is_short() -> None:
    pool = CreditPool(2 * reserve_bytes(CAP))
    window, now_us = grown(pool, CAP)
    assert pool.reserve(pool.total - pool.reserved)
    credit = window.announce()[0]
    for _ in range(2000):
        now_us += 10 * RTT_US
        window.on_consumed(1000, 1, now_us, RTT_US)
        if window.due():
            window.announce()
    assert window.window == INITIAL_WINDOW and window.credit >= credit
    assert pool.total - pool.reserved == reserve_bytes(CAP) - reserve_bytes(INITIAL_WINDOW)


def test_window_that_is_hardly_used_stays_where_the_pool_is_not_short() -> None:
    window, now_us = grown(CreditPool(10 * reserve_bytes(CAP)), CAP)
    for _ in range(100):
        now_us += 10 * RTT_US
        window.on_consumed(1000, 1, now_us, RTT_US)
    assert window.window == CAP


steps = st.lists(
    st.one_of(
        st.tuples(st.just("consume"), st.integers(0, CAP), st.integers(0, 20)),
        st.tuples(st.just("blocked"), st.integers(0, CAP), st.just(0)),
        st.tuples(st.just("announce"), st.just(0), st.just(0)),
        st.tuples(st.just("others"), st.integers(0, 8), st.just(0)),
    ),
    max_size=60,
)


@given(steps)
def test_what_is_announced_is_always_reserved(script: list[tuple[str, int, int]]) -> None:
    pool = CreditPool(3 * reserve_bytes(CAP))
    window = opened(pool)
    others, now_us = 0, 0
    for step, amount, frames in script:
        before = (window.credit, window.frames)
        if step == "consume":
            now_us += RTT_US * (1 + frames)
            allowed = min(frames, window.frames - window.consumed_frames)
            window.on_consumed(min(amount, window.credit - window.consumed), allowed, now_us, RTT_US)
        elif step == "blocked":
            window.on_blocked(window.credit, window.consumed + amount)
        elif step == "announce":
            window.announce()
        else:
            pool.give_back(others)
            others = amount * reserve_bytes(CAP) // 4
            others *= pool.reserve(others)
        assert (window.credit, window.frames) >= before and window.frames >= before[1]
        outstanding = 2 * (window.credit - window.consumed) + MIN_SLOT * (window.frames - window.consumed_frames)
        assert pool.reserved - others >= max(outstanding, reserve_bytes(window.window))
    window.close()
    assert pool.reserved == others
