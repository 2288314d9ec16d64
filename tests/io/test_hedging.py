"""When a small frame is copied."""

import time
from types import SimpleNamespace
from typing import Any, cast

import gevent

from workers.core import frame
from workers.core.retain import SentFrame
from workers.core.session import SessionShare
from workers.io.context import Context, clock_us
from workers.io.exchange import Exchange
from workers.io.hedging import COPIES_MAX, COPY_S, Hedging
from workers.io.stripe import Stripe

STREAM = cast(Any, None)
FIRST = cast(Stripe, "first")


class Sender:
    """Stands for the session's egress. `second`: what is kept for copies; `third`: for another."""

    def __init__(self) -> None:
        self.second: object | None = "second"
        self.third: object | None = None
        self.lineup = cast(Any, SimpleNamespace(for_copy=self._for_copy, quickest=lambda: None))
        self.sent: list[tuple[float, SentFrame]] = []
        self.flushed = 0

    def _for_copy(self, sent_on: list[object]) -> object | None:
        return next((each for each in (self.second, self.third) if each is not None and each not in sent_on), None)

    def send_again(self, kept: SentFrame, stripe: Stripe) -> None:
        assert cast(object, stripe) == (self.second if kept.sends == 1 else self.third)
        kept.sends += 1
        self.sent.append((time.monotonic(), kept))

    def hand_kept(self, kept: SentFrame, remote: object) -> bool:
        return False

    def flush(self) -> None:
        self.flushed += 1


def hedging_of(sender: Sender) -> Hedging:
    context = cast(Context, SimpleNamespace(loop=gevent.get_hub().loop))
    return Hedging(context, cast(SessionShare, None), cast(Exchange, None), sender)


def sent_frame() -> SentFrame:
    kept = SentFrame(STREAM, frame.DATA, 0, 64, -1)
    kept.sends = 1
    return kept


def test_copy_follows_a_moment_later_and_only_one() -> None:
    sender = Sender()
    hedging, kept = hedging_of(sender), sent_frame()
    begun = time.monotonic()
    hedging.copy_later(kept, FIRST, clock_us())
    gevent.sleep(5 * COPY_S)
    assert [each for _, each in sender.sent] == [kept]
    assert sender.sent[0][0] - begun >= 0.9 * COPY_S
    assert sender.flushed
    flushed = sender.flushed
    gevent.sleep(3 * COPY_S)
    assert sender.flushed == flushed, "the timer stands still"
    hedging.copy_later(again := sent_frame(), FIRST, clock_us())
    gevent.sleep(5 * COPY_S)
    assert sender.sent[-1][1] is again
    hedging.close()


def test_copies_go_on_each_stripe_that_is_kept_for_them_one_after_the_other() -> None:
    sender = Sender()
    sender.third = "third"
    hedging, kept = hedging_of(sender), sent_frame()
    begun = time.monotonic()
    hedging.copy_later(kept, FIRST, clock_us())
    gevent.sleep(6 * COPY_S)
    times = [when - begun for when, each in sender.sent if each is kept]
    assert len(times) == 2 and times[0] >= 0.9 * COPY_S and times[1] >= 1.8 * COPY_S
    hedging.close()


def test_what_was_received_or_sent_again_meanwhile_is_not_copied() -> None:
    sender = Sender()
    hedging = hedging_of(sender)
    done, resent, queued = (sent_frame() for _ in range(3))
    for kept in (done, resent, queued):
        hedging.copy_later(kept, FIRST, clock_us())
    done.done, resent.sends, queued.queued = True, 2, True
    gevent.sleep(5 * COPY_S)
    assert not sender.sent
    hedging.close()


def test_without_a_stripe_for_copies_there_are_none_and_few_frames_wait() -> None:
    sender = Sender()
    hedging = hedging_of(sender)
    for _ in range(2 * COPIES_MAX):
        hedging.copy_later(sent_frame(), FIRST, clock_us())
    sender.second = None
    gevent.sleep(5 * COPY_S)
    assert not sender.sent
    sender.second = "second"
    for _ in range(2 * COPIES_MAX):
        hedging.copy_later(sent_frame(), FIRST, clock_us())
    gevent.sleep(5 * COPY_S)
    assert len(sender.sent) == COPIES_MAX
    hedging.close()
