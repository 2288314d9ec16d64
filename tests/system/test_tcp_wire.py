"""Fake-TCP wires between two namespaces: handshakes, runs both ways, acknowledgements, and ends of all kinds."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest

from tests.netlab import Lab
from tests.system.fake_tcp_ends import pattern, wire
from tests.system.fake_tcp_wires import PORTS, Owner, Wires, now_us, until
from tests.system.segments import ACK, FIN, RST
from tests.system.tun import ADDRESSES, joined_tun
from workers.io.raw_wire import RawWire

versions = pytest.mark.parametrize("version", [4, 6])
SIZE = 1400
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def wires(lab: Lab, backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wires]:
    made = Wires(lab, 4, monkeypatch)
    yield made
    made.close()


def raw(owner: Owner) -> RawWire:
    assert isinstance(owner.wire, RawWire)
    return owner.wire


def send(owner: Owner, payload: bytes, size: int = SIZE) -> None:
    """All of it, run after run."""
    view = memoryview(payload)
    most = raw(owner).run_max_bytes // size * size
    while view:
        run = view[:most]
        taken = raw(owner).send_run(run, size, now_us())
        view = view[taken:]
        if taken < len(run):
            before = owner.writable
            until(lambda before=before: owner.writable > before)


@pytest.mark.pcap
@versions
@pytest.mark.parametrize("device", [None, "eth0"])
def test_runs_cross_both_ways(
    lab: Lab, backend: str, version: int, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Wires(lab, version, monkeypatch, device=device)
    payload = pattern(3_000_000 if backend == "packet" else 500_000)  # a capture has room for 512 frames
    ends = made.meet()
    for sender, receiver in (ends, ends[::-1]):
        send(sender, payload)
        until(lambda receiver=receiver: len(receiver.came) == len(payload))
        assert receiver.came == payload
        assert SIZE in receiver.hints or backend == "pcap"
    client, server = map(raw, ends)
    assert (client.local, client.peer) == (server.peer, server.local)
    assert client.peer.endswith(f":{PORTS[0]}")
    assert client.most_bytes == server.most_bytes == 1500 - (52 if version == 4 else 72)
    assert client.rtt_us > 0
    assert not made.diallers.lost and not made.ports.lost and not made.ports.strangers
    made.close()


@pytest.mark.pcap
@versions
def test_runs_cross_where_the_device_has_no_link_header(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(emulate=False) as own, joined_tun(own):
        made = Wires(own, version, monkeypatch, device="tun0")
        made.address = ADDRESSES["server"][version == 6]
        client, server = made.meet()
        send(client, pattern(40 * SIZE))
        until(lambda: len(server.came) == 40 * SIZE)
        assert server.came == pattern(40 * SIZE)
        made.close()


def test_server_finds_a_device_that_comes_up_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.io.next_hop.SPACING_S", 0.1)
    with Lab(emulate=False) as own:
        own.run("server", ["ip", "link", "set", "eth0", "down"])
        made = Wires(own, 4, monkeypatch, device="eth0")
        own.run("server", ["ip", "link", "set", "eth0", "up"])
        gevent.sleep(0.5)
        made.meet()
        made.close()


@pytest.mark.pcap
def test_runs_go_on_when_the_device_was_down_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(emulate=False) as own:
        made = Wires(own, 4, monkeypatch)
        client, server = made.meet()
        own.run("client", ["ip", "link", "set", "eth0", "down"])
        send(client, pattern(SIZE))
        gevent.sleep(0.2)
        own.run("client", ["ip", "link", "set", "eth0", "up"])
        gevent.sleep(0.2)
        send(client, pattern(SIZE))
        until(lambda: server.came == pattern(SIZE))
        assert made.diallers.lost == 1
        made.close()


def test_each_port_has_its_carrier(wires: Wires) -> None:
    for carrier in (1, 0):
        wires.meet(carrier)
    assert wires.door.strangers == [(1, b"hello"), (0, b"hello")]


def test_kernels_say_nothing_after_the_handshake_and_the_receiver_acknowledges(wires: Wires) -> None:
    client, server = wires.meet()
    with wire(wires.lab) as seen:
        send(client, pattern(10 * SIZE))
        until(lambda: len(server.came) == 10 * SIZE)
        gevent.sleep(0.2)
    bare = [each for each in seen if not each.payload]
    assert [each.flags for each in bare] == [ACK]
    assert bare[0].acknowledged == max(each.sequence + len(each.payload) for each in seen if each.payload) % 2**32


@pytest.mark.pcap
def test_wire_that_is_closed_sends_one_fin_and_the_other_end_is_told(wires: Wires) -> None:
    client, server = wires.meet()
    with wire(wires.lab) as seen:
        raw(client).close()
        until(lambda: server.resets == 1)
        send(server, pattern(SIZE))
        gevent.sleep(0.2)
    assert [each.flags for each in seen] == [FIN | ACK, ACK]
    assert client.came == b""


def test_port_that_nobody_listens_on_is_refused(wires: Wires) -> None:
    owner = wires.dial(0, port=9999)
    until(lambda: owner.why != "")
    assert owner.why == "connection refused"


def test_dial_that_is_cancelled_is_not_heard_of(wires: Wires) -> None:
    owner = wires.dial()
    wires.diallers.cancel(0)
    gevent.sleep(0.2)
    assert (owner.wire, owner.why) == (None, "")


def test_dial_without_an_answer_times_out(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    wires.address = "198.18.2.77"
    owner = wires.dial()
    until(lambda: owner.why != "")
    assert owner.why in ("timed out", "no route to host")


@pytest.mark.pcap
def test_lost_handshake_ack_is_repeated_with_message_1(wires: Wires) -> None:
    owner = wires.dial()
    until(lambda: owner.wire is not None)
    with wire(wires.lab) as seen:
        raw(owner).send_one(b"one", now_us())
        raw(owner).send_one(b"two", now_us())
    assert [each.payload for each in seen] == [b"one", b"", b"two"]
    until(lambda: len(wires.door.strangers) > 0)
    gevent.sleep(0.05)
    assert wires.door.strangers[-1] == (0, b"two")


@pytest.mark.skipif(shutil.which("iptables") is None, reason="no iptables here")
def test_lost_handshake_ack_costs_one_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(emulate=False) as own:
        made = Wires(own, 4, monkeypatch)
        first = "-A INPUT -p tcp --dport 443 ! --syn -m statistic --mode nth --every 100000 --packet 0 -j DROP"
        done = own.run("server", ["iptables", *first.split()], check=False)
        if done.returncode:
            pytest.skip(done.stderr)
        client = made.dial()
        until(lambda: client.wire is not None)
        raw(client).send_one(b"hello", now_us())
        gevent.sleep(0.1)
        assert made.door.strangers == []
        raw(client).send_one(b"hello", now_us())
        until(lambda: client.came == b"welcome", 0.5)
        made.close()


@pytest.mark.parametrize("queue_bytes", [300_000, 20_000_000])  # the queue is full first, or the socket's buffer
def test_run_that_the_device_refuses_waits(queue_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = pattern(6_000_000)
    with Lab(emulate=False) as own:
        made = Wires(own, 4, monkeypatch, server_backend="packet")  # a capture has no room for what comes in one turn
        client, server = made.meet()
        shape = f"tc qdisc add dev eth0 root tbf rate 200mbit burst 130000 limit {queue_bytes}"
        own.run("client", shape.split())
        send(client, payload)
        until(lambda: len(server.came) == len(payload))
        assert server.came == payload
        assert client.writable > 3
        made.close()


def test_stranger_is_let_go_in_time(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.io.tcp_wire.STRANGER_US", 300_000)
    with wire(wires.lab) as seen, wires.lab.connect("client", wires.lab.server_ip4, PORTS[0]):
        until(lambda: wires.ports.strangers == 1)
        until(lambda: wires.ports.strangers == 0)
    assert [each.flags for each in seen if each.flags & (FIN | RST)][:1] in ([], [FIN | ACK])


def test_oldest_stranger_goes_when_there_are_too_many(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.io.tcp_wire.STRANGERS_MAX", 3)
    kept, _ = wires.meet()
    open_ones = [wires.lab.connect("client", wires.lab.server_ip4, PORTS[1]) for _ in range(6)]
    until(lambda: wires.ports.strangers == 3)
    gevent.sleep(0.1)
    assert wires.ports.strangers == 3
    for sock in open_ones:
        sock.close()
    send(kept, pattern(SIZE))
    until(lambda: len(wires.door.owners[0].came) == SIZE)


def test_port_survives_a_next_hop_with_another_address(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(emulate=False) as own:
        made = Wires(own, 4, monkeypatch)
        client, server = made.meet()
        send(client, pattern(SIZE))
        until(lambda: len(server.came) == SIZE)
        own.run("server", ["ip", "link", "set", "eth0", "address", "02:00:00:00:00:77"])
        own.run("client", ["ip", "neigh", "replace", own.server_ip4, "lladdr", "02:00:00:00:00:77", "dev", "eth0"])
        gevent.sleep(1.5)
        send(client, pattern(SIZE))
        until(lambda: len(server.came) == 2 * SIZE)
        made.close()


def test_syn_from_the_port_of_a_silent_peer_is_told(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.io.raw_wire.SILENT_US", 0)
    client, server = wires.meet()
    port = int(raw(client).local.rpartition(":")[2])
    raw(client).close()
    until(lambda: server.resets == 1)
    gevent.sleep(1.3)  # the socket lingers
    with wires.lab.socket("client") as again:
        again.bind(("", port))
        again.setblocking(False)
        again.connect_ex((wires.lab.server_ip4, PORTS[0]))
        until(lambda: server.resets >= 2)


def test_wires_outlive_what_made_them(wires: Wires) -> None:
    client, server = wires.meet()
    wires.diallers.close()
    wires.ports.close()
    send(client, pattern(SIZE))
    until(lambda: len(server.came) == SIZE)
    raw(client).close()
    raw(server).close()
    assert not raw(client).device._table


PROGRAM = """
import shutil
import sys
from tests.system.fake_tcp_wires import PORTS, Door, Host, Owner, client_tunnel, now_us, server_tunnel, until
from workers.io.fake_handshake import open_listener
from workers.io.tcp_wire import TcpDiallers, TcpPorts
import socket

