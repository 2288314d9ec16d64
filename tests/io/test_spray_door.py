"""Who knocks at a server's ports: strangers, clients that repeat themselves, begin anew or have moved."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.io.spray_net import FakeWire
from tests.io.spray_world import World, received
from workers.core.handshake import ClientHandshake, Hello, Mode, WorkerId
from workers.core.noise import Suite
from workers.io import spray_door
from workers.io.spray_door import ANSWERS_MAX, PENDING_US

Make = Callable[..., World]


@pytest.fixture
def make(make_unmet: Make) -> Make:
    """They meet when the test says so."""
    return make_unmet


def message_1(world: World, secret: bytes | None = None, tunnel: str = "t", session: int = 77, index: int = 0) -> bytes:
    """A message 1 of its own, each time."""
    hello = Hello(session, 9, index, 0, tunnel, (WorkerId(0, 1),))
    private = world.now_us.to_bytes(8, "big") * 3 + len(world.net.clients).to_bytes(8, "big")
    psk = secret or world.key.secret
    handshake = ClientHandshake("a", psk, Suite.AES256GCM, Mode.SPRAY, hello, ephemeral_private=private)
    return handshake.message_to_send


def knock(world: World, payload: bytes, local: str, carrier: int = 0) -> FakeWire:
    """Payload comes from an address; the server's wire."""
    wire = world.net.clients.get(local) or world.net.connect(carrier, local)
    world.net.deliver(wire, payload)
    return world.net.server_wire(wire)


def refused(world: World) -> int:
    return int(world.server.count_open()["spray_refused"])


def test_message_1_is_answered_and_only_a_record_makes_a_session(make: Make) -> None:
    world = make()
    wire = knock(world, message_1(world), "x:1")
    assert len(wire.sent) == 1 and wire.calls == ["keep", "opened"]
    assert len(world.server.door) == 1 and list(world.server.sessions()) == []
    for now_us in range(world.now_us, world.now_us + PENDING_US, PENDING_US // 10):
        world.server.on_time(now_us)
    assert not wire.closed
    world.server.on_time(world.now_us + PENDING_US)
    assert wire.closed and len(world.server.door) == 0


def test_repeated_message_1_gets_the_same_answer_so_many_times(make: Make) -> None:
    world = make()
    message = message_1(world)
    for _ in range(ANSWERS_MAX + 5):
        wire = knock(world, message, "x:1")
    assert wire.sent == [wire.sent[0]] * ANSWERS_MAX
    assert len(world.server.door) == 1


def test_message_1_from_another_wire_is_a_replay_and_met_with_silence(make: Make) -> None:
    world = make()
    message = message_1(world)
    first, second = knock(world, message, "x:1"), knock(world, message, "y:1")
    assert len(first.sent) == 1 and second.sent == [] and second.owner is None
    assert (refused(world), len(world.server.door)) == (1, 1)


def test_replay_long_after_a_session_is_met_with_silence(make: Make) -> None:
    world = make().up()
    message = next(payload for payload in world.wire(0).sent if payload.startswith(b"\xf7F"))
    world.advance(20_000)
    for local in ("x:1", world.wire(0).local):
        wire = knock(world, message, local)
    assert world.net.servers["x:1"].sent == [] and len(world.server.door) == 0
    assert wire.owner is world.server_carriers()[0] and set(world.server_carriers()) == {0, 1}


@pytest.mark.parametrize("place", [0, 2, 5, 7, 12, 40, -1])
def test_forged_message_1_is_met_with_silence(make: Make, place: int) -> None:
    world = make()
    message = bytearray(message_1(world))
    message[place] ^= 1
    wire = knock(world, bytes(message), "x:1")
    assert wire.sent == [] and wire.calls == [] and refused(world) == 1 and len(world.server.door) == 0


@pytest.mark.parametrize("size", [0, 1, 2, 3, 30, 60])
def test_truncated_or_longer_message_1_is_met_with_silence(make: Make, size: int) -> None:
    world = make()
    message = message_1(world)
    for payload in (message[:size], message + bytes(size + 1), message + message, message + bytes(2000)):
        assert knock(world, payload, "x:1").sent == []
    assert refused(world) == 4


def test_wrong_key_tunnel_or_index_is_met_with_silence(make: Make) -> None:
    world = make()
    for message in (message_1(world, bytes(32)), message_1(world, tunnel="u"), message_1(world, index=60_000)):
        assert knock(world, message, "x:1").sent == []
    assert refused(world) == 3


def test_record_that_does_not_open_makes_no_session(make: Make) -> None:
    world = make()
    wire = knock(world, message_1(world), "x:1")
    knock(world, bytes(100), "x:1")
    assert len(wire.sent) == 1 and list(world.server.sessions()) == [] and refused(world) == 1


def test_handshakes_under_way_are_bounded_and_the_oldest_goes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spray_door, "PENDING_MAX", 5)
    world = make()
    wires = [knock(world, message_1(world), f"x:{number}") for number in range(8)]
    assert [wire.closed for wire in wires] == [True] * 3 + [False] * 5
    assert len(world.server.door) == world.server.count_open()["spray_pending"] == 5


