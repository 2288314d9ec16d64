"""What is sent a second time because another path would bring it sooner."""

from tests.core.transcript import Side
from workers.core import frame
from workers.core.path import Path
from workers.core.retain import SentFrame
from workers.core.waiting import SLACK_US, STREAMS, Waiting

QUICK_US, SLOW_US = 10_000, 200_000
NOW_US = 5_000_000


def path(index: int, rtt_us: int) -> Path:
    """A path that has brought many frames, each in that time."""
    made = Path(0, index, 1)
    for _ in range(200):
        made.rtt.on_sample(rtt_us)
    return made


def stream_with(side: Side, payload: bytes, on: Path, at_us: int) -> list[SentFrame]:
    """A stream that has sent all it has on one path."""
    stream = side.open()
    kept = [stream.add_data(1, -1) for _ in payload]
    for each in kept:
        on.on_sent(each, at_us)
    side.share.waiting.add(stream)
    return kept


def test_quick_path_takes_what_a_slow_one_has() -> None:
    side, quick = Side(frame.CLIENT), path(1, QUICK_US)
    first, second = stream_with(side, b"ab", path(0, SLOW_US), NOW_US)
    waiting = side.share.waiting
    assert waiting.frame_for(quick, NOW_US) is first
    quick.on_sent(first, NOW_US)
    assert waiting.frame_for(quick, NOW_US) is second
    quick.on_sent(second, NOW_US)
    assert waiting.frame_for(quick, NOW_US + SLOW_US) is None, "twice is enough"


def test_path_that_is_as_quick_gets_nothing_until_the_frame_is_late() -> None:
    side, other = Side(frame.CLIENT), path(1, QUICK_US)
    (only,) = stream_with(side, b"a", path(0, QUICK_US), NOW_US)
    waiting = side.share.waiting
    for age_us in range(0, QUICK_US + SLACK_US, 1000):
        assert waiting.frame_for(other, NOW_US + age_us) is None
    assert waiting.frame_for(other, NOW_US + QUICK_US + SLACK_US + 1000) is only


def test_slow_path_never_takes_from_a_quick_one_what_is_not_late() -> None:
    side = Side(frame.CLIENT)
    stream_with(side, b"a", path(0, QUICK_US), NOW_US)
    assert side.share.waiting.frame_for(path(1, SLOW_US), NOW_US) is None


def test_path_of_unknown_round_trip_takes_nothing() -> None:
    side = Side(frame.CLIENT)
    stream_with(side, b"a", path(0, SLOW_US), NOW_US)
    assert side.share.waiting.frame_for(Path(0, 1, 1), NOW_US + 10 * SLOW_US) is None


def test_every_stream_gets_its_turn() -> None:
    waiting, quick, slow = Waiting(), path(1, QUICK_US), path(0, SLOW_US)
    side = Side(frame.CLIENT)
    streams = 3 * STREAMS
    for _ in range(streams):
        (kept,) = stream_with(side, b"a", slow, NOW_US)
        waiting.add(kept.stream)
    found = []
    while (kept_or_none := waiting.frame_for(quick, NOW_US)) is not None:
        quick.on_sent(kept_or_none, NOW_US)
        found.append(kept_or_none.stream)
    assert len(found) == len(set(found)) == streams


def test_stream_without_anything_on_its_way_does_not_wait() -> None:
    side = Side(frame.CLIENT)
    waiting = side.share.waiting
    stream = side.open()
    waiting.add(stream)
    assert not len(waiting)
