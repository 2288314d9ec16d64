"""Ten ports of which three are bad: after three seconds they cost next to nothing, and the others share evenly."""

import pytest

from tests.core.simulated_ports import CLIENT, MS, SECOND, SERVER, Simulation, Wire
from workers.core.port_state import State

SEEDS = range(3)
MANY_SEEDS = range(10)
BLOCKED, RESET, LOSSY = 2, 5, 7


def ten(blocked_from_us: int, loss: tuple[float, float] = (0.3, 0.3)) -> list[Wire]:
    wires = [Wire() for _ in range(10)]
    wires[BLOCKED].is_blocked = lambda now_us, _: now_us >= blocked_from_us
    wires[RESET].reset_every_us = SECOND
    wires[LOSSY].loss = loss
    return wires


def check_three_bad_ports(simulation: Simulation, ends: tuple[int, ...], seconds: float) -> None:
    simulation.run(3)
    simulation.mark()
    simulation.run(seconds)
    for end in ends:
        assert simulation.loss(end) <= 0.005, (end, simulation.lost[end])
        shares = [simulation.sent[end][index] for index in range(10) if index not in (BLOCKED, RESET, LOSSY)]
        mean = sum(shares) / len(shares)
        assert all(abs(share - mean) <= 0.1 * mean for share in shares), (end, simulation.sent[end])
    assert simulation.waited == 0