def test_remembered_messages_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spray_door, "TAGS_MAX", 3)
    world = make()
    messages = []
    for number in range(4):
        messages.append(message_1(world))
        knock(world, messages[-1], f"x:{number}")
    assert knock(world, messages[3], "y:1").sent == []
    assert len(knock(world, messages[0], "y:2").sent) == 1
    assert len(world.server.door._tags) == 3


def test_strangers_get_no_more_than_their_share_of_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make()
    seconds = iter(range(100))
    monkeypatch.setattr(spray_door, "BUDGET_S", 1.5)
    monkeypatch.setattr(spray_door, "time", SimpleNamespace(thread_time=lambda: next(seconds)))
    world.server.door._budget_s = 1.5
    answered = [len(knock(world, message_1(world), f"x:{number}").sent) for number in range(4)]
    assert answered == [1, 1, 0, 0] and refused(world) == 2
    world.server.door.on_time(world.now_us)
    assert len(knock(world, message_1(world), "x:9").sent) == 1


def test_reset_before_the_first_record_ends_the_handshake(make: Make) -> None:
    world = make()
    wire = knock(world, message_1(world), "x:1")
    assert wire.owner is not None
    wire.owner.on_writable(wire)
    wire.owner.on_reset(wire)
    assert wire.closed and len(world.server.door) == 0


def test_newer_message_1_takes_the_place_of_an_older_one_of_its_wire(make: Make) -> None:
    world = make()
    wire = knock(world, message_1(world), "x:1")
    world.now_us += 1
    knock(world, message_1(world), "x:1")
    assert len(wire.sent) == 2 and wire.sent[0] != wire.sent[1] and len(world.server.door) == 1
    world.server.on_time(world.now_us + PENDING_US)
    assert wire.closed and len(world.server.door) == 0


def test_no_session_beyond_the_most(make: Make) -> None:
    world = make(max_sessions=1).up()
    world.restart_client()
    world.advance(400)
    assert world.carriers() and len(list(world.server.sessions())) == 1
    assert len(world.server.door) == 0


# A client begins anew


def same_addresses(world: World) -> None:
    """The next dials come from the addresses that the first ones had."""
    connect, names = world.net.connect, iter(list(world.net.clients))
    world.net.connect = lambda carrier, local: connect(carrier, next(names))  # type: ignore[method-assign]


def test_client_that_restarts_on_the_same_wires_takes_them_over(make: Make) -> None:
    world = make().up()
    (old,) = world.server.sessions()
    before = {index: carrier.wire for index, carrier in world.server_carriers().items()}
    same_addresses(world)
    world.restart_client()
    world.advance(400)
    new = next(session for session in world.server.sessions() if session is not old)
    assert {index: carrier.wire for index, carrier in new.carriers.items()} == before
    assert old.carriers == {} and not any(wire.closed for wire in before.values())  # type: ignore[attr-defined]
    world.advance(4000)
    world.app.send(b"after")
    world.settle()
    assert received(world.target) == [b"after"] and set(new.carriers) == set(world.carriers()) == {0, 1}
    dialled = [carrier for carrier, _, _ in world.diallers[-1].dialled]
    assert sorted(dialled) == [0, 1]


