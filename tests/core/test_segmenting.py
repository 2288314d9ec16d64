"""Segments of a run: impacket as oracle, the kernel's own way as model, and checksums that are left to a card."""

from struct import pack_into

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.segments import IPV6, NO_VNET, Frame, checksum, timestamps
from tests.core.test_tcp_header import IPV4, impacket, learnt, wire
from workers.core.segmenting import PSH, cut, head_bytes, is_partial, sum_of, udp_head
from workers.core.tcp_header import ACK, FIN, Header

families = pytest.mark.parametrize("frame", [IPV4, IPV6], ids=["ipv4", "ipv6"])
ADDRESSES = {4: (b"\xc0\x00\x02\x01", b"\xc6\x33\x64\x07"), 6: (bytes(range(16)), bytes(range(16, 32)))}


def pseudo_and_segment(packet: bytes) -> bytes:
    """What a TCP checksum is about."""
    tcp = 20 if packet[0] >> 4 == 4 else 40
    length = len(packet) - tcp
    return packet[tcp - (8 if tcp == 20 else 32) : tcp] + (6).to_bytes(2) + length.to_bytes(2) + packet[tcp:]


@families
@pytest.mark.parametrize("options", [b"", timestamps(1, 2)], ids=["plain", "timestamps"])
@pytest.mark.parametrize("size", [0, 1, 1399, 1400, 1401, 4001, 61_234])
def test_run_is_cut_as_the_kernel_does_it(frame: Frame, options: bytes, size: int) -> None:
    header = Header(learnt(frame.but(options=options, link=b"")), bool(options))
    payload = bytes(index * 7 & 0xFF for index in range(size))
    built = header.for_run(size, 1400, 0xFFFFF000, 5, 65535, 6, 7)
    head = built[len(NO_VNET) :]
    heads = cut(head, memoryview(payload), 1400)
    cuts = [
        bytes(heads[at * len(head) :][: len(head)]) + payload[at * 1400 :][:1400]
        for at in range(max(-(-size // 1400), 1))
    ]
    assert len(heads) == len(cuts) * len(head)
    assert [each.hex() for each in cuts] == [each.hex() for each in wire(built + payload)]


@families
@given(payload=st.binary(min_size=1, max_size=300), size=st.integers(1, 100), flags=st.sampled_from([0, PSH, FIN]))
def test_impacket_finds_every_segment_whole(frame: Frame, payload: bytes, size: int, flags: int) -> None:
    packet = frame.but(link=b"", payload=payload, flags=ACK | flags).built()
    width = head_bytes(packet)
    heads = cut(packet[:width], memoryview(payload), size)
    seen = b""
    for at in range(0, len(heads), width):
        part = payload[at // width * size :][:size]
        decoder = impacket().IPDecoder() if packet[0] >> 4 == 4 else impacket().IP6Decoder()
        decoded = decoder.decode(bytes(heads[at : at + width]) + part)
        tcp = decoded.child()
        assert tcp.get_th_seq() == (frame.sequence + len(seen)) & 0xFFFFFFFF
        assert bool(tcp.get_PSH() or tcp.get_FIN()) == bool(flags and at + width == len(heads))
        assert not is_partial(bytes(heads[at : at + width]) + part)
        assert checksum(pseudo_and_segment(bytes(heads[at : at + width]) + part)) == 0
        seen += part
    assert seen == payload


@families
def test_checksum_that_is_left_to_the_card_is_told_and_completed(frame: Frame) -> None:
    payload = b"some payload"
    header = Header(learnt(frame.but(link=b"")), False)
    packet = header.for_run(len(payload), 1400, 1, 2, 3, 4, 5)[len(NO_VNET) :] + payload
    assert is_partial(packet)
    width = head_bytes(packet)
    whole = bytes(cut(packet[:width], memoryview(payload), len(payload))) + payload
    assert not is_partial(whole)
    assert checksum(pseudo_and_segment(whole)) == 0


@pytest.mark.parametrize("packet", [b"", b"\x45", b"\x60" * 39, bytes(60), b"\x46" + bytes(60), b"\x60" + bytes(60)])
def test_what_is_not_plain_tcp_has_no_head(packet: bytes) -> None:
    assert head_bytes(packet) == 0


def test_head_ends_within_the_packet() -> None:
    packet = bytearray(IPV4.but(link=b"").built())
    assert head_bytes(packet) == len(packet)
    pack_into(">B", packet, 32, 0xF0)
    assert head_bytes(packet) == 0


@given(st.binary(max_size=200))
def test_sum_is_that_of_rfc_1071(data: bytes) -> None:
    padded = data + bytes(len(data) & 1)
    assert (sum_of(data) - (checksum(padded) ^ 0xFFFF)) % 0xFFFF == 0


@pytest.mark.parametrize("version", [4, 6])
@given(payload=st.binary(max_size=100))
def test_impacket_reads_a_datagram_with_its_headers(version: int, payload: bytes) -> None:
    source, target = ADDRESSES[version]
    packet = udp_head(source, target, (40_000, 443), payload) + payload
    decoded = (impacket().IPDecoder() if version == 4 else impacket().IP6Decoder()).decode(packet)
    udp = decoded.child()
    assert (udp.get_uh_sport(), udp.get_uh_dport(), udp.get_uh_ulen()) == (40_000, 443, len(payload) + 8)
    assert udp.get_packet()[8:] == payload
    pseudo = source + target + (17).to_bytes(2) + (len(payload) + 8).to_bytes(2)
    datagram = packet[20 if version == 4 else 40 :]
    assert checksum(pseudo + datagram + bytes(len(datagram) & 1)) == 0
    if version == 4:
        assert checksum(packet[:20]) == 0
