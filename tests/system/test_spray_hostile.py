"""Segments and datagrams that an attacker on the path makes of a tunnel's own: none is delivered, none is answered."""

import contextlib
import os
import random
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tests.netlab import Lab
from tests.system.fake_tcp_ends import packet_port
from tests.system.segments import ACK, EVERYTHING, FIN, RST, SYN, ones_complement, send, taken_apart
from tests.system.spray_pair import SprayPair, answering, ask, drain
from workers.io.packet import FRAME_BYTES_MAX, VNET_HEADER_BYTES, PacketPort

SECRET = b"transfer 1000 to Mallory"
QUIET_S = 1.0
ANSWER_S = 0.6
"""An answer would come at once; a doubtful port is probed within 150 ms, and again."""
MAGIC = b"\xf7FWD"
DATA_OVERHEAD = 31
"""Of a record with a datagram in it."""
LINK_BYTES = 14
AT_IP = VNET_HEADER_BYTES + LINK_BYTES
TCP, UDP = 6, 17
LONG_KEEPALIVE = 'keepalive = "60s"\n'

pytestmark = pytest.mark.usefixtures("backend")


class Wire:
    """What one end's device sees, and what an attacker there can send."""

    def __init__(self, port: PacketPort) -> None:
        self.port = port
        self._buffer = bytearray(FRAME_BYTES_MAX)

    def seen(self, quiet_s: float, timeout_s: float = 10.0) -> list[bytes]:
        """The IPv4 frames of TCP and UDP until there was none for so long."""
        found: list[bytes] = []
        until_s = time.monotonic() + timeout_s
        while select.select([self.port], [], [], quiet_s)[0]:
            assert time.monotonic() < until_s, f"it is never quiet: {[ports_of(each) for each in found[-8:]]}"
            length = self.port.receive_into(memoryview(self._buffer))
            frame = bytes(self._buffer[:length])
            if length and frame[AT_IP] >> 4 == 4 and frame[AT_IP + 9] in (TCP, UDP):
                found.append(frame)
        return found


def payload_of(frame: bytes) -> bytes:
    if frame[AT_IP + 9] == TCP:
        return taken_apart(frame, LINK_BYTES).payload
    length: int = struct.unpack_from("!H", frame, AT_IP + 24)[0]
    return frame[AT_IP + 28 : AT_IP + 20 + length]


def ports_of(frame: bytes) -> tuple[int, int]:
    source, target = struct.unpack_from("!HH", frame, AT_IP + 20)
    return source, target


def inject(wire: Wire, like: bytes, payload: bytes, *, ahead: int = 0, source_port: int = 0) -> None:
    """Send payload with the headers of a frame that was seen: as a segment so many bytes after it, or as a datagram."""
    if like[AT_IP + 9] == TCP:
        template = taken_apart(like, LINK_BYTES)
        if source_port:
            template = template._replace(source_port=source_port)
        send(wire.port, template, template.sequence + ahead, payload)
        return
    head = bytearray(like[AT_IP : AT_IP + 28])
    struct.pack_into("!H", head, 2, 28 + len(payload))
    struct.pack_into("!H", head, 10, 0)
    struct.pack_into("!H", head, 10, ones_complement(head[:20]) ^ 0xFFFF)
    if source_port:
        struct.pack_into("!H", head, 20, source_port)
    struct.pack_into("!HH", head, 24, 8 + len(payload), 0)
    assert wire.port.send(bytes(VNET_HEADER_BYTES) + like[VNET_HEADER_BYTES:AT_IP] + bytes(head), payload) >= 0


