"""Datagrams between both ends of a spray tunnel, over wires that the test opens, blocks and loses."""

from collections.abc import Callable

import pytest

from tests.io.spray_world import World, received
from workers.core.cuts import ROOM, Datagrams
from workers.core.datagram import DATA_OVERHEAD
from workers.io import spray_waiting

Make = Callable[..., World]
CONVERSATION = 0x00ABCDEF


def numbered(count: int, size: int) -> list[bytes]:
    return [number.to_bytes(4, "big").ljust(size, b"%d" % (number % 10)) for number in range(count)]


def send(world: World, datagrams: list[bytes], conversation: int = CONVERSATION) -> None:
    """As if they had come together from one application, all of one size, the last perhaps shorter."""
    size = len(datagrams[0])
    source = Datagrams(bytearray(ROOM) + b"".join(datagrams))
    world.client.session.send(conversation, source, 0, len(datagrams), size, len(datagrams[-1]), world.now_us)


def block(world: World, room: int = 0) -> None:
    for carrier in world.carriers().values():
        carrier.wire.room = room  # type: ignore[attr-defined]


def unblock(world: World) -> None:
    for index in list(world.carriers()):
        world.wire(index).unblock()


@pytest.mark.parametrize("size", [0, 1, 1399, 1472, 1473, 9000, 65507])
def test_datagram_of_any_size_arrives_whole_and_its_answer_returns(make: Make, size: int) -> None:
    world = make()
    data = bytes(index % 251 for index in range(size))
    world.app.send(data)
    world.settle()
    got, source = world.target.recvfrom(65536)
    world.target.sendto(data[::-1], source)
    world.settle()
    assert (got, received(world.app)) == (data, [data[::-1]])
    assert world.client.session.bytes_out == world.client.session.bytes_in == size
    assert set(world.client.count_open().values()) == set(world.server.count_open().values()) == {0}


def test_runs_are_shared_by_ports_and_arrive_in_order_per_port(make: Make) -> None:
    world = make(ports=4)
    sent = numbered(400, 1000)
    for start in range(0, 400, 40):
        send(world, sent[start : start + 40])
    world.settle()
    assert sorted(received(world.target)) == sent
    loads = [world.carriers()[index].bytes_out for index in range(4)]
    assert sum(loads) == 400_000 and min(loads) > 50_000


# The wire takes a run in part, or nothing


def test_run_taken_in_part_waits_and_nothing_is_lost_or_sent_twice(make: Make) -> None:
    world = make(ports=1)
    sent = numbered(10, 500)
    block(world, 3 * (500 + DATA_OVERHEAD) + 7)
    send(world, sent)
    world.settle()
    carrier = world.carriers()[0]
    assert received(world.target) == sent[:3]
    assert carrier.is_blocked and carrier.status(0, world.now_us).in_flight_bytes == 7 * (500 + DATA_OVERHEAD)
    world.wire(0).unblock(2 * (500 + DATA_OVERHEAD))
    world.settle()
    assert received(world.target) == sent[3:5] and carrier.is_blocked
    world.wire(0).unblock()
    world.settle()
    assert received(world.target) == sent[5:] and not carrier.is_blocked
    assert world.client.session.dropped == 0


def test_last_shorter_datagram_of_a_run_waits_too(make: Make) -> None:
    world = make(ports=1)
    sent = [*numbered(3, 500), b"short"]
    block(world, 3 * (500 + DATA_OVERHEAD))
    send(world, sent)
    unblock(world)
    world.settle()
    assert received(world.target) == sent


def test_blocked_port_gets_nothing_while_another_takes_all(make: Make) -> None:
    world = make()
    world.wire(0).room = 0
    before = len(world.wire(0).sent)
    sent = numbered(200, 1000)
    for start in range(0, 200, 20):
        send(world, sent[start : start + 20])
    world.settle()
    held = len(received(world.target))
    assert 160 < held < 200 and len(world.wire(0).sent) == before and world.client.session.has_room
    unblock(world)
    world.settle()
    assert held + len(received(world.target)) == 200


