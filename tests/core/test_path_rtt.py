"""Round-trip estimates, and when a path counts as stalled."""

from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from workers.core import frame
from workers.core.path import Path
from workers.core.retain import SentFrame
from workers.core.rtt import INITIAL_RTO_US, MAX_RTO_US, MIN_RTO_US, RttEstimator
from workers.core.stream import Stream

MS = 1000


def kept(offset: int = 0) -> SentFrame:
    return SentFrame(cast(Stream, None), frame.DATA, offset, 1, -1)


def test_first_sample_is_taken_whole() -> None:
    rtt = RttEstimator()
    assert (rtt.srtt_us, rtt.rto_us) == (0, INITIAL_RTO_US)
    rtt.on_sample(400 * MS)
    assert (rtt.srtt_us, rtt.rttvar_us) == (400 * MS, 200 * MS)
    assert rtt.rto_us == 1200 * MS


def test_later_samples_are_smoothed() -> None:
    """RFC 6298, 2.3: beta 1/4, alpha 1/8, the variance first."""
    rtt = RttEstimator()
    rtt.on_sample(400 * MS)
    rtt.on_sample(800 * MS)
    assert rtt.rttvar_us == 200 * MS * 3 // 4 + 400 * MS // 4
    assert rtt.srtt_us == 400 * MS * 7 // 8 + 800 * MS // 8


def test_timeout_has_bounds() -> None:
    rtt = RttEstimator()
    rtt.on_sample(50)
    assert rtt.rto_us == 2 * 50 + MIN_RTO_US
    for _ in range(50):
        rtt.on_sample(60_000 * MS)
    assert rtt.rto_us == MAX_RTO_US


@given(st.lists(st.integers(1, 20_000_000), min_size=1))
def test_estimate_stays_among_the_samples(samples: list[int]) -> None:
    rtt = RttEstimator()
    for sample in samples:
        rtt.on_sample(sample)
    assert min(samples) - 8 <= rtt.srtt_us <= max(samples)
    assert min(samples) <= rtt.srtt_us <= max(samples)
    assert MIN_RTO_US <= rtt.rto_us <= MAX_RTO_US


def test_frame_sent_once_gives_a_sample_and_one_sent_again_does_not() -> None:
    path, other = Path(0, 0, 0), Path(0, 1, 0)
    once, twice = kept(), kept()
    other.on_sent(twice, 0)
    path.on_sent(once, 0)
    path.on_sent(twice, 1 * MS)
    path.on_received(twice, 2 * MS)
    assert path.rtt.srtt_us == 0
    path.on_received(once, 5 * MS)
    assert path.rtt.srtt_us == 5 * MS


def test_path_waits_for_what_was_sent_last_on_it() -> None:
    path, other = Path(0, 0, 0), Path(0, 1, 0)
    frames = [kept(offset) for offset in range(5)]
    for each in frames:
        path.on_sent(each, 0)
    frames[0].done = True
    other.on_sent(frames[1], 0)
    frames[2].queued = True
    assert path.oldest() is frames[3]
    assert list(path.waiting()) == frames[3:]
    assert list(other.waiting()) == [frames[1]]


def test_frame_sent_again_on_the_same_path_waits_at_its_new_place() -> None:
    path = Path(0, 0, 0)
    first, second = kept(0), kept(1)
    path.on_sent(first, 0)
    path.on_sent(second, 0)
    path.on_sent(first, 7)
    assert list(path.waiting()) == [second, first]
    assert path.oldest() is second


def test_highest_place_received_is_remembered() -> None:
    path = Path(0, 0, 0)
    first, second = kept(0), kept(1)
    path.on_sent(first, 0)
    path.on_sent(second, 0)
    path.on_received(second, 1)
    path.on_received(first, 1)
    assert path.acked_place == second.place == 1


def test_timeout_grows_with_stalls_and_a_receipt_ends_that() -> None:
    path, each = Path(0, 0, 0), kept()
    path.on_sent(each, 0)
    assert not path.is_late(each, INITIAL_RTO_US - 1)
    assert path.is_late(each, INITIAL_RTO_US)
    waits = []
    for _ in range(6):
        path.on_stall(0)
        waits.append(path.retry_us)
    assert waits == [1_000_000, 2_000_000, 4_000_000, 8_000_000, MAX_RTO_US, MAX_RTO_US]
    assert not path.is_late(each, 4 * INITIAL_RTO_US - 1)
    assert path.is_late(each, 4 * INITIAL_RTO_US)
    path.stalled = True
    path.on_received(each, 5_000_000)
    assert (path.stalled, path.stalls, path.retry_us) == (False, 0, 0)
