"""UDP wires of both ends, on real sockets of the loopback interface and a loop that the test turns."""

import errno
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.io.small_loop import WRITE, SmallLoop
from workers.core.cuts import Records
from workers.core.datagram import RECORD_MAX
from workers.io import udp_wire
from workers.io.batch import ROOM, prepare_datagrams
from workers.io.capturing import Capture
from workers.io.context import Context
from workers.io.run_sender import DATAGRAM_MAX
from workers.io.udp_route import LEAST_MTU
from workers.io.udp_wire import UdpDiallers, UdpPorts
from workers.io.wire import Wire
from workers.settings import Address, SprayClientTunnel, SprayServerTunnel

NOW = 1_000_000
FAMILIES = {"IPv4": (socket.AF_INET, "127.0.0.1"), "IPv6": (socket.AF_INET6, "::1")}
Came = tuple[bytes, int]


class Owner:
    """Keeps what came by a wire: (payload, hint)."""

    def __init__(self) -> None:
        self.came: list[Came] = []
        self.writable = self.resets = 0
        self.on_room: Callable[[], None] = lambda: None
        self.on_data: Callable[[Wire, bytes], None] = lambda wire, data: None

    def on_payload(self, wire: Wire, records: Records, start: int, end: int, hint: int, now_us: int) -> None:
        data = bytes(records.view[start:end])
        assert start >= ROOM
        self.came.append((data, hint))
        self.on_data(wire, data)

    def on_writable(self, wire: Wire) -> None:
        self.writable += 1
        self.on_room()

    def on_reset(self, wire: Wire) -> None:
        self.resets += 1


