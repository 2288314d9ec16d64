"""The loss of one direction, against a list of all reports."""

from hypothesis import given
from hypothesis import strategies as st

from workers.core.loss_meter import CHANCE, WINDOW_MAX_US, WINDOW_RECORDS, WINDOW_US, LossMeter

SECOND = 1_000_000


def test_nothing_reported_is_no_loss() -> None:
    meter = LossMeter()
    assert (meter.sent, meter.ratio, meter.credible) == (0, 0.0, 0.0)
    meter.forgive()
    assert meter.lost == 0


def test_first_report_counts_from_the_first_record() -> None:
    meter = LossMeter()
    assert meter.on_report(70, 99, SECOND) == (100, 30)
    assert (meter.sent, meter.lost, meter.ratio) == (100, 30, 0.3)


def test_few_losses_may_be_chance() -> None:
    meter = LossMeter()
    meter.on_report(10 - CHANCE, 9, SECOND)
    meter.on_report(20 - CHANCE, 19, SECOND)
    assert (meter.ratio, meter.credible) == (CHANCE / 20, 0.0)
    meter.on_report(29 - CHANCE, 29, SECOND)
    assert meter.credible == 0.0
    meter.on_report(39 - CHANCE, 39, SECOND)
    assert meter.credible == 1 / 40


def test_loss_is_credible_when_the_next_report_confirms_it() -> None:
    overtaken, lost = LossMeter(), LossMeter()
    for meter in (overtaken, lost):
        meter.on_report(80, 99, SECOND)
        assert meter.credible == 0.0
    overtaken.on_report(180, 179, SECOND)
    lost.on_report(180, 199, SECOND)
    assert overtaken.credible == 0.0
    assert lost.credible == (20 - CHANCE) / 200


def test_record_that_came_late_is_no_loss_in_the_end() -> None:
    meter = LossMeter()
    assert meter.on_report(9, 9, SECOND) == (10, 1)
    assert meter.on_report(20, 18, SECOND) == (9, -2)
    assert (meter.sent, meter.lost, meter.ratio) == (19, -1, 0.0)


def test_report_that_was_overtaken_or_goes_back_is_left_out() -> None:
    meter = LossMeter()
    meter.on_report(90, 99, SECOND)
    assert meter.on_report(80, 79, SECOND) == (0, 0)
    assert meter.on_report(50, 150, SECOND) == (0, 0)
    assert meter.on_report(90, 99, SECOND) == (0, 0)
    assert (meter.sent, meter.lost) == (100, 10)


def test_probe_that_was_too_large_is_forgiven_and_expires_with_its_report() -> None:
    meter = LossMeter()
    meter.on_report(9, 9, 0)
    meter.forgive()
    assert meter.lost == 0
    meter.on_report(9 + WINDOW_RECORDS, 9 + WINDOW_RECORDS, WINDOW_US + 1)
    assert (meter.sent, meter.lost) == (WINDOW_RECORDS, 0)


def test_new_window_forgets_what_was_lost() -> None:
    meter = LossMeter()
    meter.on_report(0, 99, SECOND)
    meter.forget()
    assert meter.ratio == 0.0
    assert meter.on_report(10, 109, SECOND) == (10, 0)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.integers(0, 5 * SECOND)), max_size=60))
def test_window_holds_the_young_reports_and_as_many_old_ones_as_are_needed(steps: list[tuple[int, int, int]]) -> None:
    meter, now_us, received, highest = LossMeter(), 0, 0, -1
    reports: list[tuple[int, int, int]] = []
    for sent, lost, wait_us in steps:
        now_us += wait_us
        came = max(sent - lost, 0)
        received, highest = received + came, highest + sent
        meter.on_report(received, highest, now_us)
        if sent:
            reports.append((now_us, sent, sent - came))
        kept: list[tuple[int, int, int]] = []
        for report in reversed(reports):
            age_us, records = now_us - report[0], sum(each[1] for each in kept)
            if age_us > WINDOW_US and (age_us > WINDOW_MAX_US or records >= WINDOW_RECORDS):
                break
            kept.append(report)
        assert (meter.sent, meter.lost) == (sum(each[1] for each in kept), sum(each[2] for each in kept))
        assert 0 <= meter.credible <= meter.ratio <= 1