listen, connect, source, backend = sys.argv[1:]
door, host = Door(), Host()
family = socket.AF_INET6 if ":" in listen else socket.AF_INET
listeners = [(index, open_listener(family, listen, port)) for index, port in enumerate(PORTS)]
ports = TcpPorts(host, server_tunnel(backend=backend), listeners, door)
diallers = TcpDiallers(host, client_tunnel(connect, backend=backend))
for carrier in (0, 0, 1):
    client = Owner()
    diallers.dial(carrier, (connect, PORTS[carrier]), source or None, client)
    until(lambda: client.wire is not None or client.why)
    if client.wire is None:
        print(client.why)
        continue
    client.wire.send_one(b"hello", now_us())
    try:
        until(lambda: client.came == b"welcome", 0.5)
    except AssertionError:
        print("unseen", ports.unseen)
        continue
    client.wire.on_proven()
    sent = bytes(60_000)
    client.wire.send_run(memoryview(sent), 1200, now_us())
    until(lambda: len(door.owners[-1].came) == len(sent))
    print(client.wire.most_bytes, client.wire.device.name)
"""


@pytest.mark.pcap
@pytest.mark.parametrize(
    ("listen", "connect", "source", "first"),
    [
        ("127.0.0.1", "127.0.0.1", "", ""),
        ("::1", "::1", "", ""),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1", ""),
        ("::", "127.0.0.1", "", "unseen 1"),  # the loopback device is looked at once somebody has come by it
        ("0.0.0.0", "198.18.2.1", "198.18.2.1", "unseen 1"),
    ],
)
def test_one_host_can_be_both_ends(lab: Lab, backend: str, listen: str, connect: str, source: str, first: str) -> None:
    done = lab.run(
        "server", [sys.executable, "-c", PROGRAM, listen, connect, source, backend], cwd=ROOT, timeout=60, check=False
    )
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert lines[0] == first or not first
    assert all(line.endswith(" lo") and int(line.split()[0]) > 1200 for line in lines[bool(first) :])
    assert len(lines) == 3