def variants(record: bytes, other: bytes) -> Iterator[bytes]:
    """What is made of a record that was seen: `other` came by another port."""
    chance = random.Random(3)
    yield record
    yield record + record
    yield other
    for bit in range(8 * len(record)):
        wrong = bytearray(record)
        wrong[bit // 8] ^= 1 << bit % 8
        yield bytes(wrong)
    for length in range(1, len(record)):
        yield record[:length]
    for surplus in (1, 2, 10, 100):
        yield record + bytes(surplus)
        yield record[:2] + bytes(surplus) + record[2:]
    for counter in (0, 1, 2**22, 2**63, 2**64 - 1):
        yield record[:2] + struct.pack("!Q", counter) + record[10:]
    for length in (0, 1, 23, 24, 25, 16_384, 16_385, 0xFFFF, 0xF746):
        yield struct.pack("!H", length) + record[2:]
    yield MAGIC + record
    yield MAGIC + bytes(1000)
    for _ in range(100):
        yield chance.randbytes(chance.randrange(1, 1400))


@contextlib.contextmanager
def quiet_pair(lab: Lab, kind: str) -> Iterator[tuple[SprayPair, Wire]]:
    """An idle tunnel, and the wire at the client's end."""
    with (
        packet_port(lab, "client", program=EVERYTHING) as port,
        SprayPair(lab, kind=kind, ports=2, client_tunnel=LONG_KEEPALIVE, server_tunnel=LONG_KEEPALIVE) as pair,
    ):
        yield pair, Wire(port)


def test_altered_cut_repeated_and_forged_records_are_neither_delivered_nor_answered(lab: Lab) -> None:
    with (
        quiet_pair(lab, "all") as (pair, near),
        packet_port(lab, "server", program=EVERYTHING) as far,
        pair.target() as target,
        pair.application() as application,
    ):
        wires = {"server": near, "client": Wire(far)}
        with answering(target):
            newest = learnt(lab, application, wires, pair)
        before = carriers(pair)
        for end, wire in wires.items():
            wire.seen(QUIET_S)
            for (towards, protocol, port), frame in newest.items():
                if towards == end and port == pair.ports[0]:
                    other = payload_of(newest[towards, protocol, pair.ports[1]])
                    attack(wire, frame, other, has_listener=end == "server")
            answers = [each for each in wire.seen(ANSWER_S) if is_from(end, each, lab)]
            assert answers == [], [(ports_of(each), payload_of(each)) for each in answers]
        assert drain(target, 0.1) == [] and drain(application, 0.1) == []
        with answering(target):
            for _ in range(20):
                ask(application, SECRET)
        assert carriers(pair) == before, pair.logs()


def learnt(
    lab: Lab, application: socket.socket, wires: dict[str, Wire], pair: SprayPair
) -> dict[tuple[str, int, int], bytes]:
    """A frame with a record of the application's towards each end on every port: (end, protocol, port)."""
    newest: dict[tuple[str, int, int], bytes] = {}
    until_s = time.monotonic() + 10
    while len(newest) < 2 * pair.carriers:
        assert time.monotonic() < until_s, sorted(newest)
        ask(application, SECRET)
        for towards, wire in wires.items():
            for frame in wire.seen(0.02):
                source, aim = ports_of(frame)
                if is_from(other_end(towards), frame, lab) and len(payload_of(frame)) == DATA_OVERHEAD + len(SECRET):
                    newest[towards, frame[AT_IP + 9], aim if towards == "server" else source] = frame
    return newest


def attack(wire: Wire, first: bytes, other: bytes, *, has_listener: bool) -> None:
    record = payload_of(first)
    for number, payload in enumerate(variants(record, other)):
        inject(wire, first, payload)
        inject(wire, first, payload, ahead=len(record) + number)
        if has_listener:  # a client listens nowhere, and its kernel says so as any other's
            inject(wire, first, payload, source_port=ports_of(first)[0] ^ 1)


def other_end(end: str) -> str:
    return "client" if end == "server" else "server"


def is_from(end: str, frame: bytes, lab: Lab) -> bool:
    return frame[AT_IP + 12 : AT_IP + 16] == socket.inet_aton(lab.server_ip4 if end == "server" else lab.client_ip4)


def carriers(pair: SprayPair) -> list[tuple[str, str]]:
    (session,) = pair.tunnel("client")["sessions"]
    return [(each["local"], each["state"]) for each in session["carriers"]]


def test_record_that_was_held_up_is_delivered_once_however_often_it_is_sent() -> None:
    """So what the attacker sends would be taken if it were authentic."""
    with (
        Lab() as own,
        quiet_pair(own, "all") as (pair, wire),
        pair.target() as target,
        pair.application() as application,
    ):
        with answering(target):
            ask(application, SECRET)
        wire.seen(QUIET_S)
        own.blackhole()
        held: dict[int, bytes] = {}
        for number in range(100):
            application.send(SECRET + b"%03d" % number)
            for frame in wire.seen(0.02):
                if is_from("client", frame, own) and len(payload_of(frame)) == DATA_OVERHEAD + len(SECRET) + 3:
                    held[frame[AT_IP + 9]] = frame
            if len(held) == 2:
                break
        own.restore()
        for frame in held.values():
            for _ in range(3):
                inject(wire, frame, payload_of(frame))
        came = drain(target, 0.2)
        assert len(came) == len(set(came)) == 2, came


def test_segments_with_flags_and_numbers_of_chance_do_nothing(lab: Lab) -> None:
    chance = random.Random(4)
    with (
        quiet_pair(lab, "tcp") as (pair, wire),
        pair.target() as target,
        pair.application() as application,
    ):
        with answering(target):
            ask(application, SECRET)
        up = [each for each in wire.seen(QUIET_S) if is_from("client", each, lab) and payload_of(each)]
        before = carriers(pair)
        for frame in up:
            template = taken_apart(frame, LINK_BYTES)
            for flags in (SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, ACK, 0, 0xFF):
                for _ in range(20):
                    # Half the space away from what is expected.
                    number = template.sequence + (1 << 31) + chance.randrange(-(1 << 29), 1 << 29)
                    send(wire.port, template, number, b"", flags=flags, answered=chance.getrandbits(32))
        answers = [each for each in wire.seen(ANSWER_S) if is_from("server", each, lab)]
        assert answers == [], [taken_apart(each, LINK_BYTES) for each in answers]
        with answering(target):
            for _ in range(20):
                ask(application, SECRET)
        assert carriers(pair) == before, pair.logs()


def test_strangers_are_met_with_silence(lab: Lab) -> None:
    """They do not know the key."""
    with (
        quiet_pair(lab, "all") as (pair, _),
        pair.target() as target,
        pair.application() as application,
        contextlib.ExitStack() as stack,
    ):
        before = carriers(pair)
        strangers = [
            stack.enter_context(stranger(lab, kind, pair.ports[0])) for kind in ("tcp", "udp") for _ in range(4)
        ]
        for sock in strangers:
            for _ in range(20):
                sock.send(os.urandom(random.randrange(1, 1200)))
                sock.send(b"\xf7FWD\x01\x01\x02\x06laptop\x00\x80" + os.urandom(128))
        time.sleep(ANSWER_S)
        for sock in strangers:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)
        with answering(target):
            ask(application, SECRET)
        assert carriers(pair) == before, pair.logs()


