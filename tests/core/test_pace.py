"""How a stripe's unsent data and frames follow its rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core.pace import (
    FRAME_INITIAL,
    FRAME_MIN,
    FRAME_SHARE,
    UNSENT_DRY_S,
    UNSENT_INITIAL,
    UNSENT_MAX,
    UNSENT_MIN,
    UNSENT_S,
    Pace,
)

FRAME_MAX = 256 << 10


@pytest.fixture
def pace() -> Pace:
    return Pace(FRAME_MAX)


def sample(pace: Pace, rate_bps: float) -> bool:
    return pace.on_sample(rate_bps, rate_bps, False, FRAME_MAX)


def test_new_stripe_starts_small(pace: Pace) -> None:
    assert (pace.unsent_limit, pace.frame_bytes) == (UNSENT_INITIAL, FRAME_INITIAL)
    assert Pace(1000).frame_bytes == 1000


def test_limit_is_so_many_seconds_of_the_rate(pace: Pace) -> None:
    assert sample(pace, 100e6)
    assert (pace.rate_bps, pace.unsent_limit) == (100e6, int(100e6 / 8 * UNSENT_S))
    assert pace.frame_bytes == 128 << 10  # twice that would be more than FRAME_SHARE of 250 kB


def test_limit_stays_for_less_than_a_quarter(pace: Pace) -> None:
    sample(pace, 100e6)
    assert not sample(pace, 124e6)
    assert not sample(pace, 76e6)
    assert pace.unsent_limit == int(100e6 / 8 * UNSENT_S)
    assert sample(pace, 126e6)
    assert pace.unsent_limit == int(126e6 / 8 * UNSENT_S)


def test_little_to_send_does_not_lower_the_rate_below_what_the_window_carries(pace: Pace) -> None:
    pace.on_sample(1e6, 40e6, True, FRAME_MAX)
    assert pace.rate_bps == 40e6
    pace.on_sample(1e6, 100e6, True, FRAME_MAX)
    assert pace.rate_bps == 80e6
    pace.on_sample(1e6, 100e6, False, FRAME_MAX)
    assert pace.rate_bps == 1e6


def test_stripe_that_runs_dry_gets_more_up_to_a_bound_and_loses_it_again(pace: Pace) -> None:
    for _ in range(100):
        pace.on_turn(0)
    sample(pace, 20e6)
    assert pace.unsent_limit == int(20e6 / 8 * UNSENT_DRY_S)
    for _ in range(100):
        pace.on_turn(1)
    sample(pace, 20e6)
    assert pace.unsent_limit == int(20e6 / 8 * UNSENT_S)


@given(rates=st.lists(st.floats(0, 1e12)), frame_max=st.integers(1, FRAME_MAX), unsent=st.integers(0, 1))
def test_no_rate_leads_out_of_bounds(rates: list[float], frame_max: int, unsent: int) -> None:
    pace = Pace(frame_max)
    for rate in rates:
        pace.on_turn(unsent)
        pace.on_sample(rate, rate, False, frame_max)
        assert UNSENT_MIN <= pace.unsent_limit <= UNSENT_MAX
        assert min(FRAME_MIN, frame_max) <= pace.frame_bytes <= frame_max
        assert pace.frame_bytes <= max(FRAME_MIN, rate / 8 * UNSENT_DRY_S * FRAME_SHARE)
