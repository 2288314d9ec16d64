"""The link of the lab does what it was told, each property measured from the ends."""

import hashlib
import itertools
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from tests.netlab import Connection, Lab, LabError, LabUnavailable, Link, RunVoid, rerun_if_void

FAMILIES = pytest.mark.parametrize("family", [4, 6])
PAYLOAD_SHARE = 1448 / 1514
UDP_SEGMENT = 103  # linux/udp.h


@pytest.fixture(autouse=True, scope="module")
def permitted() -> None:
    try:
        with Lab():
            pass
    except LabUnavailable as unavailable:
        pytest.skip(str(unavailable))


@contextmanager
def tcp(lab: Lab, family: int = 4, port: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: its end at the client, its end at the server."""
    address = lab.server_ip4 if family == 4 else lab.server_ip6
    with (
        lab.listen("server", address, port) as listener,
        lab.connect("client", address, listener.getsockname()[1]) as client,
    ):
        server, _ = listener.accept()
        with server:
            server.settimeout(10)
            yield client, server


@contextmanager
def udp(lab: Lab) -> Iterator[tuple[socket.socket, Callable[[], list[int]]]]:
    """A connected UDP socket at the client, and a function that ends reception: the numbers received, in order."""
    numbers: list[int] = []
    with lab.socket("server", type=socket.SOCK_DGRAM) as receiver:
        receiver.bind((lab.server_ip4, 7000))
        receiver.settimeout(0.3)

        def receive() -> None:
            with suppress(TimeoutError):
                while True:
                    numbers.append(struct.unpack_from("!I", receiver.recv(2048))[0])

        thread = threading.Thread(target=receive)
        with lab.socket("client", type=socket.SOCK_DGRAM) as sender:
            sender.bind((lab.client_ip4, 7001))
            sender.connect((lab.server_ip4, 7000))
            thread.start()

            def numbers_at_end() -> list[int]:
                thread.join()
                return numbers

            yield sender, numbers_at_end
            thread.join()


def send_numbered(sender: socket.socket, count: int, size: int = 100, per_second: float = 10_000) -> None:
    start = time.monotonic()
    for number in range(count):
        sender.send(struct.pack("!I", number) + bytes(size - 4))
        while number >= (time.monotonic() - start) * per_second:
            time.sleep(0.001)


def goodput(lab: Lab, streams: int, seconds: float, skip: float = 0.7) -> float:
    """Payload bit/s from client to server, after `skip` seconds."""
    received = [0] * streams
    over = threading.Event()

    def send(connection: socket.socket) -> None:
        with suppress(OSError):
            while not over.is_set():
                connection.sendall(bytes(65536))

    def receive(index: int, connection: socket.socket) -> None:
        with suppress(OSError):
            while data := connection.recv(262144):
                received[index] += len(data)

    with ExitStack() as stack:
        threads = []
        for index in range(streams):
            client, server = stack.enter_context(tcp(lab))
            threads += [
                threading.Thread(target=send, args=(client,)),
                threading.Thread(target=receive, args=(index, server)),
            ]
        for thread in threads:
            thread.start()
        time.sleep(skip)
        before, start = sum(received), time.monotonic()
        time.sleep(seconds)
        rate = (sum(received) - before) * 8 / (time.monotonic() - start)
        over.set()
        lab.reset()
        for thread in threads:
            thread.join()
    return rate


def counter(lab: Lab, namespace: str, group: str, name: str) -> int:
    """A counter of /proc/net/snmp."""
    lines = lab.run(namespace, ["cat", "/proc/net/snmp"]).stdout.splitlines()
    names, values = (line.split() for line in lines if line.startswith(f"{group}:"))
    return int(values[names.index(name)])


def handshake_ms(lab: Lab, family: int = 4, port: int = 0) -> float:
    """The kernel's round-trip time of SYN and SYN-ACK (tcpi_rtt): when this process runs does not matter."""
    with tcp(lab, family, port) as (client, _):
        return float(struct.unpack_from("I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 68)[0]) / 1e3


@FAMILIES
@rerun_if_void()
def test_delay_of_both_directions_makes_the_round_trip(family: int) -> None:
    with Lab(up=Link(delay_ms=20), down=Link(delay_ms=30)) as lab:
        took = min(handshake_ms(lab, family) for _ in range(3))
        lab.check(p99_ms=10)
    assert 50 <= took < 52


def test_no_delay_asked_for_is_well_below_a_millisecond() -> None:
    with Lab() as lab:
        assert min(handshake_ms(lab) for _ in range(20)) < 1


@rerun_if_void()
def test_loss_is_the_share_asked_for_and_counted() -> None:
    with Lab(up=Link(loss=0.1)) as lab, udp(lab) as (sender, received):
        send_numbered(sender, 4000)
        arrived = received()
        report = lab.check(p99_ms=20)
    assert 320 <= report.up.dropped["lost"] <= 480  # 4 standard deviations
    assert len(arrived) == 4000 - report.up.dropped["lost"]
    assert report.up.packets_in == 4000


@rerun_if_void()
def test_seed_decides_which_packets_are_lost() -> None:
    def survivors(seed: int) -> list[int]:
        with Lab(up=Link(loss=0.3), seed=seed) as lab, udp(lab) as (sender, received):
            send_numbered(sender, 500)
            arrived = received()
            lab.check(p99_ms=20)
            return arrived

    first, again, other = survivors(1), survivors(1), survivors(2)
    assert first == again
    assert first != other


@rerun_if_void()
def test_reordering_lets_later_packets_overtake() -> None:
    with Lab(up=Link(reorder=0.05, reorder_ms=5)) as lab, udp(lab) as (sender, received):
        send_numbered(sender, 2000)
        arrived = received()
        report = lab.check(p99_ms=20)
    overtaken = sum(1 for before, after in itertools.pairwise(arrived) if after < before)
    assert sorted(arrived) == list(range(2000))
    assert 60 <= report.up.reordered <= 145
    assert report.up.reordered / 3 <= overtaken <= report.up.reordered


@rerun_if_void()
def test_duplication_delivers_twice() -> None:
    with Lab(up=Link(duplicate=0.1)) as lab, udp(lab) as (sender, received):
        send_numbered(sender, 1000)
        arrived = received()
        report = lab.check(p99_ms=20)
    assert 60 <= report.up.duplicated <= 145
    assert len(arrived) == 1000 + report.up.duplicated
    assert set(arrived) == set(range(1000))


@FAMILIES
@rerun_if_void()
def test_corruption_fails_checksums_and_tcp_still_delivers_the_same_bytes(family: int) -> None:
    sent = random.Random(family).randbytes(4 << 20)
    digest = hashlib.sha256()
    with Lab(Link(corrupt=0.02)) as lab:
        with tcp(lab, family) as (client, server):

            def send() -> None:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)

            thread = threading.Thread(target=send)
            thread.start()
            while data := server.recv(1 << 18):
                digest.update(data)
            thread.join()
        report = lab.check(p99_ms=20)
        refused = counter(lab, "server", "Tcp", "InCsumErrors")
    assert digest.digest() == hashlib.sha256(sent).digest()
    assert report.up.corrupted > 20
    assert 0.8 * report.up.corrupted <= refused <= report.up.corrupted  # the header length is judged before


def test_runs_of_segments_are_cut_before_the_link() -> None:
    with Lab() as lab, udp(lab) as (sender, received):
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        sender.send(b"".join(struct.pack("!I", number) + bytes(996) for number in range(20)))
        assert received() == list(range(20))
        report = lab.report()
    assert (report.up.packets_in, report.up.dropped["oversize"]) == (20, 0)


@rerun_if_void()
def test_link_rate_holds_for_all_connections_together() -> None:
    with Lab(Link(rate_bps=50e6, delay_ms=2)) as lab:
        rate = goodput(lab, 3, 1.5)
        report = lab.check(p99_ms=5)
    assert 0.9 * PAYLOAD_SHARE <= rate / 50e6 <= 1.05 * PAYLOAD_SHARE
    assert report.up.dropped["oversize"] == 0
    assert report.up.bytes_in / report.up.packets_in <= 1514


@pytest.mark.parametrize("streams", [1, 4])
@rerun_if_void()
def test_connection_rate_holds_for_each_connection(streams: int) -> None:
    with Lab(Link(delay_ms=5), connections=[Connection(rate_bps=10e6)]) as lab:
        rate = goodput(lab, streams, 1.8)
        lab.check(p99_ms=5)
    assert 0.9 * PAYLOAD_SHARE <= rate / 10e6 / streams <= 1.05 * PAYLOAD_SHARE


@rerun_if_void()
def test_policed_connection_loses_what_exceeds_the_rate() -> None:
    rule = Connection(rate_bps=(4e6, 0), police=True, burst_ms=20)
    with Lab(connections=[rule]) as lab, udp(lab) as (sender, received):
        send_numbered(sender, 1000, size=958, per_second=1000)  # 1000 bytes a frame: 8 Mbit/s
        arrived = received()
        report = lab.check(p99_ms=20)
    assert report.up.dropped["policed"] == 1000 - len(arrived)
    assert len(arrived) == pytest.approx(510, rel=0.05)  # half, and the burst of 10 frames
    assert max(after - before for before, after in itertools.pairwise(arrived)) <= 20  # no queue: evenly


@rerun_if_void()
def test_bounded_queue_drops_its_tail() -> None:
    with Lab(up=Link(rate_bps=4e6, queue_bytes=20_000)) as lab, udp(lab) as (sender, received):
        send_numbered(sender, 100, size=958, per_second=1e9)  # 1000 bytes a frame: 2 ms each at the rate
        arrived = received()
        report = lab.check(p99_ms=20)
    assert report.up.dropped["queue"] == 100 - len(arrived)
    assert 20 <= len(arrived) <= 26
    assert arrived[:20] == list(range(20))


@rerun_if_void()
def test_rules_give_connections_different_delays_and_ports_come_first() -> None:
    rules = [Connection(delay_ms=10), Connection(delay_ms=25), Connection(delay_ms=(0, 40), port=4444)]
    with Lab(connections=rules) as lab:
        took = [handshake_ms(lab, port=port) for port in (4441, 4442, 4444, 4443)]
        lab.check(p99_ms=4)
    assert took == pytest.approx([20, 50, 40, 20], abs=4)


@rerun_if_void()
def test_rules_give_connections_different_rates_and_a_connection_can_be_limited_later() -> None:
    rules = [Connection(rate_bps=8e6), Connection(rate_bps=2e6)]
    with Lab(connections=rules) as lab, tcp(lab) as first, tcp(lab) as second:
        ends = [first, second]
        lab.limit(lab.connections()[0], Connection(rate_bps=4e6))
        for client, _ in ends:
            client.settimeout(0)
        amounts = [0, 0]
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            for index, (client, server) in enumerate(ends):
                with suppress(BlockingIOError):
                    client.send(bytes(65536))
                server.settimeout(0)
                with suppress(BlockingIOError):
                    amounts[index] += len(server.recv(65536))
            time.sleep(0.001)
        lab.check(p99_ms=20)
    assert amounts[0] == pytest.approx(1.5 * 4e6 / 8 * PAYLOAD_SHARE, rel=0.15)
    assert amounts[1] == pytest.approx(1.5 * 2e6 / 8 * PAYLOAD_SHARE, rel=0.15)


@FAMILIES
@pytest.mark.parametrize("busy", [False, True])
def test_reset_reaches_both_ends_and_no_other_connection(family: int, busy: bool) -> None:
    with Lab(Link(delay_ms=10)) as lab, tcp(lab, family) as (client, server), tcp(lab, family) as other:
        if busy:
            client.settimeout(0)
            with suppress(BlockingIOError):
                while client.send(bytes(65536)):
                    pass
            client.settimeout(10)
            server.recv(1)
        assert lab.reset(lab.connections()[0]) == 1
        for end in (client, server):
            with pytest.raises(ConnectionResetError):
                while end.recv(1 << 20):
                    pass
        other[0].sendall(b"still")
        assert other[1].recv(5) == b"still"
        assert [connection.index for connection in lab.connections()] == [1]


@rerun_if_void()
def test_blackhole_holds_one_connection_until_restored() -> None:
    with Lab() as lab, tcp(lab) as (client, server), tcp(lab) as other:
        assert lab.blackhole(lab.connections()[0]) == 1
        client.sendall(b"later")
        other[0].sendall(b"now")
        assert other[1].recv(5) == b"now"
        server.settimeout(0.4)
        with pytest.raises(TimeoutError):
            server.recv(5)
        assert [connection.blackholed for connection in lab.connections()] == [True, False]
        assert lab.restore(lab.connections()[0]) == 1
        server.settimeout(5)
        assert server.recv(5) == b"later"
        assert lab.report().up.dropped["blackholed"] >= 1


def test_blackhole_of_everything_takes_new_connections_too() -> None:
    with Lab() as lab, tcp(lab) as (client, server):
        port = server.getsockname()[1]
        lab.blackhole(direction="up")
        server.sendall(b"down is open")
        assert client.recv(100) == b"down is open"
        with pytest.raises(TimeoutError):
            lab.connect("client", lab.server_ip4, port, timeout=0.3)
        lab.restore()
        with pytest.raises(ConnectionRefusedError):  # nobody listens there, and says so
            lab.connect("client", lab.server_ip4, 9, timeout=2)


def test_link_can_be_changed_while_it_runs() -> None:
    with Lab() as lab, udp(lab) as (sender, received):
        lab.change("up", loss=1.0)
        send_numbered(sender, 10)
        time.sleep(0.05)
        lab.change("up", loss=0.0)
        sender.send(struct.pack("!I", 10))
        assert received() == [10]


def test_connections_are_listed_with_their_bytes() -> None:
    with Lab() as lab:
        with tcp(lab, 6) as (client, server):
            client.sendall(bytes(10_000))
            server.recv(10_000, socket.MSG_WAITALL)
            (connection,) = lab.connections()
            assert (connection.protocol, connection.client) == ("tcp", client.getsockname()[:2])
            assert connection.server == server.getsockname()[:2]
            assert connection.bytes[0] > 10_000 > connection.bytes[1] > 0
        assert lab.connections() == []
        assert [entry.closed for entry in lab.connections(closed=True)] == [True]


def test_starved_emulator_voids_the_run() -> None:
    with Lab(Link(delay_ms=20)) as lab, tcp(lab) as (client, server):
        client.sendall(b"x")
        server.recv(1)
        emulator = next(pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_emulator(pid))
        lab.clear_report()
        client.sendall(b"y")
        os.kill(emulator, signal.SIGSTOP)
        time.sleep(0.08)
        os.kill(emulator, signal.SIGCONT)
        server.recv(1)
        with pytest.raises(RunVoid, match="late"):
            lab.check()


def _is_emulator(pid: int) -> bool:
    """An emulator that this process started."""
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii") as file:
        name, rest = file.read().rsplit(")", 1)
        return "netlab-link" in name and int(rest.split()[1]) == os.getpid()
    return False


def test_bare_lab_carries_data_and_has_nothing_to_report() -> None:
    with Lab(emulate=False) as lab, tcp(lab, 6) as (client, server):
        client.sendall(bytes(1 << 16))
        assert len(server.recv(1 << 16, socket.MSG_WAITALL)) == 1 << 16
        with pytest.raises(LabError):
            lab.report()
