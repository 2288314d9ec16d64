"""Rates from the differences of answers."""

from forwarder.top.meters import PAST, UNKNOWN, Meters, Rates
from tests.forwarder.top.answers import carrier, instance, session, tunnel


def test_rates_are_differences_by_the_time_of_the_instance() -> None:
    meters = Meters()
    meters.on_answer(instance(10.0, tunnel("web", session("a", carrier(0, counts=(100, 10))), counts=(1000, 500))))
    assert meters.rates[("web",)] == meters.total == UNKNOWN
    meters.on_answer(instance(12.0, tunnel("web", session("a", carrier(0, counts=(300, 10))), counts=(2000, 500))))
    assert meters.rates[("web",)] == meters.total == Rates(4000.0, 0.0)
    assert meters.rates[("web", "a")] == meters.rates[("web", "a", 0, 0)] == Rates(800.0, 0.0)


def test_time_is_that_between_the_looks_of_the_worker_where_carriers_tell_it() -> None:
    meters = Meters()
    meters.on_answer(instance(10.0, tunnel("web", session("a", carrier(0, age_s=60.0)))))
    late = carrier(0, age_s=64.0, counts=(2000, 0))
    meters.on_answer(instance(11.0, tunnel("web", session("a", late), counts=(4000, 0)), tunnel("ssh")))
    assert meters.rates[("web", "a", 0, 0)] == Rates(4000.0, 0.0)
    assert meters.rates[("web",)] == Rates(8000.0, 0.0)
    other = carrier(0, age_s=99.0, counts=(3000, 0))
    meters.on_answer(instance(12.0, tunnel("web", session("a", other), counts=(5000, 0))))
    assert meters.rates[("web", "a", 0, 0)] == meters.rates[("web",)] == Rates(8000.0, 0.0)


def test_carrier_that_is_new_counts_from_nothing() -> None:
    meters = Meters()
    meters.on_answer(instance(10.0, tunnel("web", session("a", carrier(0)))))
    late, old = carrier(1, counts=(100, 50), age_s=1.5), carrier(2, counts=(900, 900), age_s=99.0)
    meters.on_answer(instance(12.0, tunnel("web", session("a", carrier(0), late, old))))
    assert meters.rates[("web", "a", 0, 1)] == Rates(400.0, 200.0)
    assert meters.rates[("web", "a", 0, 2)] == UNKNOWN
    assert meters.rates[("web", "a")] == Rates(400.0, 200.0)


def test_count_that_falls_has_no_rate() -> None:
    meters = Meters()
    meters.on_answer(instance(10.0, tunnel("web", session("a", carrier(0, counts=(100, 10))), counts=(1000, 10))))
    meters.on_answer(instance(11.0, tunnel("web", session("a", carrier(0, counts=(5, 20))), counts=(900, 20))))
    assert meters.rates[("web",)] == meters.rates[("web", "a", 0, 0)] == UNKNOWN
    assert meters.total == Rates(0.0, 0.0)


def test_another_process_or_another_start_begins_anew() -> None:
    for second in (instance(20.0, tunnel("web", counts=(9, 9)), pid=1), instance(5.0, tunnel("web", counts=(9, 9)))):
        meters = Meters()
        meters.on_answer(instance(10.0, tunnel("web")))
        meters.on_answer(second)
        assert meters.total == UNKNOWN


def test_silence_is_a_gap_in_the_past() -> None:
    meters = Meters()
    meters.on_answer(instance(1.0, tunnel("web")))
    meters.on_answer(instance(2.0, tunnel("web", counts=(1000, 0))))
    meters.on_silence()
    meters.on_answer(instance(4.0, tunnel("web", counts=(2000, 0))))
    meters.on_answer(instance(5.0, tunnel("web", counts=(2125, 0))))
    assert list(meters.past.ins) == list(meters.pasts["web"].ins) == [None, 8000.0, None, None, 1000.0]
    assert meters.rates[("web",)] == Rates(1000.0, 0.0)


def test_what_is_gone_is_forgotten_and_the_past_is_bounded() -> None:
    meters = Meters()
    for second in range(PAST + 5):
        meters.on_answer(instance(float(second), tunnel("web", session("a", carrier(second % 7)))))
    assert (len(meters.past.ins), len(meters.rates)) == (PAST, 3)
    meters.on_answer(instance(float(PAST + 5), tunnel("ssh")))
    assert (set(meters.pasts), set(meters.rates)) == ({"ssh"}, {("ssh",)})
