"""The client's end of a spray tunnel with two workers: whose ports an answer comes by."""

from collections.abc import Iterator

import pytest

from tests.io.spray_world import World, received
from workers.io.spray_client import SprayClientEnd


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(monkeypatch, ports=4, clients=2).up()
    yield made
    made.close()


def test_answer_that_overtakes_its_conversation_is_handed_to_the_owner(world: World) -> None:
    world.app.send(b"question")
    world.settle()
    _, source = world.target.recvfrom(100)
    other = world.clients[1].end
    assert isinstance(other, SprayClientEnd)
    assert len(other._foreign) == 1
    other._foreign.clear()  # as if the owner's word for it were still on its way
    answers = [b"%d" % number for number in range(20)]
    for answer in answers:
        world.target.sendto(answer, source)
        world.settle()
    assert sorted(received(world.app)) == sorted(answers)
    assert other.session.bytes_in == 0 < world.client.session.bytes_in
    for process in world.clients:
        assert process.end.count_open()["spray_unknown"] == 0


def test_answer_for_a_conversation_that_nobody_has_is_counted_by_its_owner(world: World) -> None:
    world.app.send(b"question")
    world.settle()
    _, source = world.target.recvfrom(100)
    for conversation in list(world.client._table):
        world.client._table.close(conversation)
    world.settle()
    for _ in range(20):
        world.target.sendto(b"late", source)
        world.settle()
    assert received(world.app) == []
    assert [process.end.count_open()["spray_unknown"] for process in world.clients] == [20, 0]