def bound(family: int, host: str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if host == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    assert prepare_datagrams(sock)
    return sock


class Ends:
    """A server's door and a client that dials. `strangers`: (carrier, wire, payload). `admit`: gives wires an owner."""

    def __init__(
        self,
        family: int,
        host: str,
        ports: int = 1,
        mtu: int | None = None,
        sockets: list[socket.socket] | None = None,
        record: Capture | None = None,
    ) -> None:
        self.host = host
        self.loop = SmallLoop()
        self.made: list[Wire] = []
        context = cast(Context, SimpleNamespace(loop=self.loop))
        sockets = sockets or [bound(family, host) for _ in range(ports)]
        self.numbers = [sock.getsockname()[1] for sock in sockets]
        self.strangers: list[tuple[int, Wire, bytes]] = []
        self.admit: Callable[[Wire], None] = lambda wire: None
        there = Address("target", 1)
        server = SprayServerTunnel(name="t", index=0, ports=(1,), listen=host, target=there, mtu=mtu)
        client = SprayClientTunnel(name="t", index=0, ports=(1,), local=there, hosts=(host,), mtu=mtu)
        self.ports = UdpPorts(context, server, list(enumerate(sockets)), self, record)
        self.diallers = UdpDiallers(context, client, record)
        self.dialled: dict[int, Wire] = {}
        self.failed: dict[int, str] = {}

    def __enter__(self) -> "Ends":
        return self

    def __exit__(self, *exception: object) -> None:
        for wire in self.made:
            wire.close()
        self.ports.close()
        assert not self.loop.watchers

    def on_stranger(self, wire: Wire, carrier: int, records: Records, start: int, end: int, now_us: int) -> None:
        self.strangers.append((carrier, wire, bytes(records.view[start:end])))
        self.admit(wire)

    def on_wire(self, carrier: int, wire: Wire) -> None:
        self.dialled[carrier] = wire

    def on_no_wire(self, carrier: int, why: str) -> None:
        self.failed[carrier] = why

    def dial(self, host: str, number: int, carrier: int = 0, source: str | None = None) -> tuple[Wire, Owner]:
        self.diallers.dial(carrier, (host, number), source, self)
        assert carrier not in self.dialled  # never before `dial` returns
        self.loop.turn()
        wire, owner = self.dialled.pop(carrier), Owner()
        self.made.append(wire)
        wire.owner = owner
        return wire, owner

    def meet(self, wire: Wire) -> tuple[Wire, Owner]:
        """The server's end of a client's wire, proven."""
        owner = Owner()

        def admit(stranger: Wire) -> None:
            stranger.owner = owner
            stranger.keep()
            stranger.on_proven()

        self.admit = admit
        assert wire.send_one(b"message 1", NOW)
        self.loop.settle()
        self.admit = lambda wire: None
        return self.strangers[-1][1], owner


@pytest.fixture(params=["IPv4", "IPv6"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    with Ends(*FAMILIES[request.param]) as made:
        yield made


@pytest.fixture
def ipv4() -> Iterator[Ends]:
    with Ends(*FAMILIES["IPv4"]) as made:
        yield made


def test_wires_of_both_ends_carry_runs_whole(ends: Ends) -> None:
    wire, owner = ends.dial(ends.host, ends.numbers[0])
    answer, server = ends.meet(wire)
    wire.on_proven()
    run = bytes(range(250)) * 200
    for sender, receiver in ((wire, server), (answer, owner)):
        assert sender.send_run(memoryview(run), 1200, NOW) == len(run)
        ends.loop.settle()
        assert receiver.came == [(run, 1200)]
    assert (wire.local, wire.peer) == (answer.peer, answer.local)
    assert (wire.kind, wire.rtt_us, wire.run_max_bytes) == ("udp", 0, DATAGRAM_MAX)


def test_several_runs_and_single_datagrams_come_in_order(ends: Ends) -> None:
    wire, _ = ends.dial(ends.host, ends.numbers[0])
    _, server = ends.meet(wire)
    sent = [bytes((number,)) * size for number, size in enumerate((2500, 100, 99, 100, 40_000, 1000, 7, 2001) * 3)]
    for data in sent:
        assert wire.send_run(memoryview(data), 1000, NOW) == len(data)
    ends.loop.settle()
    assert server.came == [(data, 1000 if len(data) > 1000 else 0) for data in sent]


def test_before_the_other_end_has_proven_itself_datagrams_come_one_by_one(ends: Ends) -> None:
    wire, owner = ends.dial(ends.host, ends.numbers[0])
    answer, _ = ends.meet(wire)
    run = memoryview(bytes(range(100)) * 6)
    answer.send_run(run, 100, NOW)
    ends.loop.settle()
    assert owner.came == [(bytes(range(100)), 0)] * 6
    # Once it has, what is left of the run comes as a whole.
    owner.came.clear()
    owner.on_data = lambda wire, data: wire.on_proven()
    answer.send_run(run, 100, NOW)
    ends.loop.settle()
    assert owner.came == [(bytes(run[:100]), 0), (bytes(run[100:]), 100)]


def test_strangers_wire_is_forgotten_unless_it_is_kept(ends: Ends) -> None:
    wire, _ = ends.dial(ends.host, ends.numbers[0])
    wire.send_run(memoryview(b"onetwothree"), 3, NOW)
    ends.loop.settle()
    assert [data for _, _, data in ends.strangers] == [b"one", b"two", b"thr", b"ee"]
    wire.send_one(b"again", NOW)
    ends.loop.settle()
    assert len({id(stranger) for _, stranger, _ in ends.strangers}) == 2
    assert ends.ports.remembered == 0
    known = ends.strangers[-1][1]
    known.keep()
    known.keep()
    wire.send_one(b"now known", NOW)
    ends.loop.settle()
    assert ends.strangers[-1][1] is known
    assert ends.ports.remembered == 1
    known.close()
    wire.send_one(b"and not", NOW)
    ends.loop.settle()
    assert ends.strangers[-1][1] is not known
    assert ends.ports.remembered == 0


def test_stranger_can_be_answered(ends: Ends) -> None:
    wire, owner = ends.dial(ends.host, ends.numbers[0])

    def answer(stranger: Wire) -> None:
        assert stranger.send_one(b"message 2", NOW)

    ends.admit = answer
    wire.send_one(b"message 1", NOW)
    ends.loop.settle()
    assert owner.came == [(b"message 2", 0)]


def test_wires_without_an_owner_are_bounded(monkeypatch: pytest.MonkeyPatch, ipv4: Ends) -> None:
    monkeypatch.setattr(udp_wire, "KEPT_MAX", 3)
    owners: list[Owner] = []

    def admit(wire: Wire) -> None:
        wire.keep()
        if len(ipv4.strangers) == 1:
            owners.append(Owner())
            wire.owner = owners[0]

    ipv4.admit = admit
    wires = [ipv4.dial("127.0.0.1", ipv4.numbers[0], carrier)[0] for carrier in range(6)]
    for number, wire in enumerate(wires):
        wire.send_one(b"%d" % number, NOW)
        ipv4.loop.settle(0)
    assert ipv4.ports.forgotten == 2
    assert ipv4.ports.remembered == 4
    ipv4.strangers.clear()
    ipv4.admit = lambda wire: None
    for number in (0, 1, 5):
        wires[number].send_one(b"again %d" % number, NOW)
        ipv4.loop.settle(0)
    assert owners[0].came == [(b"again 0", 0)]  # the first has an owner, and is not among those that go
    assert [data for _, _, data in ipv4.strangers] == [b"again 1", b"again 5"]
    for wire in wires:
        wire.close()


def test_ports_tell_their_carrier() -> None:
    with Ends(*FAMILIES["IPv4"], ports=3) as ends:
        for index in (2, 0, 1):
            wire, _ = ends.dial("127.0.0.1", ends.numbers[index])
            wire.send_one(b"hello", NOW)
            ends.loop.settle(0)
        assert [carrier for carrier, _, _ in ends.strangers] == [2, 0, 1]


@pytest.mark.parametrize(
    ("family", "bound", "asked"),
    [
        (socket.AF_INET, "0.0.0.0", "127.0.0.2"),
        (socket.AF_INET6, "::", "127.0.0.3"),
        (socket.AF_INET6, "::", "::1"),
    ],
)
def test_answers_leave_from_the_address_that_was_asked(family: int, bound: str, asked: str) -> None:
    with Ends(family, bound) as ends:
        wire, owner = ends.dial(asked, ends.numbers[0])
        answer, server = ends.meet(wire)
        wire.on_proven()
        run = bytes(range(200)) * 50
        assert answer.send_run(memoryview(run), 700, NOW) == len(run)
        assert answer.send_one(b"single", NOW)
        assert wire.send_run(memoryview(run), 700, NOW) == len(run)
        ends.loop.settle()
        assert owner.came == [(run, 700), (b"single", 0)]
        assert server.came == [(run, 700)]
        assert (answer.local, answer.peer) == (wire.peer, wire.local)


def test_wire_leaves_from_the_source_that_was_given(ipv4: Ends) -> None:
    wire, _ = ipv4.dial("127.0.0.1", ipv4.numbers[0], source="127.0.0.9")
    assert wire.local.startswith("127.0.0.9:")


@pytest.mark.parametrize(
    ("host", "source"), [("127.0.0.1", "192.0.2.1"), ("127.0.0.1", "::1")], ids=["foreign", "other family"]
)
def test_dial_that_cannot_be_made_says_why(host: str, source: str, ipv4: Ends) -> None:
    ipv4.diallers.dial(5, (host, 9), source, ipv4)
    ipv4.loop.turn()
    assert ipv4.failed[5]
    assert len(ipv4.loop.watchers) == 1


def test_cancelled_dial_makes_no_wire(ipv4: Ends) -> None:
    ipv4.diallers.dial(1, ("127.0.0.1", 9), None, ipv4)
    ipv4.diallers.cancel(1)
    ipv4.diallers.dial(2, ("127.0.0.1", 9), None, ipv4)
    ipv4.diallers.close()
    ipv4.loop.turn()
    assert not ipv4.dialled
    assert len(ipv4.loop.watchers) == 1


def test_refusal_by_icmp_is_told_whoever_reads_it(ipv4: Ends) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        number = gone.getsockname()[1]
    wire, owner = ipv4.dial("127.0.0.1", number)
    assert wire.send_one(b"anybody?", NOW)
    ipv4.loop.settle()
    assert owner.resets == 1
    # Now sending reads it, twice, before the loop does; sending itself calls nobody.
    for _ in range(3):
        assert wire.send_run(memoryview(bytes(3000)), 1000, NOW) == 3000
    assert owner.resets == 1
    ipv4.loop.settle()
    assert owner.resets > 1
    wire.send_one(b"a last time", NOW)
    wire.close()
    seen = owner.resets
    ipv4.loop.settle()
    assert owner.resets == seen


def refuse(wire: Wire, *numbers: int) -> list[int]:
    """The next calls of the wire's socket fail; return the errors that are left."""
    way: Any = cast(Any, wire)._way
    real, left = way._sendmsg, list(numbers)

    def sendmsg(*arguments: Any) -> int:
        if left:
            raise OSError(left.pop(0), "refused")
        return cast(int, real(*arguments))

    way._sendmsg = sendmsg
    return left


def test_socket_that_is_full_is_watched_until_it_takes_the_rest(ends: Ends) -> None:
    wire, _ = ends.dial(ends.host, ends.numbers[0])
    answer, server = ends.meet(wire)
    wires = [answer]
    owners = [server]
    for carrier in (1, 2):
        other, _ = ends.dial(ends.host, ends.numbers[0], carrier)
        found, owner = ends.meet(other)
        wires.append(found)
        owners.append(owner)
    run = memoryview(bytes(3000))
    for each in wires:
        refuse(each, errno.EAGAIN, errno.EAGAIN)
        assert each.send_run(run, 1000, NOW) == 0
    assert not answer.send_one(b"PING", NOW)
    assert ends.loop.active(WRITE) == 1  # they share a socket

    def send_again() -> None:
        wires[1].send_run(run, 1000, NOW)

    owners[1].on_room = send_again
    wires[2].close()
    ends.loop.turn()
    assert [each.writable for each in owners] == [1, 1, 0]
    assert ends.loop.active(WRITE) == 1  # the second blocked again
    ends.loop.turn()
    assert [each.writable for each in owners] == [1, 2, 0]
    assert ends.loop.active(WRITE) == 0


def test_part_of_a_run_that_was_taken_is_told(ipv4: Ends) -> None:
    wire, _ = ipv4.dial("127.0.0.1", ipv4.numbers[0])
    way: Any = cast(Any, wire)._way
    calls: list[int] = []

    def sendmsg(buffers: Any, *rest: Any) -> int:
        calls.append(len(buffers[0]))
        if len(calls) > 1:
            raise BlockingIOError(errno.EAGAIN, "full")
        return calls[0]

    way._sendmsg = sendmsg
    assert wire.send_run(memoryview(bytes(100_000)), 1000, NOW) == 64_000
    assert ipv4.loop.active(WRITE) == 1
    wire.close()
    assert ipv4.loop.active(WRITE) == 0


def test_closed_wire_takes_and_hands_on_nothing(ends: Ends) -> None:
    wire, _ = ends.dial(ends.host, ends.numbers[0])
    answer, server = ends.meet(wire)
    server.on_data = lambda wire, data: wire.close()
    for _ in range(3):
        wire.send_one(b"datagram", NOW)
    ends.loop.settle()
    assert server.came == [(b"datagram", 0)]
    assert answer.send_run(memoryview(bytes(10)), 10, NOW) == 10
    assert not answer.send_one(b"late", NOW)
    wire.close()
    wire.close()
    assert wire.send_run(memoryview(bytes(10)), 10, NOW) == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_records_are_bounded_by_device_configuration_and_format(family: str) -> None:
    host, headers = FAMILIES[family][1], 28 if family == "IPv4" else 48
    with Ends(*FAMILIES[family]) as ends:
        wire, _ = ends.dial(host, ends.numbers[0])
        answer, _ = ends.meet(wire)
        assert wire.most_bytes == answer.most_bytes == RECORD_MAX  # the loopback device takes more
    with Ends(*FAMILIES[family], mtu=1300) as ends:
        wire, _ = ends.dial(host, ends.numbers[0])
        assert wire.most_bytes == 1300 - headers
        wire.send_one(b"hello", NOW)
        ends.loop.settle()
        stranger = ends.strangers[0][1]
        assert stranger.most_bytes == LEAST_MTU - 48
        stranger.keep()
        assert stranger.most_bytes == 1300 - headers


def test_empty_datagrams_are_passed_over(ends: Ends) -> None:
    wire, owner = ends.dial(ends.host, ends.numbers[0])
    answer, server = ends.meet(wire)
    for data in (b"", b"x", b"", b""):
        assert wire.send_one(data, NOW)
    ends.loop.settle()
    assert server.came == [(b"x", 0)]
    assert answer.send_one(b"y", NOW)
    ends.loop.settle()
    assert owner.came == [(b"y", 0)]