def test_port_dialled_anew_on_the_same_wire_replaces_its_predecessor(make: Make) -> None:
    world = make(ports=1).up()
    wire = world.server_carriers()[0].wire
    same_addresses(world)
    world.net.loses = lambda wire, payload: True
    world.client._dialler.ports[0].on_close_received(world.now_us)
    world.client.session.on_lost(world.carriers()[0])
    world.net.loses = lambda wire, payload: False
    world.advance(600)
    assert world.server_carriers()[0].wire is wire
    world.app.send(b"after")
    world.settle()
    assert received(world.target) == [b"after"]


def test_session_beyond_the_most_does_not_cost_a_live_port_its_wire(make: Make) -> None:
    world = make(max_sessions=1).up()
    carrier = world.server_carriers()[0]
    same_addresses(world)
    world.restart_client()
    world.advance(300)
    assert not carrier.wire.closed and carrier.wire.owner is carrier  # type: ignore[attr-defined]


# A port has moved


def move(world: World, index: int, local: str) -> None:
    """What the client's port sends comes from another address from now on."""
    wire = world.wire(index)
    del world.net.clients[wire.local]
    wire.local = local
    world.net.clients[local] = wire


def test_port_that_moved_goes_on_at_its_new_address(make: Make) -> None:
    world = make(ports=1).up()
    world.advance(2000)
    carrier = world.server_carriers()[0]
    old = world.net.servers[world.wire(0).local]
    move(world, 0, "moved:1")
    world.app.send(b"from elsewhere")
    world.settle()
    data, source = world.target.recvfrom(100)
    world.target.sendto(b"answer", source)
    world.settle()
    assert (data, received(world.app)) == (b"from elsewhere", [b"answer"])
    assert old.closed and carrier.wire is world.net.servers["moved:1"] and world.server.door.moved == 1
    assert world.net.servers["moved:1"].calls[:2] == ["keep", "proven"]


def test_what_waited_for_the_old_wire_leaves_on_the_new_one(make: Make) -> None:
    world = make(ports=1).up()
    world.app.send(b"question")
    world.settle()
    _, source = world.target.recvfrom(100)
    world.advance(2000)
    carrier: Any = world.server_carriers()[0]
    carrier.wire.room = 0
    for number in range(3):
        world.target.sendto(b"answer %d" % number, source)
        world.settle()
    move(world, 0, "moved:1")
    world.now_us += 800_000
    world.app.send(b"from elsewhere")
    world.settle()
    assert received(world.app) == [b"answer 0", b"answer 1", b"answer 2"]
    assert not carrier.is_blocked


def test_port_that_was_heard_of_just_now_has_not_moved(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spray_door, "SILENT_US", 60_000_000)  # a busy machine may take a second for this
    world = make(ports=1).up()
    world.app.send(b"here")
    world.settle()
    move(world, 0, "moved:1")
    world.app.send(b"there")
    world.settle()
    assert received(world.target) == [b"here"] and world.server.door.moved == 0 and refused(world) == 1


def test_replayed_record_moves_nothing(make: Make) -> None:
    world = make(ports=1).up()
    world.app.send(b"once")
    world.settle()
    world.advance(2000)
    carrier = world.server_carriers()[0]
    wire = carrier.wire
    for payload in list(world.wire(0).sent):
        knock(world, payload, "x:1")
    assert carrier.wire is wire and received(world.target) == [b"once"] and world.net.servers["x:1"].sent == []


def test_only_so_many_silent_ports_are_tried(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spray_door, "TRIES", 0)
    world = make(ports=1).up()
    world.advance(2000)
    carrier = world.server_carriers()[0]
    knock(world, bytes(100), "x:1")
    assert carrier.counts == (1, 0) and refused(world) == 1