@pytest.mark.parametrize("seed", MANY_SEEDS)
@pytest.mark.parametrize("blocked_from_us", [0, 500 * MS])
def test_three_bad_ports_of_ten_cost_next_to_nothing(blocked_from_us: int, seed: int) -> None:
    simulation = Simulation(ten(blocked_from_us), seed)
    check_three_bad_ports(simulation, (CLIENT, SERVER), 10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("end", [CLIENT, SERVER])
def test_data_one_way_is_measured_as_well(end: int, seed: int) -> None:
    datagrams = (4, 0) if end == CLIENT else (0, 4)
    simulation = Simulation(ten(500 * MS, (0.0, 0.3) if end == CLIENT else (0.3, 0.0)), seed, datagrams)
    check_three_bad_ports(simulation, (end,), 10)


@pytest.mark.parametrize("seed", SEEDS)
def test_port_blocked_in_one_direction_is_given_up_by_both(seed: int) -> None:
    wires = [Wire() for _ in range(4)]
    wires[1].is_blocked = lambda now_us, towards: now_us >= 2 * SECOND and towards == SERVER
    simulation = Simulation(wires, seed)
    simulation.run(2)
    assert simulation.up(CLIENT) == simulation.up(SERVER) == [0, 1, 2, 3]
    simulation.run(2.5)
    assert simulation.up(CLIENT) == simulation.up(SERVER) == [0, 2, 3]


@pytest.mark.parametrize("seed", SEEDS)
def test_port_that_is_blocked_while_it_carries_data_costs_half_a_second_of_its_share(seed: int) -> None:
    wires = [Wire() for _ in range(10)]
    wires[1].is_blocked = lambda now_us, _: now_us >= 5 * SECOND
    simulation = Simulation(wires, seed)
    simulation.run(4.5)
    simulation.mark()
    simulation.run(4)
    assert 0 < simulation.lost[CLIENT].total() <= 4000 * 0.5 / 10
    assert 0 < simulation.lost[SERVER].total() <= 4000 * 0.5 / 10


@pytest.mark.parametrize("seed", SEEDS)
def test_dead_port_comes_back_within_seconds(seed: int) -> None:
    wires = [Wire() for _ in range(4)]
    wires[3].is_blocked = lambda now_us, _: 2 * SECOND <= now_us < 30 * SECOND
    simulation = Simulation(wires, seed)
    simulation.run(29)
    assert simulation.up(CLIENT) == [0, 1, 2]
    assert simulation.dials[3] < 10
    simulation.run(9.5)
    assert simulation.up(CLIENT) == simulation.up(SERVER) == [0, 1, 2, 3]
    simulation.run(1)
    simulation.mark()
    simulation.run(5)
    assert simulation.sent[CLIENT][3] == pytest.approx(5000, rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_lone_lossy_port_still_carries_everything(seed: int) -> None:
    simulation = Simulation([Wire(loss=(0.1, 0.1))], seed)
    simulation.run(10)
    simulation.mark()
    simulation.run(10)
    assert simulation.sent[CLIENT][0] >= 0.98 * 40_000
    assert 0.08 <= simulation.loss(CLIENT) <= 0.12


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_that_all_have_in_common_suspends_none(seed: int) -> None:
    simulation = Simulation([Wire(loss=(0.05, 0.05)) for _ in range(10)], seed)
    simulation.run(3)
    simulation.mark()
    simulation.run(10)
    shares = [simulation.sent[CLIENT][index] for index in range(10)]
    assert min(shares) > 0.5 * sum(shares) / 10
    assert simulation.waited == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_healthy_ports_share_within_a_twentieth(seed: int) -> None:
    simulation = Simulation([Wire(delay_us=20 * MS + index * 100) for index in range(10)], seed, (7, 13))
    simulation.run(1)
    simulation.mark()
    simulation.run(5)
    for end, rate in ((CLIENT, 7000), (SERVER, 13000)):
        for index in range(10):
            assert simulation.sent[end][index] == pytest.approx(rate * 5 / 10, rel=0.05)
    assert simulation.lost[CLIENT].total() == simulation.lost[SERVER].total() == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_forged_resets_end_no_port_and_cost_nothing(seed: int) -> None:
    simulation = Simulation([Wire() for _ in range(3)], seed)
    simulation.run(2)
    simulation.mark()
    for _ in range(100):
        simulation.reset(1, is_forged=True)
        simulation.run(0.1)
    assert simulation.lost[CLIENT].total() == 0
    assert simulation.dials == {0: 1, 1: 1, 2: 1}
    assert simulation.sent[CLIENT][1] > 0.9 * simulation.sent[CLIENT][0]
    assert simulation.ports[1].forged_resets <= 2


@pytest.mark.parametrize("seed", SEEDS)
def test_pause_of_all_ports_ends_none(seed: int) -> None:
    """As when a route changes: for a second nothing passes, and then all goes on with the same ports."""
    wires = [Wire(is_blocked=lambda now_us, _: 5 * SECOND <= now_us < 6 * SECOND) for _ in range(6)]
    simulation = Simulation(wires, seed)
    simulation.run(7)
    assert simulation.up(CLIENT) == simulation.up(SERVER) == list(range(6))
    assert simulation.dials.total() == 6
    simulation.mark()
    simulation.run(4)
    assert simulation.loss(CLIENT) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_path_mtu_is_found_also_below_the_base(seed: int) -> None:
    wires = [Wire(mtu=1400), Wire(mtu=1472), Wire(mtu=1000)]
    simulation = Simulation(wires, seed, datagrams=(0, 0))
    simulation.run(12)
    sizes = [port.mtu.size for port in simulation.ports]
    assert 1400 - 16 <= sizes[0] <= 1400
    assert sizes[1] == 1472
    assert 1000 - 16 <= sizes[2] <= 1000
    assert all(port.state is State.UP for port in simulation.ports)
    assert all(port.outward.credible == 0 for port in simulation.ports)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("delay_us", [500, 100 * MS, 300 * MS])
def test_shares_are_even_whatever_the_round_trip(delay_us: int, seed: int) -> None:
    """Records overtake each other by up to a twentieth of the delay: that is no loss."""
    simulation = Simulation([Wire(delay_us=delay_us) for _ in range(10)], seed)
    simulation.run(3)
    simulation.mark()
    simulation.run(5)
    for end in (CLIENT, SERVER):
        assert simulation.lost[end].total() == 0
        assert all(simulation.sent[end][index] == pytest.approx(2000, rel=0.05) for index in range(10))


@pytest.mark.parametrize("seed", SEEDS)
def test_idle_ports_are_pinged_now_and_then_by_the_client(seed: int) -> None:
    simulation = Simulation([Wire() for _ in range(5)], seed, datagrams=(0, 0))
    simulation.run(10)
    before = sum(port.sent_records for choice in simulation.choices for port in choice.ports)
    simulation.run(100)
    pings = sum(port.sent_records for choice in simulation.choices for port in choice.ports) - before
    assert 45 <= pings <= 60


@pytest.mark.parametrize("seed", SEEDS)
def test_path_mtu_that_falls_is_noticed_within_seconds(seed: int) -> None:
    """A black hole for full records while small ones pass (RFC 8899, 4.3), on one port and on all."""
    for fallen in (range(1), range(4)):
        wires = [Wire() for _ in range(4)]
        simulation = Simulation(wires, seed)
        simulation.datagram = 9000
        simulation.run(3)
        assert [port.mtu.size for port in simulation.ports] == [1472] * 4
        for index in fallen:
            wires[index].mtu = 1300
        simulation.run(4)
        assert [port.mtu.size <= 1300 for port in simulation.ports] == [index in fallen for index in range(4)]
        simulation.mark()
        simulation.run(8)
        assert simulation.lost[CLIENT].total() == 0
        assert all(simulation.ports[index].mtu.size >= 1300 - 16 for index in fallen)