def stranger(lab: Lab, kind: str, port: int) -> socket.socket:
    if kind == "tcp":
        return lab.connect("client", lab.server_ip4, port)
    sock = lab.socket("client", socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((lab.server_ip4, port))
    return sock


def test_session_that_was_recorded_on_its_way_comes_to_nothing_when_it_is_sent_again(lab: Lab) -> None:
    """After the client has gone, and to a server that was started anew."""
    with (
        packet_port(lab, "client", program=EVERYTHING) as port,
        SprayPair(lab, kind="all", ports=2, start=False) as pair,
        pair.target() as target,
    ):
        wire = Wire(port)
        pair.start("server")
        pair.start("client")
        pair.wait_carriers(pair.carriers)
        with answering(target), pair.application() as application:
            for _ in range(20):
                ask(application, SECRET)
        recorded = [each for each in wire.seen(0.2) if is_from("client", each, lab) and payload_of(each)]
        messages = [payload_of(each) for each in recorded if payload_of(each)[:4] == MAGIC]
        pair.stop("client")
        assert len(messages) >= pair.carriers
        for _ in range(2):
            wire.seen(0.2)
            with contextlib.ExitStack() as stack:
                replay(lab, stack, wire, recorded)
                answers = [payload_of(each) for each in wire.seen(ANSWER_S) if is_from("server", each, lab)]
            # Whoever repeats message 1 might be the client: it gets message 2, shorter and of no use without the keys.
            answers = [each for each in answers if each]
            assert len(answers) <= len(messages) and all(len(each) < len(messages[0]) for each in answers), answers
            assert drain(target, 0.1) == []
            pair.stop("server")
            pair.start("server")


def replay(lab: Lab, stack: contextlib.ExitStack, wire: Wire, recorded: list[bytes]) -> None:
    """Datagrams come from where they came from. Segments need a handshake, which the attacker's kernel makes."""
    streams: dict[tuple[int, int], socket.socket] = {}
    for frame in recorded:
        if frame[AT_IP + 9] == UDP:
            inject(wire, frame, payload_of(frame))
            continue
        ends = ports_of(frame)
        if ends not in streams:
            streams[ends] = stack.enter_context(lab.connect("client", lab.server_ip4, ends[1]))
            streams[ends].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        streams[ends].send(payload_of(frame))