def test_what_no_port_takes_waits_in_order_and_reading_stops_meanwhile(make: Make) -> None:
    world = make()
    block(world)
    sent = numbered(60, 1000)
    for datagram in sent[:50]:
        world.app.send(datagram)
        world.settle()
    assert received(world.target) == [] and not world.client.session.has_room
    for datagram in sent[50:]:
        world.app.send(datagram)
    world.settle()
    unblock(world)
    world.settle()
    assert sorted(received(world.target)) == sent
    assert world.client.session.has_room and world.client.session.dropped == 0


def test_large_datagrams_that_wait_are_sent_as_they_were(make: Make) -> None:
    world = make(ports=1)
    block(world)
    send(world, numbered(1, 100))
    sent = numbered(64, 9000)
    send(world, sent)
    unblock(world)
    world.settle()
    assert received(world.target) == [*numbered(1, 100), *sent]


def test_pieces_wait_when_the_wire_blocks_amid_a_datagram(make: Make) -> None:
    world = make(ports=1)
    data = bytes(range(256)) * 100
    block(world, 5000)
    send(world, [data])
    world.settle()
    assert received(world.target) == [] and not world.client.session.has_room
    unblock(world)
    world.settle()
    assert received(world.target) == [data] and world.client.session.dropped == 0


def test_more_than_may_wait_is_dropped_and_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spray_waiting, "WAITING_BYTES", 20_000)
    world = make(ports=1)
    block(world)
    send(world, numbered(1, 1000))  # the port's own
    for _ in range(5):
        send(world, numbered(7, 1000))
    session = world.client.session
    assert session.dropped == 21
    unblock(world)
    world.settle()
    assert len(received(world.target)) == 15 and session.has_room


def test_without_a_port_datagrams_are_dropped_and_counted(make: Make) -> None:
    world = make(ports=1)
    world.net.loses = lambda wire, payload: True
    world.diallers[0].refusal = "unreachable"
    world.advance(14_000)
    assert not world.carriers() and world.client.session.total_up == 0
    world.app.send(b"into the void")
    send(world, numbered(3, 10))
    world.settle()
    assert world.client.count_open()["spray_dropped"] == 4
    assert world.client.status(world.now_us).state == "connecting"


def test_what_waits_is_dropped_when_the_last_port_goes(make: Make) -> None:
    world = make(ports=1)
    block(world)
    send(world, numbered(1, 100))
    send(world, numbered(5, 100))
    world.net.loses = lambda wire, payload: True
    world.diallers[0].refusal = "unreachable"
    world.advance(14_000)
    assert world.client.session.dropped == 5 and world.client.session.has_room


# Pieces and copies


def test_datagram_is_split_by_the_smallest_port(make: Make) -> None:
    world = make()
    world.diallers[0].most_bytes = {}
    world.carriers()[0].wire.most_bytes = 700
    world.advance(100)
    sent = numbered(20, 5000)
    for datagram in sent:
        send(world, [datagram])
    world.settle()
    assert sorted(received(world.target)) == sent
    assert max(map(len, world.wire(0).sent[-10:])) <= 700
    assert world.client.session.dropped == 0


def test_datagram_that_one_port_takes_whole_and_the_other_does_not_arrives(make: Make) -> None:
    world = make()
    world.carriers()[0].wire.most_bytes = 700
    world.advance(100)
    sent = numbered(50, 1000)
    for datagram in sent:
        send(world, [datagram])
    world.settle()
    assert sorted(received(world.target)) == sent and world.client.session.dropped == 0


def test_lost_piece_loses_one_datagram_and_its_memory_is_given_back(make: Make) -> None:
    world = make(ports=1)
    lost: list[bytes] = []
    world.net.loses = lambda wire, payload: wire.is_client and len(lost) < 1 and not lost.append(payload)  # type: ignore[func-returns-value]
    send(world, [b"x" * 5000])
    send(world, [b"y" * 5000])
    world.settle()
    assert received(world.target) == [b"y" * 5000] and len(lost) == 1
    reassembler = world.server._buffers.reassembler
    assert len(reassembler) == 1
    world.advance(1200)
    send(world, [b"z" * 5000])
    world.settle()
    assert received(world.target) == [b"z" * 5000]
    assert (len(reassembler), reassembler.held_bytes, reassembler.expired) == (0, 0, 1)


