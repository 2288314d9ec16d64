"""BPF programs: what they keep, according to an interpreter and to the kernel."""

import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from struct import pack
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.bpf_machine import run
from workers.core.bpf import DROP_ALL, DROP_PAYLOAD, capture, socket_choice
from workers.core.bpf_code import INSTRUCTION, INSTRUCTIONS_MAX
from workers.io.socket_filter import attach_filter, has_filter

SERVER_PORTS = (80, 443, 10_000, 10_001, 10_002)
HOSTS = {4: bytes([198, 18, 2, 1]), 6: bytes.fromhex("20010002000000000000000000020001")}
OTHERS = {4: bytes([198, 18, 2, 2]), 6: bytes.fromhex("20010002000000000000000000020002")}
OURS = {4: bytes([198, 18, 1, 1]), 6: bytes.fromhex("20010002000000000000000000010001")}
FIN, SYN, RST, PSH, ACK, ECE = 1, 2, 4, 8, 16, 64
HOST, OTHERHOST, OUTGOING = 0, 3, 4

versions = pytest.mark.parametrize("version", [4, 6])
links = pytest.mark.parametrize("link_bytes", [14, 0])


@dataclass(frozen=True)
class Frame:
    """A segment from `source` to `target`, as one of the ends sees it."""

    version: int = 4
    source: bytes = b""
    target: bytes = b""
    source_port: int = 443
    target_port: int = 40_000
    flags: int = ACK
    payload: int = 100
    ip_options: int = 0
    tcp_options: int = 12
    protocol: int = 6
    fragment: int = 0x4000

    def tcp(self) -> bytes:
        offset = (20 + self.tcp_options) // 4 << 4
        ports = pack("!HHII", self.source_port, self.target_port, 1, 2)
        return ports + pack("!BBHHH", offset, self.flags, 9, 0, 0) + bytes(self.tcp_options + self.payload)

    def ip(self) -> bytes:
        source, target = self.source or HOSTS[self.version], self.target or OURS[self.version]
        tcp = self.tcp()
        if self.version == 6:
            return pack("!IHBB", 6 << 28, len(tcp), self.protocol, 64) + source + target + tcp
        length = 20 + self.ip_options
        start = pack("!BBHHHBBH", 0x40 | length // 4, 0, length + len(tcp), 7, self.fragment, 64, self.protocol, 0)
        return start + source + target + bytes(self.ip_options) + tcp

    def bytes(self, link_bytes: int) -> bytes:
        ethertype = pack("!H", 0x0800 if self.version == 4 else 0x86DD)
        return (bytes(12) + ethertype if link_bytes else b"") + self.ip()

    def back(self) -> "Frame":
        """In the other direction."""
        return replace(
            self,
            source=self.target or OURS[self.version],
            target=self.source or HOSTS[self.version],
            source_port=self.target_port,
            target_port=self.source_port,
        )


def kernel_keeps(program: bytes, packet: bytes) -> bool:
    """What the kernel says of a packet that comes in: a datagram socket's offset 0 is its first byte."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        attach_filter(theirs, program)
        assert has_filter(theirs)
        theirs.setblocking(False)
        ours.setblocking(False)
        try:
            ours.send(packet)
            return theirs.recv(1 << 17) == packet
        except (BlockingIOError, PermissionError):
            return False


def keeps(program: bytes, packet: bytes, packet_type: int = HOST) -> bool:
    kept = run(program, packet, packet_type=packet_type)
    assert kept == 0 or kept >= len(packet)
    if packet_type == HOST:
        assert kernel_keeps(program, packet) == bool(kept)
    return bool(kept)


# Filters of TCP sockets


@pytest.mark.parametrize("flags", [SYN, SYN | ACK, ACK, ACK | FIN, RST, RST | ACK])
@pytest.mark.parametrize("options", [0, 4, 12, 40])
def test_payload_filter_lets_bare_segments_pass_and_drops_payload(flags: int, options: int) -> None:
    for payload in (0, 1, 1448, 60_000):
        segment = Frame(flags=flags, tcp_options=options, payload=payload).tcp()
        assert keeps(DROP_PAYLOAD, segment) == (payload == 0)


def test_full_filter_drops_everything() -> None:
    assert not keeps(DROP_ALL, Frame(payload=0).tcp())
    assert not keeps(DROP_ALL, Frame(flags=RST, payload=0).tcp())


# Capture


@versions
@links
def test_client_sees_all_segments_from_the_servers_ports(version: int, link_bytes: int) -> None:
    program = capture("client", SERVER_PORTS, link_bytes=link_bytes)
    for port in range(65_536) if version == 4 and link_bytes else (0, 79, 80, 81, 443, 9999, 10_002, 10_003, 65_535):
        frame = Frame(version, source_port=port).bytes(link_bytes)
        assert bool(run(program, frame)) == (port in SERVER_PORTS)
    for flags in (SYN | ACK, RST, FIN | ACK, ACK | PSH):
        assert keeps(program, Frame(version, flags=flags).bytes(link_bytes))
    assert not keeps(program, Frame(version, source_port=40_000, target_port=443).bytes(link_bytes))


@versions
@links
def test_server_sees_all_segments_to_its_ports(version: int, link_bytes: int) -> None:
    program = capture("server", SERVER_PORTS, link_bytes=link_bytes)
    for flags in (SYN, ACK, RST, FIN | ACK):
        assert keeps(program, Frame(version, flags=flags).back().bytes(link_bytes))
        assert not keeps(program, Frame(version, flags=flags).bytes(link_bytes))


@versions
@links
@pytest.mark.parametrize(
    ("side", "flags", "wanted"),
    [
        ("client", ACK, True),
        ("client", SYN, False),
        ("client", FIN | ACK, False),
        ("client", RST, False),
        ("server", SYN | ACK, True),
        ("server", SYN | ACK | ECE, True),
        ("server", ACK, False),
        ("server", RST | ACK, False),
    ],
)
def test_of_what_is_sent_only_the_template_is_seen(
    version: int, link_bytes: int, side: Literal["client", "server"], flags: int, wanted: bool
) -> None:
    program = capture(side, SERVER_PORTS, link_bytes=link_bytes)
    sent = Frame(version, flags=flags, payload=0, ip_options=0)
    sent = sent.back() if side == "client" else sent
    frame = sent.bytes(link_bytes)
    assert keeps(program, frame, OUTGOING) == wanted
    assert not keeps(program, frame, OTHERHOST)
    assert not keeps(program, replace(sent, payload=1).bytes(link_bytes), OUTGOING)
    assert not keeps(program, sent.back().bytes(link_bytes), OUTGOING)


@links
def test_headers_of_any_length_are_measured_and_fragments_and_other_protocols_dropped(link_bytes: int) -> None:
    program = capture("client", SERVER_PORTS, link_bytes=link_bytes)
    sent = capture("client", SERVER_PORTS, link_bytes=link_bytes)
    for options in range(0, 44, 4):
        assert keeps(program, Frame(ip_options=options).bytes(link_bytes))
        assert not keeps(program, Frame(ip_options=options, source_port=444).bytes(link_bytes))
        bare = Frame(ip_options=options, tcp_options=40 - options, payload=0).back()
        assert keeps(sent, bare.bytes(link_bytes), OUTGOING)
    assert keeps(program, Frame(fragment=0).bytes(link_bytes))
    for fragment in (0x2000, 1, 0x1FFF):
        assert not keeps(program, Frame(fragment=fragment).bytes(link_bytes))
    for version in (4, 6):
        assert not keeps(program, Frame(version, protocol=17).bytes(link_bytes))


@links
@versions
def test_truncated_frames_are_dropped(link_bytes: int, version: int) -> None:
    program = capture("client", SERVER_PORTS, link_bytes=link_bytes, hosts=list(HOSTS.values()))
    frame = Frame(version).bytes(link_bytes)
    ports_end = link_bytes + (20 if version == 4 else 40) + 2
    for length in range(1, len(frame)):
        assert keeps(program, frame[:length]) == (length >= ports_end)


@links
@versions
def test_only_the_named_hosts_are_seen(link_bytes: int, version: int) -> None:
    program = capture("client", SERVER_PORTS, link_bytes=link_bytes, hosts=[*HOSTS.values(), bytes(4), bytes(16)])
    for packet_type, there in ((HOST, Frame(version)), (OUTGOING, Frame(version, payload=0).back())):
        assert keeps(program, there.bytes(link_bytes), packet_type)
        address = "source" if packet_type == HOST else "target"
        for byte in range(4 if version == 4 else 16):
            changed = bytearray(HOSTS[version])
            changed[byte] ^= 1
            other = replace(there, **{address: bytes(changed)})  # type: ignore[arg-type]
            assert not keeps(program, other.bytes(link_bytes), packet_type)


def test_hosts_of_one_family_exclude_the_other() -> None:
    program = capture("client", SERVER_PORTS, link_bytes=14, hosts=[HOSTS[4]])
    assert keeps(program, Frame(4).bytes(14))
    assert not keeps(program, Frame(6).bytes(14))


@versions
@links
@pytest.mark.parametrize("ports", [SERVER_PORTS, range(9, 40_000, 100)], ids=["few", "many"])
def test_both_directions_are_seen_where_what_is_sent_comes_back(
    version: int, link_bytes: int, ports: tuple[int, ...]
) -> None:
    client = capture("client", ports, link_bytes=link_bytes, loops=True)
    server = capture("server", ports, link_bytes=link_bytes, loops=True)
    for port in (ports[0], ports[1], ports[-1], 79, 65_535):
        wanted = port in ports
        data = Frame(version, source_port=port, target_port=50_000)
        assert keeps(client, data.bytes(link_bytes)) == wanted
        assert keeps(server, data.back().bytes(link_bytes)) == wanted
        assert not keeps(client, data.back().bytes(link_bytes))
        assert not keeps(server, data.bytes(link_bytes))
        own = replace(data, flags=SYN | ACK, payload=0)
        assert keeps(server, own.bytes(link_bytes)) == wanted
        assert keeps(client, replace(own, flags=ACK).back().bytes(link_bytes)) == wanted
        assert not keeps(client, replace(own, flags=FIN | ACK).back().bytes(link_bytes))
    assert not keeps(capture("server", (), link_bytes=link_bytes, loops=True), Frame(version).bytes(link_bytes))


def test_no_port_keeps_nothing() -> None:
    assert not keeps(capture("server", (), link_bytes=14), Frame().bytes(14))


@versions
def test_workers_that_share_ports_split_the_connections_as_the_sockets_do(version: int) -> None:
    rng = random.Random(5)
    workers = 3
    choice = socket_choice(workers)
    server = [capture("server", [443], link_bytes=14, share=(worker, workers)) for worker in range(workers)]
    client = [capture("client", [443], link_bytes=14, share=(worker, workers)) for worker in range(workers)]
    for _ in range(200):
        port = rng.randrange(1024, 65_536)
        incoming = Frame(version, target_port=port).back()
        chosen = run(choice, incoming.tcp(), network=incoming.ip())
        assert chosen == (port >> 1) % workers
        served = replace(incoming.back(), flags=SYN | ACK, payload=0)
        for packet_type, frame in ((HOST, incoming), (OUTGOING, served)):
            seen = [keeps(program, frame.bytes(14), packet_type) for program in server]
            assert seen == [worker == chosen for worker in range(workers)]
        for packet_type, frame in ((HOST, incoming.back()), (OUTGOING, replace(incoming, payload=0))):
            seen = [keeps(program, frame.bytes(14), packet_type) for program in client]
            assert seen == [worker == chosen for worker in range(workers)]


# The search for ports


def found(program: bytes, ports: range = range(65_536)) -> set[int]:
    return {port for port in ports if run(program, Frame(source_port=port, payload=0).bytes(0))}


def runs(starts: st.SearchStrategy[int], longest: int) -> st.SearchStrategy[list[int]]:
    one = st.tuples(starts, st.integers(1, longest), st.integers(1, 5))
    ports = one.map(lambda r: [p for p in range(r[0], r[0] + r[1] * r[2], r[2]) if p < 65_536])
    return st.lists(ports, max_size=12).map(lambda parts: [port for part in parts for port in part])


@given(runs(st.integers(0, 65_535) | st.integers(0, 300), 120))
def test_any_set_of_ports_is_found_exactly(ports: list[int]) -> None:
    program = capture("client", ports, link_bytes=0)
    near = {port + step for port in (*ports, 0, 65_535) for step in (-33, -32, -1, 0, 1, 31, 32, 64)}
    asked = {port for port in near if 0 <= port < 65_536}
    assert {port for port in asked if run(program, Frame(source_port=port, payload=0).bytes(0))} == set(ports)


MANY: dict[str, Callable[[], Iterator[int]]] = {
    "anywhere": lambda: iter(random.Random(1).sample(range(65_536), 1000)),
    "apart": lambda: iter(range(11, 65_536, 65)),
    "in one row": lambda: iter(range(10_000, 11_000)),
    "every third of 4096": lambda: iter(range(10_001, 14_096, 3)),
    "pairs": lambda: (port + more for port in range(1, 65_500, 131) for more in (0, 1)),
}


@pytest.mark.parametrize("which", MANY)
def test_thousand_ports_are_found_exactly_wherever_they_are(which: str) -> None:
    ports = set(MANY[which]())
    program = capture("client", ports, link_bytes=0)
    assert len(program) // INSTRUCTION.size <= INSTRUCTIONS_MAX
    assert found(program) == ports
    assert kernel_keeps(program, Frame(source_port=max(ports)).bytes(0))
    assert not kernel_keeps(program, Frame(source_port=max(ports) + 1).bytes(0))


@pytest.mark.parametrize("count", [4096, 30_000])
def test_more_ports_than_fit_are_all_found_among_some_others(count: int) -> None:
    ports = set(random.Random(2).sample(range(65_536), count))
    program = capture("client", ports, link_bytes=0)
    assert len(program) // INSTRUCTION.size <= INSTRUCTIONS_MAX
    assert ports <= found(program)
    assert kernel_keeps(program, Frame(source_port=min(ports)).bytes(0))


def test_kernel_and_interpreter_agree_on_random_frames() -> None:
    rng = random.Random(3)
    program = capture("client", range(400, 500), link_bytes=14, hosts=[HOSTS[4]], share=(1, 2))
    kept = 0
    for _ in range(2000):
        frame = bytearray(Frame(4, source_port=rng.randrange(390, 510), target_port=rng.randrange(65_536)).bytes(14))
        if rng.random() < 0.5:
            frame[rng.randrange(60)] ^= 1 << rng.randrange(8)
        kept += keeps(program, bytes(frame[: rng.randrange(30, len(frame))]))
    assert 200 < kept < 1200
