"""Spray sessions of several workers: datagrams handed over both ways, sockets passed on, a worker that is replaced."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.io.spray_net import FakeWire
from tests.io.spray_world import Process, World, received
from workers.core.cuts import ROOM, Datagrams
from workers.io import mesh
from workers.io.spray_waiting import COPIED_BYTES, copies_of, datagrams_in
from workers.shm.arena import Side

Make = Callable[..., World]


@pytest.fixture
def loose(make: Make) -> Make:
    """As `make`, with an application that takes answers from any worker's socket."""

    def build(**settings: Any) -> World:
        world = make(**settings)
        world.app.close()
        world.app = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        world.app.bind(("127.0.0.1", 0))
        world.app.setblocking(False)
        return world

    return build


def lent(*processes: Process) -> int:
    """Bytes of their arenas that are in use."""
    return sum(process.context.memory.arena.used_bytes(side) for process in processes for side in Side)


def dropped(*processes: Process) -> int:
    return sum(process.end.count_open()["spray_dropped"] for process in processes)


def ask(world: World, data: bytes, slot: int = 0) -> None:
    world.app.sendto(data, world.app_addresses[slot])
    world.settle()


def ask_often(world: World, count: int, size: int = 1000) -> list[bytes]:
    sent = [b"%03d" % number + bytes(size) for number in range(count)]
    for data in sent:
        world.app.send(data)
        world.settle()
    return sent


def from_target(world: World) -> tuple[list[bytes], set[Any]]:
    """What the target has got, and from whom."""
    data, sources = [], set()
    while True:
        try:
            one, source = world.target.recvfrom(65536)
        except BlockingIOError:
            return data, sources
        data.append(one)
        sources.add(source)


def block_ports_of(world: World, server: Process) -> None:
    """The client sends by the other worker's ports."""
    for index, carrier in world.carriers().items():
        if world.server_of(index) is server:
            world.client.session._choice.on_blocked(carrier.port)


@pytest.mark.parametrize("size", [0, 5, 1400, 9000, 65507])
def test_client_worker_without_ports_sends_by_another_and_the_answer_returns(loose: Make, size: int) -> None:
    world = loose(ports=1, clients=2)
    assert world.clients[1].end.session.total_up == 1 and not world.carriers(1)
    ask(world, b"x" * size, 1)
    data, source = world.target.recvfrom(65536)
    world.target.sendto(data.upper(), source)
    world.settle()
    assert received(world.app) == [b"X" * size]
    assert world.clients[0].taken.count(mesh.OUT) == 1 and lent(*world.clients) == 0
    for process in world.clients:
        assert process.end.count_open()["spray_dropped"] == process.end.count_open()["spray_unknown"] == 0


def test_client_worker_whose_ports_are_in_doubt_sends_by_anothers(loose: Make) -> None:
    world = loose(ports=2, clients=2)
    for carrier in world.carriers(0).values():
        carrier.port.suspend(world.now_us)
    world.advance(200)
    ask(world, b"question", 0)
    assert from_target(world)[0] == [b"question"] and world.clients[0].taken.count(mesh.OUT) == 0
    assert world.clients[1].taken.count(mesh.OUT) == 1


def test_conversation_that_only_another_worker_hears_of_lives_on(loose: Make) -> None:
    world = loose(ports=1, clients=2, duration_s=2.0)
    ask(world, b"question", 1)
    _, source = world.target.recvfrom(100)
    for _ in range(8):
        world.advance(500)
        world.target.sendto(b"answer", source)
        world.settle()
    assert received(world.app) == [b"answer"] * 8 and world.clients[1].taken.count(mesh.TOUCHED) >= 4
    assert world.clients[0].end._foreign
    world.advance(2500)
    assert not world.clients[0].end._foreign and len(world.clients[1].end._table) == 0
    assert len(world.server.targets.table) == 0


@pytest.mark.parametrize("copies", [1, 2])
def test_datagrams_by_the_ports_of_two_server_workers_have_one_source(make: Make, copies: int) -> None:
    world = make(ports=4, servers=2, copies=copies)
    sent = ask_often(world, 60)
    got, sources = from_target(world)
    assert sorted(got) == sent and len(sources) == 1
    assert sum(len(process.end.targets.table) for process in world.servers) == 1
    world.target.sendto(b"answer", sources.pop())
    world.settle()
    assert received(world.app) == [b"answer"]
    assert lent(*world.servers) == dropped(*world.servers) == 0


