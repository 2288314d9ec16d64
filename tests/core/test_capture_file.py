"""Capture files: their bytes, runs in them, and whatever may have come in."""

from struct import unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.segments import IPV6, NO_VNET, Frame
from tests.core.test_tcp_header import IPV4, learnt
from workers.core.capture_file import FILE_HEADER, entry, received_entries, run_entries
from workers.core.segmenting import is_partial
from workers.core.tcp_header import Header

TIME_US = 1_700_000_000_123_456
families = pytest.mark.parametrize("frame", [IPV4, IPV6], ids=["ipv4", "ipv6"])


def packets(entries: bytes) -> list[bytes]:
    """What stands in there; each has the same time and is whole."""
    found, at = [], 0
    while at < len(entries):
        seconds, rest, stands, had = unpack_from("=IIII", entries, at)
        assert (seconds * 1_000_000 + rest, stands) == (TIME_US, had)
        at += 16
        found.append(entries[at : at + stands])
        at += stands
    assert at == len(entries)
    return found


def test_file_has_the_golden_bytes() -> None:
    little = "d4c3b2a1 0200 0400 00000000 00000000 00000400 65000000"
    assert FILE_HEADER in (
        bytes.fromhex(little),
        bytes.fromhex("a1b2c3d4 00020004 00000000 00000000 00040000 00000065"),
    )
    if FILE_HEADER[0] == 0xD4:
        assert entry(TIME_US, b"\x45abc").hex(" ", 4) == "00f15365 40e20100 04000000 04000000 45616263"


@families
def test_run_stands_as_its_segments(frame: Frame) -> None:
    payload = bytes(index & 0xFF for index in range(3000))
    whole = frame.but(link=b"", payload=payload).built()
    width = len(whole) - len(payload)
    for entries in (
        run_entries(TIME_US, whole[:width], payload, 1400),
        received_entries(TIME_US, memoryview(whole), 1400),
    ):
        expected = [
            frame.but(
                link=b"",
                payload=payload[at : at + 1400],
                sequence=frame.sequence + at,
                identification=frame.identification + at // 1400,
            ).built()
            for at in (0, 1400, 2800)
        ]
        assert packets(entries) == expected


@families
def test_single_packet_stands_as_it_came_but_for_padding_and_a_missing_checksum(frame: Frame) -> None:
    frame = frame.but(link=b"", payload=b"hello")
    whole = frame.built()
    assert packets(received_entries(TIME_US, whole + bytes(6), 0)) == [whole]
    wrong = whole[:-1] + b"!"
    assert packets(received_entries(TIME_US, wrong, 0)) == [wrong]
    header = Header(learnt(frame.but(payload=b"")), False)
    left = header.for_run(5, 1400, frame.sequence, frame.acknowledged, frame.window, 0, 0)[len(NO_VNET) :] + b"hello"
    assert is_partial(left)
    (found,) = packets(received_entries(TIME_US, left, 0))
    assert found == frame.built()


@families
@given(data=st.data())
def test_whatever_comes_stands_there_in_whole_packets(frame: Frame, data: st.DataObject) -> None:
    packet = bytearray(frame.but(link=b"", payload=bytes(50)).built())
    for _ in range(data.draw(st.integers(0, 4))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    packet = packet[: data.draw(st.integers(0, len(packet)))]
    assert packets(received_entries(TIME_US, packet, data.draw(st.integers(0, 60))))
