"""Frames: golden bytes, every truncation, and all that is refused."""

import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.frame import Ack, Header, Kind

FLOW = 0x0102_0304_0506_0708

GOLDEN = {
    "OPEN": (
        frame.pack(frame.OPEN, frame.OPENING, 0xA1A2A3A4, FLOW, 0),
        "01 01 0000 a1a2a3a4 0102030405060708 0000000000000000",
    ),
    "DATA": (
        frame.pack(frame.DATA, 0, 0, FLOW, 0x1122334455667788) + b"xyz",
        "02 00 0000 00000000 0102030405060708 1122334455667788 78797a",
    ),
    "probe": (
        frame.pack(frame.DATA, frame.OPENING, 1, FLOW, 7),
        "02 01 0000 00000001 0102030405060708 0000000000000007",
    ),
    "FIN": (frame.pack(frame.FIN, 0, 1, FLOW, 1 << 40), "03 00 0000 00000001 0102030405060708 0000010000000000"),
    "RESET": (
        frame.pack(frame.RESET, 0, 0, FLOW, frame.Reason.UNREACHABLE),
        "04 00 0000 00000000 0102030405060708 0000000000000003",
    ),
    "ACK": (
        frame.pack_ack(0, 1, FLOW, Ack(5, 0x4000, 16, ())),
        "05 00 0000 00000001 0102030405060708 0000000000000005 0000000000004000 0000000000000010",
    ),
    "ACK with ranges": (
        frame.pack_ack(0, 1, FLOW, Ack(5, 100, 2, ((7, 9), (11, 12)))),
        "05 00 0000 00000001 0102030405060708 0000000000000005 0000000000000064 0000000000000002"
        "0000000000000007 0000000000000009 000000000000000b 000000000000000c",
    ),
    "ACK of a RESET": (
        frame.pack_ack(frame.RESET_SEEN, 0, FLOW, Ack(0, 0, 0, ())),
        "05 01 0000 00000000 0102030405060708 0000000000000000 0000000000000000 0000000000000000",
    ),
    "GONE": (frame.pack(frame.GONE, 0, 9, 0, 3), "06 00 0000 00000009 0000000000000000 0000000000000003"),
    "PING": (frame.pack(frame.PING, 0, 0, 0, 99), "07 00 0000 00000000 0000000000000000 0000000000000063"),
    "PONG": (frame.pack(frame.PONG, 0, 0, 0, 99), "08 00 0000 00000000 0000000000000000 0000000000000063"),
    "DRAIN": (frame.pack(frame.DRAIN, 0, 0, 0, 0), "09 00 0000 00000000 0000000000000000 0000000000000000"),
}
CONTROL = [kind for kind in Kind if kind not in (Kind.DATA, Kind.ACK)]


def ack_body(*numbers: int) -> bytes:
    return struct.pack(f"!{len(numbers)}Q", *numbers)


@pytest.mark.parametrize("name", GOLDEN)
def test_frame_has_its_golden_bytes(name: str) -> None:
    packed, golden = GOLDEN[name]
    assert packed == bytes.fromhex(golden)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_are_read_from_any_buffer(name: str) -> None:
    packed, _ = GOLDEN[name]
    header = frame.unpack(packed)
    assert frame.pack(*header) == packed[: frame.HEADER_BYTES]
    assert header.kind == Kind[name.split(maxsplit=1)[0] if name != "probe" else "DATA"]
    assert frame.unpack(bytearray(packed)) == frame.unpack(memoryview(packed)) == header


@pytest.mark.parametrize("name", GOLDEN)
def test_every_truncation_of_a_header_is_refused(name: str) -> None:
    for length in range(frame.HEADER_BYTES):
        with pytest.raises(RemoteProtocolError, match="shorter than its header"):
            frame.unpack(GOLDEN[name][0][:length])


@pytest.mark.parametrize("ranges", [0, 1, frame.MAX_RANGES])
def test_every_truncation_of_an_ack_is_refused_unless_it_is_an_ack(ranges: int) -> None:
    whole = frame.pack_ack(0, 0, FLOW, Ack(1, 2, 3, tuple((10 * n + 10, 10 * n + 15) for n in range(ranges))))
    accepted = []
    for length in range(frame.HEADER_BYTES, len(whole)):
        header = frame.unpack(whole[:length])
        try:
            frame.unpack_ack(header, whole[frame.HEADER_BYTES : length])
        except RemoteProtocolError:
            continue
        accepted.append(length)
    assert accepted == [frame.HEADER_BYTES + 16 + 16 * n for n in range(ranges)]


