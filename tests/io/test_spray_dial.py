"""The client's ports: dialled, answered, forged answers, dialled again, replaced when they are old."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.io.spray_net import FakeWire
from tests.io.spray_world import World, received
from workers.core.datagram import DATA_OVERHEAD
from workers.core.port import DIAL_US
from workers.core.port_state import State
from workers.io import spray_dial
from workers.io.spray_dial import ANSWERS_MAX
from workers.io.spray_ports import GRACE_US

Make = Callable[..., World]


@pytest.fixture
def make(make_unmet: Make) -> Make:
    """They meet when the test says so."""
    return make_unmet


def is_message_1(payload: bytes) -> bool:
    return payload.startswith(b"\xf7F")


def answers(world: World) -> Callable[[FakeWire, bytes], bool]:
    """Loses what the server sends until it is asked to stop."""
    return lambda wire, payload: not wire.is_client


def test_all_ports_come_up_and_are_proven_at_both_ends(make: Make) -> None:
    world = make(ports=3, type="all")
    world.advance(300)
    assert sorted(world.carriers()) == sorted(world.server_carriers()) == list(range(6))
    for index, carrier in world.carriers().items():
        wire, there = world.wire(index), world.net.servers[world.wire(index).local]
        assert wire.calls.count("proven") == there.calls.count("proven") == 1
        assert is_message_1(wire.sent[0]) and not is_message_1(wire.sent[1]) and carrier.port.rtt.srtt_us >= 0
    status = world.client.status(world.now_us)
    assert (status.state, status.sessions[0].carriers_up, status.sessions[0].carriers_wanted) == ("up", 6, 6)
    assert {each.kind for each in status.sessions[0].carriers} == {"tcp", "udp"}
    assert world.client.count_open()["spray_dialling"] == 0


def test_dials_are_paced_and_go_to_each_host_from_each_source_in_turn(make: Make) -> None:
    hosts, sources = ("192.0.2.1", "192.0.2.2"), ("192.0.2.7", "192.0.2.8", "192.0.2.9")
    world = make(ports=30, dial_rate_per_s=50.0, hosts=hosts, sources=sources)
    world.diallers[0].refusal = "refused"
    world.advance(100)
    assert len(world.diallers[0].dialled) == 5
    world.advance(100)
    assert len(world.diallers[0].dialled) == 10
    world.advance(20_000)
    first = [(address, source) for carrier, address, source in world.diallers[0].dialled if carrier == 0]
    assert first[:6] == [((hosts[n % 2], 7001), sources[n % 3]) for n in range(6)]


def test_message_1_goes_again_and_again_until_the_port_gives_up(make: Make) -> None:
    world = make(ports=1)
    world.net.loses = lambda wire, payload: True
    world.advance(100)
    wire = world.diallers[0].wires[0]
    assert len(wire.sent) == 1
    for pause, count in ((300, 2), (500, 3), (1000, 4), (2000, 5)):
        world.advance(pause)
        assert len(wire.sent) == count and not wire.closed
    assert len(set(wire.sent)) == 1
    world.advance(DIAL_US // 1000 - 3600)
    assert wire.closed
    world.net.loses = lambda wire, payload: False
    world.advance(1000)
    assert len(world.diallers[0].dialled) == 2 and set(world.carriers()) == {0}
    assert world.diallers[0].wires[1].sent[0] != wire.sent[0]


def test_lost_answer_is_sent_again(make: Make) -> None:
    world = make(ports=1)
    world.net.loses = lambda wire, payload: not wire.is_client
    world.advance(200)
    world.net.loses = lambda wire, payload: False
    assert not world.carriers()
    world.advance(400)
    there = world.net.servers[world.wire(0).local]
    assert there.sent[0] == there.sent[1] and set(world.server_carriers()) == {0}
    assert len(world.diallers[0].dialled) == 1


def test_second_answer_that_comes_late_changes_nothing(make: Make) -> None:
    world = make(ports=1).up()
    carrier, there = world.carriers()[0], world.net.servers[world.wire(0).local]
    world.net.deliver(there, there.sent[0])
    world.settle()
    assert world.carriers() == {0: carrier} and carrier.counts[0] == 1


def test_forged_answer_before_the_true_one_does_no_harm(make: Make) -> None:
    world = make(ports=1)
    held: list[tuple[FakeWire, bytes]] = []
    world.net.loses = lambda wire, payload: not wire.is_client and not held.append((wire, payload))  # type: ignore[func-returns-value]
    world.advance(100)
    ((there, answer),) = held
    for forged in (b"", b"x", bytes(100), answer[:-1], answer[:-1] + b"?", b"\0\0" + answer[2:], bytes(2000)):
        world.net.deliver(there, forged)
    assert not world.carriers()
    world.net.loses = lambda wire, payload: False
    world.net.deliver(there, answer)
    world.settle()
    assert set(world.carriers()) == set(world.server_carriers()) == {0}


def test_answer_with_more_behind_it_is_taken(make: Make) -> None:
    world = make(ports=1)
    held: list[tuple[FakeWire, bytes]] = []
    world.net.loses = lambda wire, payload: not wire.is_client and not held.append((wire, payload))  # type: ignore[func-returns-value]
    world.advance(100)
    world.net.loses = lambda wire, payload: False
    world.net.deliver(held[0][0], held[0][1] * 2)
    assert set(world.carriers()) == {0}


def test_forger_costs_no_more_than_so_many_looks(make: Make) -> None:
    world = make(ports=1)
    held: list[tuple[FakeWire, bytes]] = []
    world.net.loses = lambda wire, payload: not wire.is_client and not held.append((wire, payload))  # type: ignore[func-returns-value]
    world.advance(100)
    wire = world.diallers[0].wires[0]
    for _ in range(ANSWERS_MAX):
        world.net.deliver(held[0][0], bytes(100))
    world.net.loses = lambda wire, payload: False
    world.net.deliver(*held[0])
    assert not world.carriers() and "opened" not in wire.calls
    world.advance(7000)
    assert set(world.carriers()) == {0} and len(world.diallers[0].dialled) == 2


def test_reset_while_dialling_is_believed_and_dialled_again_after_a_pause(make: Make) -> None:
    world = make(ports=1)
    world.net.loses = lambda wire, payload: True
    world.advance(100)
    wire = world.diallers[0].wires[0]
    assert wire.owner is not None
    wire.owner.on_writable(wire)
    wire.owner.on_reset(wire)
    assert wire.closed and world.client.count_open()["spray_dialling"] == 0
    world.net.loses = lambda wire, payload: False
    world.advance(500)
    assert set(world.carriers()) == {0}


def test_wire_that_comes_for_nobody_is_closed(make: Make) -> None:
    world = make(ports=1)
    wire = world.net.connect(0, "late:1")
    world.client._dialler.on_wire(0, wire)
    world.client._dialler.on_no_wire(0, "late, too")
    assert wire.closed


def test_failing_dials_come_less_and_less_often(make: Make) -> None:
    world = make()
    world.diallers[0].refusal, world.diallers[0].refused = "refused", {1}
    world.advance(20_000)
    times = [carrier for carrier, _, _ in world.diallers[0].dialled]
    assert times.count(0) == 1 and 5 <= times.count(1) <= 12
    assert world.client.status(world.now_us).state == "degraded"


def test_dead_port_is_dialled_again_and_the_other_carries_on(make: Make) -> None:
    world = make().up()
    dead = world.wire(0)
    world.net.loses = lambda wire, payload: dead in (wire, world.net.clients.get(wire.peer))
    for number in range(40):
        world.app.send(b"%d" % number)
        world.advance(100)
    assert dead.closed and set(world.carriers()) == {0, 1} and len(world.diallers[0].dialled) == 3
    assert len(received(world.target)) >= 36


def test_closed_by_the_server_it_is_dialled_again_at_once(make: Make) -> None:
    world = make(ports=1).up()
    before = world.carriers()[0]
    there = world.server_carriers()[0]
    session = next(iter(world.server.sessions()))
    session.remove(there, world.now_us)
    world.settle()
    assert world.diallers[0].wires[0].closed
    assert set(world.carriers()) == {0} and world.carriers()[0] is not before


# Rotation


def test_old_port_goes_when_the_new_one_is_there(make: Make) -> None:
    world = make(ports=1, rotate_after_s=60.0).up()
    old, carrier = world.wire(0), world.carriers()[0]
    number = 0
    while not old.closed:
        world.app.send(b"%d" % number)
        world.advance(100)
        number += 1
        assert world.carriers() and number < 650
    assert number > 290 and len(world.diallers[0].dialled) == 2
    assert world.carriers()[0] is not carrier and world.carriers()[0].port is world.client._dialler.ports[0]
    assert set(world.server_carriers()) == {0}
    assert len(received(world.target)) == number and world.client.session.dropped == 0
    assert not world.wire(0).closed and len(world.client.session._choice.ports) == 1


def test_what_was_on_its_way_when_a_port_was_replaced_arrives(make: Make) -> None:
    world = make(ports=1, rotate_after_s=60.0).up()
    world.app.send(b"question")
    world.settle()
    _, source = world.target.recvfrom(100)
    old, old_carrier = world.wire(0), world.carriers()[0]
    held: list[tuple[FakeWire, bytes]] = []

    def hold(wire: FakeWire, payload: bytes) -> bool:
        """These two datagrams take longer than all else; a dial takes as long as they last."""
        is_data = len(payload) - DATA_OVERHEAD in (600, 700)
        if is_data:
            held.append((wire, payload))
        return is_data or (is_message_1(payload) and len(held) < 2)

    world.net.loses = hold
    while world.carriers()[0] is old_carrier:
        if world.client._dialler.dialling and not held:
            world.app.send(bytes(600))
            world.target.sendto(bytes(700), source)
            world.settle()
        world.app.send(b"so that the conversation lasts")
        world.advance(100)
        received(world.target)
    there = next(wire for wire, _ in held if not wire.is_client)
    world.net.loses = lambda wire, payload: False
    for wire, payload in held:
        world.net.deliver(wire, payload)
    world.settle()
    assert bytes(600) in received(world.target) and bytes(700) in received(world.app)
    assert not old.closed and not there.closed and len(world.client.session._choice.ports) == 1
    world.advance(GRACE_US // 1000 + 200)
    assert old.closed and there.closed and not world.wire(0).closed
    assert not world.client.session.ports._replaced and set(world.server_carriers()) == {0}
    assert len(world.diallers[0].dialled) == 2 and old_carrier.port.state is State.CLOSED


def test_old_port_stays_while_no_new_one_comes_and_dials_pause(make: Make) -> None:
    world = make(ports=1, rotate_after_s=2.0).up()
    old = world.wire(0)
    world.diallers[0].refusal = "refused"
    world.advance(12_000)
    assert not old.closed and set(world.carriers()) == {0}
    assert 4 <= len(world.diallers[0].dialled) <= 10
    world.diallers[0].refusal = ""
    world.advance(9000)
    assert world.wire(0) is not old and set(world.carriers()) == set(world.server_carriers()) == {0}


def test_old_port_that_dies_while_its_successor_is_dialled_is_dialled_once(make: Make) -> None:
    world = make(ports=1, rotate_after_s=2.0).up()
    world.net.loses = lambda wire, payload: True
    world.advance(8000)
    world.net.loses = lambda wire, payload: False
    world.advance(9000)
    assert set(world.carriers()) == set(world.server_carriers()) == {0}
    assert world.client.count_open()["spray_dialling"] <= 1


# The end


def test_nothing_is_dialled_after_the_end(make: Make) -> None:
    world = make(ports=2)
    world.net.loses = lambda wire, payload: True
    world.advance(100)
    wires = list(world.diallers[0].wires)
    world.client._dialler.stop()
    world.advance(2000)
    assert all(wire.closed for wire in wires) and len(world.diallers[0].dialled) == 2
    assert world.client.count_open()["spray_dialling"] == 0


def test_name_that_is_not_known_fails_the_dial(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no such name")

    monkeypatch.setattr(spray_dial.green_socket, "getaddrinfo", fails)
    monkeypatch.setattr(spray_dial.gevent, "spawn", lambda function, *arguments: function(*arguments))
    world = make(ports=1, hosts=("server.invalid",))
    world.advance(100)
    assert world.diallers[0].dialled == [] and world.client.count_open()["spray_dialling"] == 0


def test_name_is_looked_up_for_the_family_of_the_source(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def finds(host: str, port: int, family: int, kind: int) -> Any:
        asked.append((host, port, int(family)))
        return [
            (family, kind, 17, "", ("2001:db8::1", port, 0, 0)),
            (family, kind, 17, "", ("2001:db8::2", port, 0, 0)),
        ]

    monkeypatch.setattr(spray_dial.green_socket, "getaddrinfo", finds)
    monkeypatch.setattr(spray_dial.gevent, "spawn", lambda function, *arguments: function(*arguments))
    world = make(ports=1, hosts=("server.example",), sources=("2001:db8::9",))
    world.advance(100)
    assert asked == [("server.example", 7001, 10)]
    assert world.diallers[0].dialled == [(0, ("2001:db8::1", 7001), "2001:db8::9")]