@pytest.mark.parametrize("size", [300, 5000])
def test_copies_by_the_ports_of_two_other_workers_arrive_once(loose: Make, size: int) -> None:
    world = loose(ports=2, clients=3, servers=2, copies=2)
    assert not world.carriers(2)
    late: list[tuple[FakeWire, bytes]] = []

    def is_late(wire: FakeWire, payload: bytes) -> bool:
        """Every second of what the client sends, which goes out twice, comes when all else has come."""
        turns[0] ^= wire.is_client
        if wire.is_client and turns[0]:
            late.append((wire, payload))
        return wire.is_client and turns[0]

    turns = [True]
    world.net.loses = is_late
    sent = [b"%03d" % number + bytes(size) for number in range(60)]
    for data in sent:
        ask(world, data, 2)
    for wire, payload in late:
        world.net.deliver(wire, payload)
        world.settle()
    assert sorted(from_target(world)[0]) == sent
    assert all(process.taken.count(mesh.OUT) > 10 for process in world.clients[:2])
    assert lent(*world.clients, *world.servers) == dropped(*world.clients, *world.servers) == 0


def test_socket_is_passed_on_so_that_little_is_handed_in(make: Make) -> None:
    world = make(ports=4, servers=2)
    ask_often(world, 100)
    assert 1 <= sum(process.taken.count(mesh.IN) for process in world.servers) <= 3
    assert sum(len(process.end.targets._foreign) for process in world.servers) == 1
    got, sources = from_target(world)
    assert len(got) == 100 and len(sources) == 1


def test_closed_conversation_leaves_no_socket_at_any_worker(make: Make) -> None:
    world = make(ports=4, servers=2, duration_s=1.0)
    ask_often(world, 40)
    world.advance(1500)
    for process in world.servers:
        assert len(process.end.targets.table) == 0 and not process.end.targets._foreign
    world.app.send(b"again")
    world.settle()
    assert b"again" in received(world.target)


def test_socket_in_use_elsewhere_keeps_its_conversation(make: Make) -> None:
    world = make(ports=2, servers=2, duration_s=2.0)
    ask_often(world, 40)
    owner = next(process for process in world.servers if len(process.end.targets.table))
    for number in range(16):
        world.advance(250)
        block_ports_of(world, owner)
        world.app.send(b"%03d" % number)
        world.settle()
    assert len(owner.end.targets.table) == 1 and owner.taken.count(mesh.TOUCHED) >= 4
    assert len(from_target(world)[1]) == 1


@pytest.mark.parametrize("copies", [1, 2])
def test_pieces_by_two_workers_become_one_datagram(make: Make, copies: int) -> None:
    world = make(ports=2, servers=2, copies=copies)
    sent = [b"%d" % number * 20_000 for number in range(8)]
    for data in sent:
        world.app.send(data)
        world.settle()
    assert received(world.target) == sent
    assert sum(process.taken.count(mesh.IN) for process in world.servers) > 8
    assert lent(*world.servers) == dropped(*world.servers) == 0


def test_replaced_worker_gets_its_sockets_back_and_the_target_sees_one_source(make: Make) -> None:
    world = make(ports=4, servers=2)
    ask_often(world, 40)
    slot = next(process.slot for process in world.servers if len(process.end.targets.table))
    _, sources = from_target(world)
    new = world.replace_server(slot, 177)
    world.settle()
    assert len(new.end.targets.table) == 1
    world.advance(4000)
    ask_often(world, 40)
    got, again = from_target(world)
    assert again == sources and len(got) == 40
    world.target.sendto(b"answer", again.pop())
    world.settle()
    assert received(world.app) == [b"answer"]


def test_socket_that_its_owner_has_closed_is_not_written_to_for_long(make: Make) -> None:
    world = make(ports=4, servers=2, duration_s=2.0)
    ask_often(world, 40)
    owner = next(process for process in world.servers if len(process.end.targets.table))
    other = next(process for process in world.servers if process is not owner)
    for conversation in owner.end.targets.table:
        conversation.state.told.clear()
        owner.end.targets.table.close(conversation)
    assert other.end.targets._foreign
    world.advance(600)
    block_ports_of(world, owner)
    ask_often(world, 1)
    assert other.taken.count(mesh.CLOSED) == 1 and not other.end.targets._foreign
    from_target(world)
    ask_often(world, 20)
    got, sources = from_target(world)
    assert len(got) == 20 and len(sources) == len(owner.end.targets.table) == 1