@pytest.mark.parametrize("kind", [0, *range(11, 256)])
def test_unknown_kind_is_refused(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"kind {kind}"):
        frame.unpack(frame.pack(kind, 0, 0, 0, 0))


@pytest.mark.parametrize("kind", Kind)
def test_only_known_flags_are_taken(kind: Kind) -> None:
    for flags in range(256):
        packed = frame.pack(kind, flags, 0, 0, 0)
        if flags <= (frame.OPENING | frame.BLOCKED if kind == Kind.DATA else 1):
            assert frame.unpack(packed).flags == flags
        else:
            with pytest.raises(RemoteProtocolError, match=f"flags {flags}"):
                frame.unpack(packed)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("bit", range(16))
def test_reserved_bits_must_be_zero(kind: Kind, bit: int) -> None:
    packed = bytearray(frame.pack(kind, 0, 0, 0, 0))
    packed[2:4] = (1 << bit).to_bytes(2, "big")
    with pytest.raises(RemoteProtocolError, match=f"reserved {1 << bit}"):
        frame.unpack(packed)


@pytest.mark.parametrize("kind", CONTROL)
def test_control_frame_has_no_payload(kind: Kind) -> None:
    with pytest.raises(RemoteProtocolError, match="1 bytes of payload"):
        frame.unpack(frame.pack(kind, 0, 0, 0, 0) + b"x")


@pytest.mark.parametrize(
    ("received", "ranges"),
    [
        (5, (5, 6)),
        (5, (4, 6)),
        (5, (7, 7)),
        (5, (8, 7)),
        (5, (7, 9, 9, 10)),
        (5, (7, 9, 8, 10)),
        (5, (20, 30, 7, 9)),
        (5, (7, 9, 7, 9)),
        ((1 << 64) - 1, (0, 1)),
    ],
)
def test_ranges_that_do_not_rise_are_refused(received: int, ranges: tuple[int, ...]) -> None:
    header = Header(frame.ACK, 0, 0, FLOW, received)
    with pytest.raises(RemoteProtocolError, match="ACK range"):
        frame.unpack_ack(header, ack_body(100, 16, *ranges))


@pytest.mark.parametrize("length", [0, 1, 8, 15, 17, 24, 31, 33, 16 + 16 * frame.MAX_RANGES + 16, 1000])
def test_ack_body_of_another_length_is_refused(length: int) -> None:
    header = Header(frame.ACK, 0, 0, FLOW, 0)
    with pytest.raises(RemoteProtocolError, match=re.escape(f"body of {length} bytes")):
        frame.unpack_ack(header, bytes(length))


rising = st.lists(st.integers(1, (1 << 64) - 1), min_size=1, max_size=17, unique=True).map(sorted)
u32, u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


@given(u32, u64, u64, u64, rising)
def test_ack_comes_back_as_it_went(serial: int, flow: int, credit: int, frames: int, offsets: list[int]) -> None:
    received, *edges = offsets
    ranges = tuple(zip(edges[::2], edges[1::2], strict=False))
    ack = Ack(received, credit, frames, ranges)
    packed = frame.pack_ack(0, serial, flow, ack)
    header = frame.unpack(packed)
    assert header == Header(frame.ACK, 0, serial, flow, received)
    assert frame.unpack_ack(header, memoryview(packed)[frame.HEADER_BYTES :]) == ack
    assert len(packed) <= frame.HEADER_BYTES + frame.ACK_BODY.size + frame.MAX_RANGES * frame.RANGE.size


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_refused(data: bytes) -> None:
    try:
        header = frame.unpack(data)
        if header.kind == frame.ACK:
            frame.unpack_ack(header, data[frame.HEADER_BYTES :])
    except RemoteProtocolError:
        return
    assert frame.pack(*header) == data[: frame.HEADER_BYTES]


@given(st.integers(0, 1), st.integers(0, 127), st.integers(0, 255), u32, st.integers(0, (1 << 40) - 1))
def test_flow_id_keeps_its_parts(end: int, opener: int, owner: int, serial: int, counter: int) -> None:
    flow = frame.flow_id(end, opener, owner, serial, counter)
    assert 0 <= flow < 1 << 64
    assert frame.flow_end(flow) == end
    assert frame.flow_slot(flow, end) == opener
    assert frame.flow_slot(flow, 1 - end) == owner
    assert frame.flow_counter(flow) == counter
    assert frame.flow_opener(flow) == frame.flow_opener(frame.flow_id(end, opener, owner, serial, 0))
    assert frame.flow_opener(flow) & 0xFF == serial & 0xFF
