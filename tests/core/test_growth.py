"""How a window grows with a sender that says it is blocked."""

import pytest

from workers.core import frame
from workers.core.credit import INITIAL_FRAMES, INITIAL_WINDOW, CreditPool, ReceiveWindow, reserve_bytes
from workers.core.stream import Stream

CAP = 1 << 20


def opened(pool: CreditPool, cap: int = CAP) -> ReceiveWindow:
    assert pool.reserve(reserve_bytes(INITIAL_WINDOW))
    return ReceiveWindow(pool, cap, 0)


def read_all(window: ReceiveWindow, now_us: int) -> None:
    """The application takes all that was allowed, so slowly that its rate alone grows nothing; new credit is told."""
    window.on_consumed(window.credit - window.consumed, 1, now_us, 1)
    window.announce()


def test_window_doubles_each_time_the_sender_uses_up_the_last_growth() -> None:
    window = opened(CreditPool(1 << 30))
    sizes = []
    while window.window < CAP:
        assert window.on_blocked(window.credit, window.consumed)
        assert not window.on_blocked(window.credit, window.consumed), "that the sender cannot know of yet"
        read_all(window, len(sizes) + 1 << 40)
        sizes.append(window.window)
    assert sizes == [INITIAL_WINDOW << n for n in range(1, 7)]
    assert not window.on_blocked(window.credit, window.consumed)


def test_window_stays_when_the_application_does_not_keep_up() -> None:
    window = opened(CreditPool(1 << 30))
    assert not window.on_blocked(INITIAL_WINDOW, INITIAL_WINDOW // 2 + 1)
    assert window.window == INITIAL_WINDOW
    assert window.on_blocked(INITIAL_WINDOW, INITIAL_WINDOW // 2)


def test_exhausted_pool_keeps_the_window() -> None:
    window = opened(CreditPool(reserve_bytes(INITIAL_WINDOW) + 1000))
    assert not window.on_blocked(INITIAL_WINDOW, 0)
    assert window.window == INITIAL_WINDOW


@pytest.mark.parametrize(("length", "blocked"), [(INITIAL_WINDOW // 2, False), (INITIAL_WINDOW // 2 + 1, True)])
def test_frame_says_when_another_like_it_would_exceed_the_credit(length: int, blocked: bool) -> None:
    stream = Stream(frame.flow_id(frame.CLIENT, 0, 0, 1, 0), 1, CreditPool(1 << 30), CAP, 0)
    assert stream.is_blocked_after(length) is blocked


def test_frame_says_when_it_is_the_last_that_may_be_sent() -> None:
    stream = Stream(frame.flow_id(frame.CLIENT, 0, 0, 1, 0), 1, CreditPool(1 << 30), CAP, 0)
    for number in range(1, INITIAL_FRAMES + 1):
        assert stream.is_blocked_after(1) is (number == INITIAL_FRAMES)
        stream.add_data(1, 0)