def test_session_lives_in_a_worker_without_ports_while_others_have_some(make: Make) -> None:
    world = make(ports=1, servers=2)
    world.advance(40_000)
    assert [len(list(process.end.sessions())) for process in world.servers] == [1, 1]
    (session,) = world.servers[1].end.sessions()
    assert not session.is_idle(world.now_us)
    session.exchange.on_peer_lost(world.servers[1].mesh.peers[0])
    assert not session.is_idle(world.now_us + 1_000_000)
    assert session.is_idle(world.now_us + 61_000_000)


# What is dropped is counted


def test_what_finds_no_memory_is_dropped_and_counted(loose: Make) -> None:
    world = loose(ports=1, clients=2)
    arena = world.clients[1].context.memory.arena
    for size in (65536, 1):
        while arena.allocate(size, Side.EGRESS) >= 0:
            pass
    for _ in range(3):
        ask(world, b"x" * 100, 1)
    assert dropped(world.clients[1]) == 3 and received(world.target) == []


def test_what_was_handed_to_a_worker_that_lost_its_ports_is_dropped_and_counted(loose: Make) -> None:
    world = loose(ports=1, clients=2)
    world.app.sendto(b"question", world.app_addresses[1])
    world.clients[1].loop.turn()
    world.client.session.remove(world.carriers()[0], world.now_us)
    world.settle()
    assert dropped(world.clients[0]) == 1 and lent(*world.clients) == 0


def test_descriptors_that_make_no_sense_are_counted(make: Make) -> None:
    world = make(ports=1, clients=2)
    session, peer = world.client.session, world.clients[0].mesh.peers[1]
    for kind, slot, length in ((mesh.IN, 1 << 31, 10), (mesh.OUT, 0, 1 << 31), (mesh.LOST, 0, 0), (mesh.BOUND, 5, 0)):
        session.on_descriptor(peer, (kind, 0, 0, slot, session.number, 1, 1, length, 0, 0, 10))
    assert world.clients[0].mesh.dropped_descriptors == 4


def test_handed_over_record_of_no_kind_for_it_is_dropped_and_counted(make: Make) -> None:
    world = make(ports=1, clients=2)
    session, there = world.client.session, world.clients[1]
    memory = there.context.memory
    slot = memory.copy_in(b"x" * 10, Side.INGRESS)
    memory.arena.lend(slot, 0)
    memory.arena.release(slot)
    descriptor = (mesh.IN, 0, 0, slot, session.number, 1, 9, 10, 0, 0, 10)
    session.on_descriptor(world.clients[0].mesh.peers[1], descriptor)
    world.settle()
    assert dropped(world.clients[0]) == 1 and lent(there) == 0


def test_source_address_of_a_conversation_crosses_whole(make: Make) -> None:
    world = make(ports=1, clients=2)
    for key in (
        socket.AF_INET6.to_bytes(2, "little") + bytes(range(0xE6, 0x100)),
        socket.AF_INET.to_bytes(2, "little") + bytes(range(0xFA, 0x100)) + bytes(8),
    ):
        conversation = world.client._open(key, world.client._sockets[0], world.now_us)
        assert conversation is not None
        world.settle()
        assert world.clients[1].end._foreign[conversation.id][1] == conversation.state[1]


@pytest.mark.parametrize("size,count,last", [(0, 1, 0), (1, 1, 1), (1000, 64, 7), (9000, 64, 1), (65507, 3, 65507)])
def test_copies_are_made_in_parts_that_a_slot_takes(size: int, count: int, last: int) -> None:
    data = bytes(number % 251 for number in range((count - 1) * size + last + 3 * size))
    source = Datagrams(bytearray(ROOM) + data)
    parts = list(copies_of(source, 3, count, size, last))
    assert b"".join(part for _, part in parts) == data[3 * size :]
    assert sum(copied for copied, _ in parts) == count
    assert all(len(part) <= COPIED_BYTES and datagrams_in(size, part) == copied for copied, part in parts)
