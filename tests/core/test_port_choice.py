"""Which port takes a run: shares, weights, blocked ports, and what is left when none is healthy."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core.port import PING_BYTES, Port, PortSettings
from workers.core.port_choice import (
    MANY,
    NARROW_US,
    QUANTUM_MAX,
    QUANTUM_MIN,
    QUANTUM_US,
    TICK_US,
    TURN_US,
    WINDOW,
    PortChoice,
)
from workers.core.port_state import State

MS, SECOND = 1000, 1_000_000
SETTINGS = PortSettings(1472)


def new_port(index: int, now_us: int = 0) -> Port:
    return Port(index, SETTINGS, now_us, lambda: 1.0, accepted=True)


def new_choice(count: int) -> tuple[PortChoice, list[Port]]:
    choice, ports = PortChoice(0), [new_port(index) for index in range(count)]
    for port in ports:
        choice.add(port, 0)
    choice.on_time(TICK_US)
    return choice, ports


def spend(choice: PortChoice, runs: int, size: int = 1000, now_us: int = TICK_US) -> Counter[int]:
    """Send so many runs; the bytes by port."""
    spent: Counter[int] = Counter()
    for _ in range(runs):
        port = choice.next()
        assert port is not None
        choice.on_sent(port, 1, size, now_us)
        spent[port.index] += size
    return spent


def measure(port: Port, sent: int, lost: int, now_us: int, rtt_us: int = 20 * MS) -> None:
    """Let a PONG report on `sent` records, the first of the port, and another one confirm it."""
    for highest in (sent - 1, sent):
        clock = port.on_ping_sent(PING_BYTES, now_us - rtt_us)
        port.on_pong(clock, highest + 1 - lost, highest, PING_BYTES, now_us)


def test_no_port_makes_a_run_wait() -> None:
    choice = PortChoice(0)
    assert choice.next() is None
    choice.on_time(TICK_US)
    assert choice.next() is None
    choice.remove(new_port(0))


def test_first_port_takes_data_at_once_and_others_from_the_next_tick() -> None:
    choice, ports = PortChoice(0), [new_port(0), new_port(1)]
    for port in ports:
        choice.add(port, 0)
    assert spend(choice, 10) == {0: 10_000}
    choice.on_time(choice.next_us)
    assert spend(choice, 10)[1] >= 5_000


def test_next_run_goes_to_another_port() -> None:
    choice, _ = new_choice(10)
    assert spend(choice, 10) == dict.fromkeys(range(10), 1000)


@given(st.lists(st.integers(1, QUANTUM_MAX), min_size=300, max_size=600), st.integers(2, 8))
def test_equal_ports_never_differ_by_more_than_a_run(sizes: list[int], count: int) -> None:
    choice, ports = new_choice(count)
    got = [0] * count
    for size in sizes:
        port = choice.next()
        assert port is not None
        choice.on_sent(port, 1, size, TICK_US)
        got[port.index] += size
        assert max(got) - min(got) <= QUANTUM_MAX
    assert [port.sent_bytes for port in ports] == got


def test_port_that_loses_is_suspended_while_others_are_healthy() -> None:
    choice, ports = new_choice(4)
    for port in ports:
        measure(port, 500, 150 if port.index == 1 else 0, TICK_US)
    choice.on_time(2 * TICK_US)
    assert [port.state for port in ports] == [State.UP, State.SUSPECT, State.UP, State.UP]
    assert 1 not in spend(choice, 30)


@pytest.mark.parametrize("lost", [[100] * 4, [80, 100, 120, 110], [8, 0, 3, 5]])
def test_loss_in_common_and_little_loss_suspend_none(lost: list[int]) -> None:
    choice, ports = new_choice(4)
    for port, each in zip(ports, lost, strict=True):
        measure(port, 1000, each, TICK_US)
    choice.on_time(2 * TICK_US)
    assert all(port.state is State.UP for port in ports)
    assert len(spend(choice, 40)) == 4


def test_lone_port_is_used_whatever_it_loses() -> None:
    choice, (port,) = new_choice(1)
    measure(port, 500, 450, TICK_US)
    choice.on_time(2 * TICK_US)
    assert choice.next() is port


def test_suspended_port_is_used_when_no_healthy_one_is_left() -> None:
    choice, (healthy, lossy, silent) = new_choice(3)
    for port in (healthy, silent):
        measure(port, 500, 0, TICK_US)
    measure(lossy, 500, 150, TICK_US)
    choice.on_time(2 * TICK_US)
    clock = silent.on_ping_sent(PING_BYTES, 2 * TICK_US)
    silent.on_time(clock + silent.late_us)
    assert silent.state is lossy.state is State.SUSPECT
    assert choice.next() is healthy
    healthy.on_close_received(3 * TICK_US)
    assert set(spend(choice, 10)) == {lossy.index}
    lossy.on_close_received(4 * TICK_US)
    assert set(spend(choice, 10)) == {silent.index}
    silent.on_close_received(5 * TICK_US)
    assert choice.next() is None


def test_port_that_comes_up_ends_the_use_of_those_in_doubt() -> None:
    choice, (first, second) = new_choice(2)
    first.suspend(TICK_US)
    second.on_close_received(TICK_US)
    assert choice.next() is first
    fresh = new_port(2)
    choice.add(fresh, 2 * TICK_US)
    assert set(spend(choice, 10)) == {2}


def test_longer_round_trip_gets_less() -> None:
    choice, ports = new_choice(4)
    for port in ports:
        measure(port, 100, 0, SECOND, rtt_us=200 * MS if port.index == 3 else 20 * MS)
    choice.on_time(SECOND)
    spent = spend(choice, 4000)
    assert spent[3] < 0.1 * spent[0]
    assert spent[0] == pytest.approx(spent[1], rel=0.05)


def test_port_that_came_back_gets_a_small_share_first_and_no_arrears() -> None:
    choice, ports = new_choice(4)
    ports[0].standing.on_return(1 / 16, TICK_US)
    choice.on_time(2 * TICK_US)
    spent = spend(choice, 4900)
    assert spent[0] == pytest.approx(100_000, rel=0.05)
    choice.on_time(10 * SECOND)
    spent = spend(choice, 4000)
    assert spent[0] == pytest.approx(1_000_000, rel=0.1)


def test_blocked_port_is_passed_over_and_has_no_arrears() -> None:
    choice, ports = new_choice(3)
    blocked = choice.next()
    assert blocked is ports[0]
    choice.on_blocked(blocked)
    spend(choice, 1000)
    assert blocked.sent_bytes == 0
    choice.on_time(2 * TICK_US)
    assert 0 not in spend(choice, 100)
    choice.on_writable(blocked)
    choice.on_writable(blocked)
    assert spend(choice, 300)[0] == pytest.approx(100_000, rel=0.05)


def test_run_waits_while_all_ports_are_blocked() -> None:
    choice, ports = new_choice(2)
    ports[1].suspend(TICK_US)
    choice.on_blocked(ports[0])
    assert choice.next() is None
    choice.on_time(2 * TICK_US)
    assert choice.next() is None
    choice.on_writable(ports[0])
    assert choice.next() is ports[0]


def test_blocked_port_that_comes_up_again_is_not_blocked() -> None:
    choice = PortChoice(0)
    port = Port(0, SETTINGS, 0, lambda: 1.0)
    for now_us in (0, 20 * SECOND):
        port.on_dial(now_us)
        port.on_established(now_us)
        choice.add(port, now_us)
        assert choice.next() is port
        choice.on_blocked(port)
        port.on_close_received(now_us + 11 * SECOND)
    assert len(choice.ports) == 1


def test_removed_port_gets_nothing() -> None:
    choice, ports = new_choice(3)
    choice.remove(ports[1])
    assert set(spend(choice, 30)) == {0, 2}


def test_run_goes_whole_until_ports_lose_and_is_then_cut_to_what_a_port_moves_in_two_milliseconds() -> None:
    choice, (port,) = new_choice(1)
    assert port.quantum_bytes == QUANTUM_MAX
    measure(port, 500, 100, TICK_US)
    bytes_per_tick = 2_000_000
    now_us = choice.next_us
    for _ in range(3):
        choice.on_sent(port, 1, bytes_per_tick, now_us)
        now_us = choice.next_us
        choice.on_time(now_us)
    assert port.rate_bps == pytest.approx(8 * bytes_per_tick * SECOND / TICK_US, rel=0.1)
    assert port.quantum_bytes == pytest.approx(bytes_per_tick * QUANTUM_US / TICK_US, rel=0.1)
    for _ in range(100):
        now_us += TICK_US
        choice.on_time(now_us)
    assert port.quantum_bytes == QUANTUM_MIN
    port.outward.forget()
    choice.on_time(now_us + NARROW_US)
    assert port.quantum_bytes == QUANTUM_MAX


def test_of_many_ports_a_few_take_part_at_a_time_and_each_has_its_turn() -> None:
    count = 10 * WINDOW
    choice, ports = new_choice(count)
    seen: set[int] = set()
    now_us = TICK_US
    for _ in range(count // WINDOW):
        turn = set(spend(choice, 5 * WINDOW, now_us=now_us))
        assert len(turn) == WINDOW and not turn & seen
        seen |= turn
        for _ in range(TURN_US // TICK_US):
            now_us = choice.next_us
            choice.on_time(now_us)
    assert len(seen) == len(ports)


def test_more_ports_take_part_where_all_lose_alike_and_fewer_again_after_a_while() -> None:
    choice, ports = new_choice(4 * MANY)
    now_us = TICK_US
    for port in ports:
        measure(port, 500, 100, now_us)
    for _ in range(6 * TURN_US // TICK_US):
        now_us = choice.next_us
        choice.on_time(now_us)
    assert len(spend(choice, 10 * len(ports), now_us=now_us)) == len(ports)
    for port in ports:
        port.outward.forget()
    for _ in range((NARROW_US + 8 * TURN_US) // TICK_US):
        now_us = choice.next_us
        choice.on_time(now_us)
    assert len(spend(choice, 5 * WINDOW, now_us=now_us)) == WINDOW


def test_port_that_fails_in_its_turn_is_replaced_by_another() -> None:
    choice, _ = new_choice(2 * MANY)
    failed = choice.next()
    assert failed is not None
    failed.on_close_received(TICK_US)
    took = spend(choice, 5 * WINDOW)
    assert failed.index not in took and len(took) == WINDOW
