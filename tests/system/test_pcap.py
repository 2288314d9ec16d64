"""The `pcap` backend's ports on real devices: what is cut, what has changed, and what is refused."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.netlab import Lab
from tests.system.fake_tcp_ends import Ends, first_byte, next_frame, packet_port, pattern
from tests.system.fake_tcp_wires import PcapPortInside, Side, inside
from tests.system.segments import EVERYTHING, SEGMENT, Segment, read, send
from workers.core.bpf import capture
from workers.core.tcp_header import parse
from workers.io.packet import FRAME_BYTES_MAX, find_device
from workers.io.pcap_port import SNAPLEN

pytest.importorskip("pcap", reason="no pypcap here: deploy/venv test says why")
versions = pytest.mark.parametrize("version", [4, 6])


@contextmanager
def pcap_port(lab: Lab, side: Side, program: bytes = EVERYTHING) -> Iterator[PcapPortInside]:
    with lab.socket(side) as sock:
        device = find_device(sock, "eth0")
    port = PcapPortInside(lab, side, device, program)
    try:
        yield port
    finally:
        port.close()


def like(template: Segment, port: PcapPortInside) -> Segment:
    """A template of the packet backend's as this one's, which has no link header."""
    return template._replace(frame=template.frame[:10] + template.frame[24:])


@versions
def test_run_leaves_in_segments_with_right_checksums(lab: Lab, version: int) -> None:
    payload = pattern(100 * SEGMENT + 77)
    with Ends(lab, version) as ends, pcap_port(lab, "client") as port:
        _, template, server = ends.up
        first = first_byte(template)
        for at in range(0, len(payload), 40 * SEGMENT):
            send(port, like(template, port), first + at, payload[at : at + 40 * SEGMENT])
        came = b""
        while len(came) < len(payload):
            segment = next_frame(server)
            assert segment.sequence == (first + len(came)) % 2**32
            came += segment.payload
    assert came == payload


def test_longest_run_is_received_but_for_its_end(lab: Lab) -> None:
    with Ends(lab, 4) as ends, pcap_port(lab, "server", capture("server", [443], link_bytes=14)) as port:
        client, template, _ = ends.up
        payload = pattern(65_400)
        send(client, template, first_byte(template), payload, segment=1448)
        view = memoryview(bytearray(FRAME_BYTES_MAX))
        segment = None
        while segment is None or not segment.length:
            segment = parse(view[: port.receive_into(view)], 0)
        assert SNAPLEN - 100 < segment.length < len(payload)
        assert bytes(view[segment.offset :][: segment.length]) == payload[: segment.length]
        assert (segment.gso_size, port.truncated, port.take_dropped()) == (0, 1, 0)


def test_segment_above_the_mtu_is_an_error(lab: Lab) -> None:
    with Ends(lab, 4) as ends, pcap_port(lab, "client") as port:
        template = like(ends.up[1], port)
        with pytest.raises(OSError, match="too long") as raised:
            send(port, template, first_byte(template), pattern(1460), segment=65_000)
        assert raised.value.errno == errno.EMSGSIZE
        assert send(port, template, first_byte(template), pattern(10)) == 0


def test_port_goes_on_when_its_device_changes() -> None:
    with Lab(emulate=False) as lab, Ends(lab, 4) as ends, pcap_port(lab, "client") as port:
        template = like(ends.up[1], port)
        lab.run("client", ["ip", "link", "set", "eth0", "down"])
        view = memoryview(bytearray(FRAME_BYTES_MAX))
        while port.receive_into(view):
            pass
        with pytest.raises(OSError, match=r"unreachable|down"):
            send(port, template, 1, b"lost")
        lab.run("client", ["ip", "link", "set", "eth0", "up", "mtu", "1300"])
        with lab.socket("client") as sock:
            found = find_device(sock, "eth0")
        assert found.mtu == 1300 != port.device.mtu
        before = port.fileno()
        port.bind(found, EVERYTHING)
        assert (port.device, port.fileno()) == (found, before)
        send(port, template, 7, b"found")
        while (segment := read(ends.server_port, 5)) is not None and segment.payload != b"found":
            pass
        assert segment is not None and segment.sequence == 7


def test_own_frames_are_seen_only_as_far_as_the_filter_wants(lab: Lab) -> None:
    program = capture("client", [443], link_bytes=14)
    with pcap_port(lab, "client", program) as port, packet_port(lab, "client", program=program) as other:
        view = memoryview(bytearray(FRAME_BYTES_MAX))
        with lab.listen("server", lab.server_ip4, 443), lab.connect("client", lab.server_ip4, 443) as connection:
            connection.send(b"payload")
            seen = []
            for _ in range(2):
                frame = next_frame(other)
                segment = None
                while segment is None:
                    segment = parse(view[: port.receive_into(view)], 0)
                seen.append((frame.flags, frame.sequence) == (segment.flags, segment.sequence))
        assert seen == [True, True]


def test_file_of_the_devices_name_is_not_taken_for_it(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libpcap's Python module reads a file of that name rather than the device."""
    with pcap_port(lab, "client") as port:
        device = port.device
    (tmp_path / "eth0").write_bytes(bytes.fromhex("d4c3b2a1020004000000000000000000ffff000001000000"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="takes the file eth0"):
        PcapPortInside(lab, "client", device, EVERYTHING)


def test_device_that_is_gone_is_told_and_nothing_stays_open(lab: Lab) -> None:
    with pcap_port(lab, "client") as port:
        device = port.device._replace(name="gone0")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="gone0"):
        PcapPortInside(lab, "client", device, EVERYTHING)
    assert len(os.listdir("/proc/self/fd")) == before
    with inside(lab.descriptor("client")):
        assert socket.if_nameindex()
