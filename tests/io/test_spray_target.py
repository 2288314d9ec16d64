"""Conversations with the target: their sockets, which may go from worker to worker, and what bounds them."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from tests.io.spray_world import Process, World, received
from workers.io import mesh, spray_target
from workers.settings import Address

Make = Callable[..., World]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch, ports=4, servers=2).up()
    yield made
    made.close()


def share(world: World) -> tuple[Process, Process]:
    """A conversation that both workers of the server can send on: who owns it, and the other."""
    for number in range(100):
        world.app.send(b"%d" % number * 100)
        world.settle()
    owner, other = sorted(world.servers, key=lambda each: len(each.end.targets.table), reverse=True)
    assert len(owner.end.targets.table) == len(other.end.targets._foreign) == 1
    assert len(received(world.target)) == 100
    return owner, other


def source_of(world: World) -> Any:
    """Where the target sees the next datagram come from."""
    world.app.send(b"who")
    world.settle()
    return world.target.recvfrom(100)[1]


def test_socket_comes_back_before_anything_else_is_known_of_its_session(world: World) -> None:
    owner, _ = share(world)
    source = source_of(world)
    new = world.replace_server(owner.slot, 300)
    assert new.read_inbox()
    assert len(new.end.targets.table) == 1
    world.advance(3000)
    received(world.target)
    assert source_of(world) == source
    world.target.sendto(b"answer", source)
    world.settle()
    assert received(world.app) == [b"answer"]


def test_socket_that_got_lost_on_its_way_back_is_replaced_by_one_for_all(world: World) -> None:
    owner, other = share(world)
    new = world.replace_server(owner.slot, 300)
    new.inbox.recv(1024)
    world.advance(int(world.server_tunnel.duration_s * 1000 / 2))
    for _ in range(20):
        world.app.send(b"who")
        world.settle()
    assert mesh.IN in new.taken and len(new.end.targets.table) == len(other.end.targets._foreign) == 1
    received(world.target)
    world.target.sendto(b"answer", source_of(world))
    world.settle()
    assert received(world.app) == [b"answer"]


def applications(world: World, count: int) -> list[socket.socket]:
    """So many, each of which has sent a datagram."""
    made = []
    for number in range(count):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.connect(world.app_addresses[0])
        sock.send(b"%d" % number)
        world.settle()
        made.append(sock)
    return made


def test_each_application_is_a_source_of_its_own_at_the_target(make: Make) -> None:
    world = make()
    made = applications(world, 20)
    sources = set()
    for _ in made:
        data, source = world.target.recvfrom(100)
        world.target.sendto(b"answer " + data, source)
        sources.add(source)
    world.settle()
    assert [received(sock) for sock in made] == [[b"answer %d" % number] for number in range(20)]
    assert len(sources) == len(world.server.targets.table) == len(world.client._table) == 20
    world.advance(62_000)
    assert len(world.server.targets.table) == len(world.client._table) == 0
    for sock in made:
        sock.close()


def test_conversations_beyond_the_most_are_dropped_and_counted(make: Make) -> None:
    world = make(max_conversations=3)
    made = applications(world, 5)
    assert len(received(world.target)) == len(world.server.targets.table) == 3
    assert world.server.count_open()["spray_dropped"] == 2
    world.advance(2000)
    made[4].send(b"again")
    world.settle()
    assert received(world.target) == [b"again"] and len(world.server.targets.table) == 3
    for sock in made:
        sock.close()


def test_target_is_not_read_while_no_port_takes_more(make: Make) -> None:
    world = make(ports=1)
    world.app.send(b"question")
    world.settle()
    _, source = world.target.recvfrom(100)
    wire: Any = world.server_carriers()[0].wire
    wire.room = 0
    sent = [b"%03d" % number for number in range(30)]
    for data in sent:
        world.target.sendto(data, source)
        world.settle()
    (conversation,) = world.server.targets.table
    assert not conversation.state.reading and received(world.app) == []
    wire.unblock()
    world.settle()
    assert conversation.state.reading and received(world.app) == sent
    assert world.server.count_open()["spray_dropped"] == 0


def test_target_that_comes_back_is_served_as_before(make: Make) -> None:
    world = make()
    there = world.target.getsockname()
    world.target.close()
    for _ in range(6):
        world.app.send(b"anybody?")
        world.settle()
    world.target = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    world.target.bind(there)
    world.target.setblocking(False)
    world.app.send(b"here")
    world.settle()
    assert received(world.target)[-1:] == [b"here"] and len(world.server.targets.table) == 1


def test_target_whose_name_is_not_known_costs_its_datagrams_until_it_is(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def look_up(host: str, port: int, family: int, kind: int) -> list[Any]:
        if not found:
            raise OSError("no such name")
        return found

    monkeypatch.setattr(spray_target.green_socket, "getaddrinfo", look_up)
    monkeypatch.setattr(spray_target.gevent, "spawn", lambda function: function())
    world = make()
    targets, there = world.server.targets, world.target.getsockname()
    targets.tunnel = msgspec.structs.replace(targets.tunnel, target=Address("target.invalid", there[1]))
    targets._target = None
    targets._find_target(world.now_us)
    world.app.send(b"lost")
    world.settle()
    assert world.server.count_open()["spray_dropped"] == 1 and received(world.target) == []
    found.append((socket.AF_INET, socket.SOCK_DGRAM, 17, "", there))
    world.advance(31_000)
    world.app.send(b"found")
    world.settle()
    assert received(world.target) == [b"found"]