def test_copies_go_on_two_ports_and_arrive_once(make: Make) -> None:
    world = make(ports=3, copies=2)
    sent = numbered(60, 300)
    before = {index: world.carriers()[index].port.sent_records for index in range(3)}
    send(world, sent)
    world.settle()
    assert received(world.target) == sent
    records = [world.carriers()[index].port.sent_records - before[index] for index in range(3)]
    assert sum(records) >= 120 and max(records) <= 60


@pytest.mark.parametrize("size", [300, 5000])
def test_copies_survive_the_loss_of_a_port(make: Make, size: int) -> None:
    world = make(ports=2, copies=2)
    dead = world.wire(1)
    world.net.loses = lambda wire, payload: wire is dead
    sent = numbered(40, size)
    send(world, sent)
    world.settle()
    assert received(world.target) == sent


def test_copies_go_on_two_ports_even_if_one_is_far_behind_its_share(make: Make) -> None:
    world = make(ports=2, copies=2)
    world.carriers()[1].port.cost = 64.0
    sent = numbered(40, 300)
    send(world, sent)
    dead = world.wire(0)
    world.net.queue = type(world.net.queue)(each for each in world.net.queue if each[0] is not dead)
    world.settle()
    assert received(world.target) == sent


def test_copy_that_the_smaller_port_does_not_take_goes_in_pieces(make: Make) -> None:
    world = make(ports=2, copies=2)
    world.carriers()[0].wire.most_bytes = 700
    world.advance(100)
    sent = numbered(20, 1000)
    for datagram in sent:
        send(world, [datagram])
    world.settle()
    assert received(world.target) == sent and world.client.session.dropped == 0


def test_lone_port_sends_both_copies(make: Make) -> None:
    world = make(ports=1, copies=2)
    send(world, numbered(5, 300))
    world.settle()
    assert received(world.target) == numbered(5, 300) and world.client.session.dropped == 0


def test_copies_wait_for_a_blocked_port_once(make: Make) -> None:
    world = make(ports=1, copies=2)
    block(world, 100)
    sent = numbered(5, 300)
    send(world, sent)
    unblock(world)
    world.settle()
    assert received(world.target) == sent and world.client.session.dropped == 0


def test_datagram_of_more_pieces_than_there_can_be_is_too_large(make: Make) -> None:
    world = make(ports=1)
    ports = world.client.session.ports
    ports._piece_max, ports._piece_until_us = 30, world.now_us + 1
    send(world, [b"x" * 6000])
    world.settle()
    assert world.client.count_open()["spray_too_large"] == 1 and received(world.target) == []


# What else comes


def test_answer_for_a_conversation_that_is_closed_is_counted(make: Make) -> None:
    world = make(duration_s=1.0)
    world.app.send(b"question")
    world.settle()
    _, source = world.target.recvfrom(100)
    for conversation in list(world.client._table):
        world.client._table.close(conversation)
    world.target.sendto(b"late", source)
    world.settle()
    assert world.client.count_open()["spray_unknown"] == 1 and received(world.app) == []
    world.advance(1300)
    assert (len(world.client._table), len(world.server.targets.table)) == (0, 0)


def test_copies_for_closed_conversations_leave_nothing_behind(make: Make) -> None:
    world = make(ports=2, copies=2)
    session = world.client.session
    for _ in range(3):
        world.app.send(b"question")
        world.settle()
        _, source = world.target.recvfrom(100)
        for conversation in list(world.client._table):
            world.client._table.close(conversation)
        world.target.sendto(b"late", source)
        world.settle()
    assert len(session._assembly) == 0


def test_closed_session_gives_all_ports_up_and_says_so(make: Make) -> None:
    world = make()
    next(world.server.sessions()).dropped = 3
    world.client.close()
    world.settle()
    assert all(wire.closed for wire in world.diallers[0].wires)
    assert world.server_carriers() == {} and all(wire.closed for wire in world.net.servers.values())
    world.clients.clear()
    world.advance(61_000)
    assert world.server.status(world.now_us).sessions == []
    assert world.server.count_open()["spray_dropped"] == 3
