"""Headers of fake TCP: the bytes, what the kernel makes of a run, impacket as oracle, and every malformed frame."""

import itertools
from struct import pack, pack_into, unpack, unpack_from
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.segments import ETHERNET4, ETHERNET6, IPV6, NO_VNET, Frame, checksum, timestamps
from workers.core.tcp_header import ACK, FIN, FRAME_MAX, RST, SYN, VNET_BYTES, Header, Segment, Template, parse

IPV4 = Frame()
TS = timestamps(0x11223344, 0x55667788)

families = pytest.mark.parametrize("frame", [IPV4, IPV6], ids=["ipv4", "ipv6"])
links = pytest.mark.parametrize("has_link", [True, False], ids=["ethernet", "tun"])
stamps = pytest.mark.parametrize("options", [b"", TS], ids=["plain", "timestamps"])


def read(frame: Frame, vnet: bytes = NO_VNET, tail: bytes = b"") -> Segment | None:
    return parse(memoryview(vnet + frame.built() + tail), 14 if frame.link is None else len(frame.link))


def learnt(frame: Frame) -> Template:
    link_bytes = 14 if frame.link is None else len(frame.link)
    template = Template.learn(memoryview(NO_VNET + frame.built()), link_bytes)
    assert template is not None
    return template


def wire(frame: bytes) -> list[bytes]:
    """What the kernel puts on the wire for a frame with vnet_hdr: cut as tcp_gso_segment does, checksums completed."""
    flags, gso_type, headers, gso_size, start, offset = unpack("=BBHHHH", frame[:VNET_BYTES])
    frame = frame[VNET_BYTES:]
    assert (flags, offset) == (1, 16)
    head, payload = bytearray(frame[:headers]), frame[headers:]
    version = 4 if gso_type in (0, 1) and head[start - 20] == 0x45 else 6
    assert gso_type in (0, {4: 1, 6: 4}[version])
    assert bool(gso_type) == bool(gso_size) == (len(payload) > gso_size > 0)
    size = gso_size or max(len(payload), 1)
    ip = start - {4: 20, 6: 40}[version]
    sequence, partial = unpack_from(">I", head, start + 4)[0], unpack_from(">H", head, start + 16)[0]
    number = unpack_from(">H", head, ip + 4)[0]
    segments = []
    for at in range(0, max(len(payload), 1), size):
        part = payload[at : at + size]
        length = headers - start + len(part)
        pack_into(">I", head, start + 4, (sequence + at) & 0xFFFFFFFF)
        # The partial sum held the length of the whole run.
        pack_into(">H", head, start + 16, (partial - (headers - start + len(payload)) + length) % 0xFFFF)
        if version == 4:
            if gso_type:
                pack_into(">HH", head, ip + 2, length + 20, (number + at // size) & 0xFFFF)
                pack_into(">H", head, ip + 10, 0)
                pack_into(">H", head, ip + 10, checksum(bytes(head[ip:start])))
        else:
            pack_into(">H", head, ip + 4, length)
        complete = checksum(bytes(head[start:]) + part)
        pack_into(">H", head, start + 16, complete)
        segments.append(bytes(head) + part)
    return segments


@families
@links
@stamps
@pytest.mark.parametrize("size", [0, 1, 1399, 1400, 1401, 2800, 61_234])
def test_run_reaches_the_wire_as_segments_with_right_numbers_and_checksums(
    frame: Frame, has_link: bool, options: bytes, size: int
) -> None:
    frame = frame.but(options=options, traffic_class=0xB8, hop_limit=57, link=None if has_link else b"")
    header = Header(learnt(frame), bool(options))
    payload = bytes(index * 7 & 0xFF for index in range(size))
    sequence, ack = 0xFFFFF000, 0x80000001
    built = header.for_run(size, 1400, sequence, ack, 65535, 0x11223344, 0x55667788)
    segments = wire(built + payload)
    assert len(segments) == max(-(-size // 1400), 1)
    for index, segment in enumerate(segments):
        expected = frame.but(
            sequence=(sequence + 1400 * index) & 0xFFFFFFFF,
            acknowledged=ack,
            window=65535,
            identification=frame.identification + index,
            payload=payload[1400 * index :][:1400],
        )
        assert segment.hex() == expected.built().hex()


def test_header_has_the_golden_bytes() -> None:
    header = Header(learnt(IPV4.but(options=TS)), True)
    assert header.for_run(2801, 1400, 1, 2, 65535, 3, 4).hex(" ") == (
        "01 01 42 00 78 05 22 00 10 00"  # NEEDS_CSUM, TCPV4, 66 bytes of headers, 1400, csum_start 34, 16
        " 02 00 00 00 00 02 02 00 00 00 00 01 08 00"
        " 45 00 0b 25 12 34 40 00 40 06 31 63 c0 00 02 01 c6 33 64 07"
        " 9c 40 01 bb 00 00 00 01 00 00 00 02 80 10 ff ff f7 53 00 00 01 01 08 0a 00 00 00 03 00 00 00 04"
    )
    assert header.for_run(1400, 1400, 1, 2, 65535, 3, 4)[:10].hex() == "01004200000022001000"
    header = Header(learnt(IPV6.but(link=b"")), False)
    assert header.for_run(2801, 1400, 1, 2, 65535, 3, 4)[:28].hex(" ") == (
        "01 04 3c 00 78 05 28 00 10 00 60 0a bc de 0b 05 06 40 20 01 0d b8 00 00 00 00 00 00"
    )


@families
@links
@stamps
def test_largest_run_stays_below_what_the_kernel_cuts_in_software(frame: Frame, has_link: bool, options: bytes) -> None:
    frame = frame.but(options=options, link=None if has_link else b"")
    header = Header(learnt(frame), bool(options))
    built = header.for_run(header.max_run_bytes, 1300, 1, 2, 3, 4, 5)
    assert len(built) - VNET_BYTES + header.max_run_bytes == FRAME_MAX
    assert header.overhead_bytes == len(frame.ip())
    with pytest.raises(AssertionError):
        header.for_run(header.max_run_bytes + 1, 1300, 1, 2, 3, 4, 5)


def test_identification_counts_segments_and_wraps() -> None:
    header = Header(learnt(IPV4.but(identification=0xFFFE)), False)
    built = [header.for_run(size, 100, 1, 2, 3, 0, 0) for size in (250, 0, 100)]
    assert [unpack_from(">H", frame, 28)[0] for frame in built] == [0xFFFE, 1, 2]


def test_identification_of_a_syn_ack_is_not_repeated() -> None:
    template = learnt(IPV4.but(identification=0, flags=SYN | ACK, sequence=0xABCD1233))
    built = Header(template, False).for_run(0, 0, 1, 2, 3, 0, 0)
    assert unpack_from(">H", built, 28)[0] == 0x1234


@families
def test_another_next_hop_changes_the_link_header_alone(frame: Frame) -> None:
    header = Header(learnt(frame.but(identification=7)), False)
    header.for_run(300, 100, 1, 2, 3, 0, 0)
    before = [header.for_run(size, 100, 1, 2, 3, 0, 0) for size in (100, 300)]
    link = bytes(range(14))
    header.use_link(link)
    for size, old in zip((100, 300), before, strict=True):
        new = header.for_run(size, 100, 1, 2, 3, 0, 0)
        assert new[VNET_BYTES:24] == link
        assert (new[:10], new[30:34], new[36:]) == (old[:10], old[30:34], old[36:])
    header.use_link(b"")
    assert header.for_run(300, 100, 1, 2, 3, 0, 0)[VNET_BYTES] in (0x45, 0x60)
    assert header.max_run_bytes == FRAME_MAX - header.overhead_bytes


@pytest.mark.parametrize("with_link", [True, False])
@families
def test_template_of_a_handshake_ack_holds_the_next_numbers(frame: Frame, with_link: bool) -> None:
    frame = frame.but(options=TS, traffic_class=0x2B, hop_limit=99, link=None if with_link else b"")
    template = learnt(frame)
    assert template == Template(
        link=(ETHERNET4 if frame.source == IPV4.source else ETHERNET6) if with_link else b"",
        key=frame.key,
        hop_limit=99,
        traffic_class=0x28,
        flow_label=frame.flow_label,
        identification=0x1234 if template.is_ipv4 else 0,
        next_sequence=0x01020304,
        acknowledged=0x0A0B0C0D,
        tsecr=0x55667788,
    )


@families
def test_template_of_a_syn_ack_counts_the_syn(frame: Frame) -> None:
    options = pack(">BBH", 2, 4, 1460) + b"\x04\x02\x08\x0a" + pack(">II", 7, 8) + b"\x01\x03\x03\x0a"
    template = learnt(frame.but(flags=SYN | ACK, sequence=0xFFFFFFFF, options=options))
    assert (template.next_sequence, template.acknowledged, template.tsecr) == (0, 0x0A0B0C0D, 8)


@families
def test_peer_key_is_the_key_of_what_comes_back(frame: Frame) -> None:
    back = frame.but(
        source=frame.destination, destination=frame.source, source_port=443, destination_port=frame.source_port
    )
    segment = read(back)
    assert segment is not None
    assert learnt(frame).peer_key == segment.key
    assert learnt(frame).key == frame.key != segment.key


@families
def test_frame_that_is_no_step_of_the_own_handshake_makes_no_template(frame: Frame) -> None:
    bad = [frame.but(flags=flags) for flags in (SYN, RST, RST | ACK, FIN | ACK)]
    bad += [
        IPV4.but(ip_options=b"\x01\x01\x01\x00"),
        IPV6.but(next_header=0, extensions=bytes((6, 0, 1, 4)) + bytes(4)),
    ]
    for each in bad:
        assert Template.learn(NO_VNET + each.built(), 14) is None
    assert Template.learn(b"", 14) is None


@families
@links
@stamps
def test_parse_reads_every_field(frame: Frame, has_link: bool, options: bytes) -> None:
    frame = frame.but(options=options, payload=b"payload", flags=ACK | 0xC0, link=None if has_link else b"")
    segment = read(frame, vnet=pack("=BBHHHH", 1, 0x81, 66, 1400, 34, 16))
    offset = VNET_BYTES + len(frame.built()) - 7
    tsval = 0x11223344 if options else None
    assert segment == Segment(frame.key, 0x01020304, 0x0A0B0C0D, 502, ACK | 0xC0, tsval, offset, 7, 1400)


@families
def test_gso_size_counts_only_for_a_run_of_tcp(frame: Frame) -> None:
    for gso_type, expected in ((0, 0), (1, 900), (3, 0), (4, 900), (5, 0), (0x84, 900)):
        segment = read(frame, vnet=pack("=BBHHHH", 0, gso_type, 0, 900, 0, 0))
        assert segment is not None
        assert segment.gso_size == expected


@families
@stamps
def test_truncated_frames_are_refused_and_padding_is_no_payload(frame: Frame, options: bytes) -> None:
    frame = frame.but(options=options, payload=b"some payload")
    whole = NO_VNET + frame.built()
    assert parse(whole, 14) is not None
    for end in range(len(whole)):
        assert parse(memoryview(whole)[:end], 14) is None
    padded = read(frame, tail=bytes(6))
    assert padded is not None
    assert padded.length == 12


def test_fragments_and_other_protocols_are_refused() -> None:
    for fragment in (0x2000, 0x6000, 0x0001, 0x1FFF):
        assert read(IPV4.but(fragment=fragment)) is None
        assert read(IPV4.but(fragment=fragment, ip_options=bytes(4))) is None
    for protocol in (0, 1, 17, 44, 51, 58):
        assert read(IPV4.but(next_header=protocol)) is None
        assert read(IPV6.but(next_header=protocol)) is None
    assert read(IPV6.but(next_header=44, extensions=bytes((6, 0, 0, 1, 0, 0, 0, 1)))) is None


@families
def test_flags_that_no_tcp_sends_are_refused(frame: Frame) -> None:
    sane = {0x10, 0x11, 0x02, 0x12, 0x04, 0x14}
    for flags in range(256):
        assert (read(frame.but(flags=flags)) is not None) == (flags & 0x17 in sane)


@families
def test_offset_that_lies_outside_the_packet_is_refused(frame: Frame) -> None:
    whole = bytearray(NO_VNET + frame.but(payload=bytes(8)).built())
    at = len(whole) - 8 - 20 + 12
    for words in range(16):
        whole[at] = words << 4
        assert (parse(whole, 14) is not None) == (5 <= words <= 7)


@pytest.mark.parametrize("version", [0, 5, 7, 15])
@families
def test_other_ip_versions_are_refused(frame: Frame, version: int) -> None:
    whole = bytearray(NO_VNET + frame.built())
    whole[24] = version << 4 | whole[24] & 15
    assert parse(whole, 14) is None


def test_ipv4_options_and_ipv6_extension_headers_are_skipped() -> None:
    expected = read(IPV4.but(payload=b"abc"))
    assert expected is not None
    for words in (1, 10):
        assert read(IPV4.but(payload=b"abc", ip_options=b"\x01" * 4 * words)) == expected._replace(
            offset=expected.offset + 4 * words
        )
    expected = read(IPV6.but(payload=b"abc"))
    assert expected is not None
    extensions = bytes((60, 0)) + bytes(6) + bytes((43, 2)) + bytes(22) + bytes((6, 0)) + bytes(6)
    found = read(IPV6.but(payload=b"abc", next_header=0, extensions=extensions))
    assert found == expected._replace(offset=expected.offset + 40)


@pytest.mark.parametrize(
    ("options", "tsval"),
    [
        (b"\x08\x0a" + pack(">II", 5, 6) + b"\x01\x01", 5),
        (b"\x01\x01\x05\x0a" + bytes(8) + b"\x01\x01\x08\x0a" + pack(">II", 0xFFFFFFFF, 6), 0xFFFFFFFF),
        (b"\x00\x01\x08\x0a" + pack(">II", 5, 6), None),
        (b"\x01\x01\x08\x0b" + pack(">II", 5, 6), None),
        (b"\x01\x01\x05\x0a" + pack(">II", 5, 6), None),
        (b"\x05\x00\x08\x0a" + pack(">II", 5, 6), None),
        (b"\x05\x01\x08\x0a" + pack(">II", 5, 6), None),
        (b"\x01\x01\x01\x08", None),
    ],
)
def test_timestamps_are_found_wherever_they_stand(options: bytes, tsval: int | None) -> None:
    segment = read(IPV4.but(options=options, payload=b"abc"))
    assert segment is not None
    assert (segment.tsval, segment.length) == (tsval, 3)


@given(st.binary(max_size=200), st.sampled_from([0, 14]), st.sampled_from([b"\x45", b"\x46", b"\x4f", b"\x60", b""]))
def test_arbitrary_bytes_never_raise_and_the_payload_is_inside(data: bytes, link_bytes: int, first: bytes) -> None:
    frame = data[: VNET_BYTES + link_bytes] + first + data[VNET_BYTES + link_bytes :]
    segment = parse(memoryview(frame), link_bytes)
    if segment is not None:
        assert VNET_BYTES + link_bytes + 40 <= segment.offset <= segment.offset + segment.length <= len(frame)
    Template.learn(memoryview(frame), link_bytes)


numbers = st.integers(0, 2**32 - 1)


@given(
    st.sampled_from([IPV4, IPV6]), numbers, numbers, st.none() | numbers, st.integers(0, 40_000), st.integers(1, 9000)
)
def test_what_is_built_is_read_back(
    frame: Frame, sequence: int, ack: int, tsval: int | None, size: int, segment: int
) -> None:
    header = Header(learnt(frame), tsval is not None)
    built = header.for_run(size, segment, sequence, ack, 65535, tsval or 0, 9, ACK)
    gso_size = segment if size > segment else 0
    expected = Segment(frame.key, sequence, ack, 65535, ACK, tsval, len(built), size, gso_size)
    assert parse(built + bytes(size), 14) == expected


def impacket() -> Any:
    pytest.importorskip("impacket.ImpactPacket")
    pytest.importorskip("impacket.IP6")
    return pytest.importorskip("impacket.ImpactDecoder")


@families
@stamps
def test_impacket_reads_what_is_built(frame: Frame, options: bytes) -> None:
    decoder = impacket().EthDecoder()
    header = Header(learnt(frame.but(options=options)), bool(options))
    for size, flags in itertools.product((0, 5, 2900), (ACK, ACK | FIN, ACK | RST)):
        for index, segment in enumerate(wire(header.for_run(size, 1400, 11, 22, 333, 44, 55, flags) + bytes(size))):
            ip = decoder.decode(segment).child()
            tcp = ip.child()
            addresses = [ip.get_ip_src(), ip.get_ip_dst()]
            if frame is IPV4:
                assert addresses == [frame.source, frame.destination]
                assert (ip.get_ip_ttl(), ip.get_ip_df(), ip.get_ip_len()) == (64, 0x4000, len(segment) - 14)
            else:
                assert [each.as_string().lower() for each in addresses] == [frame.source, frame.destination]
                assert (ip.get_hop_limit(), ip.get_flow_label(), ip.get_payload_length()) == (
                    64,
                    0xABCDE,
                    len(segment) - 54,
                )
            assert (tcp.get_th_sport(), tcp.get_th_dport()) == (40000, 443)
            assert (tcp.get_th_seq(), tcp.get_th_ack(), tcp.get_th_win()) == (11 + 1400 * index, 22, 333)
            assert tcp.get_th_flags() & 0xFF == flags
            stamps = [option for option in tcp.get_options() if option.get_kind() == 8]
            assert [(option.get_ts(), option.get_ts_echo()) for option in stamps] == ([(44, 55)] if options else [])


@families
def test_what_impacket_builds_is_read(frame: Frame) -> None:
    impacket()
    from impacket import IP6, ImpactPacket  # noqa: PLC0415 - optional

    tcp = ImpactPacket.TCP()
    tcp.set_th_sport(40000)
    tcp.set_th_dport(443)
    tcp.set_th_seq(0x01020304)
    tcp.set_th_ack(0x0A0B0C0D)
    tcp.set_th_win(502)
    tcp.set_ACK()
    tcp.contains(ImpactPacket.Data(b"payload"))
    if frame is IPV4:
        ip: Any = ImpactPacket.IP()
    else:
        ip = IP6.IP6()
        ip.set_payload_length(27)
        ip.set_next_header(6)
        ip.set_hop_limit(64)
        ip.set_traffic_class(0)
        ip.set_flow_label(frame.flow_label)
    ip.set_ip_src(frame.source)
    ip.set_ip_dst(frame.destination)
    if frame is IPV4:
        ip.set_ip_p(6)
        ip.set_ip_df(1)
        ip.set_ip_ttl(64)
        ip.set_ip_id(0x1234)
    ip.contains(tcp)
    packet = bytes(ip.get_packet())
    segment = parse(NO_VNET + packet, 0)
    assert segment == Segment(frame.key, 0x01020304, 0x0A0B0C0D, 502, ACK, None, VNET_BYTES + len(packet) - 7, 7, 0)
    if frame is IPV4:
        assert packet.hex() == frame.but(payload=b"payload").ip().hex()
