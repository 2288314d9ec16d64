"""Captures of what passes a worker's ports: the files, what stands in them, and what becomes of a full disk."""

import errno
import logging
import os
import socket
from pathlib import Path
from struct import unpack_from
from typing import Any

import pytest

from tests.core.segments import ETHERNET4, Frame
from tests.core.test_tcp_header import IPV4, impacket, learnt
from tests.io.test_raw_wire import FakePort
from tests.io.test_udp_wire import FAMILIES, NOW, Ends, bound
from workers.core.capture_file import FILE_HEADER
from workers.core.tcp_header import ACK, Header
from workers.io.capturing import Capture, CapturingPort, open_capture, paths_of
from workers.settings import Address, SprayServerTunnel


def tunnel(path: Path | None, **more: Any) -> SprayServerTunnel:
    name = None if path is None else str(path)
    return SprayServerTunnel(
        name="kcp", index=0, ports=(1,), listen="::", target=Address("::", 1), capture=name, **more
    )


def packets(path: Path) -> list[bytes]:
    raw = path.read_bytes()
    assert raw.startswith(FILE_HEADER)
    found, at = [], len(FILE_HEADER)
    while at < len(raw):
        _, _, stands, _ = unpack_from("=IIII", raw, at)
        found.append(raw[at + 16 : at + 16 + stands])
        at += 16 + stands
    assert at == len(raw)
    return found


# Files


def test_each_worker_has_files_of_its_own() -> None:
    names = ("/a/kcp.pcap", "/a/kcp", "/a.b/kcp.x.cap")
    assert [tuple(path.as_posix() for path in paths_of(name, 12)) for name in names] == [
        ("/a/kcp.12.pcap", "/a/kcp.12.old.pcap"),
        ("/a/kcp.12.pcap", "/a/kcp.12.old.pcap"),
        ("/a.b/kcp.x.12.cap", "/a.b/kcp.x.12.old.cap"),
    ]
    assert open_capture(tunnel(None), 0) is None


def test_file_is_the_owners_alone_and_begins_anew_when_it_is_full(tmp_path: Path) -> None:
    path, older = paths_of(str(tmp_path / "kcp.pcap"), 3)
    path.write_text("of the last start")
    capture = Capture(tunnel(tmp_path / "kcp.pcap", capture_max_bytes=1000), 3)
    assert (older.read_text(), path.stat().st_mode & 0o777) == ("of the last start", 0o600)
    for fill in (b"a", b"b", b"c"):
        capture.write(fill * 400)
    assert older.read_bytes() == FILE_HEADER + b"a" * 400 + b"b" * 400
    assert path.read_bytes() == FILE_HEADER + b"c" * 400
    capture.write(b"d" * 2000)
    assert path.stat().st_size == len(FILE_HEADER) + 2000
    assert sorted(os.listdir(tmp_path)) == [older.name, path.name]


def test_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("gold")
    path, older = paths_of(str(tmp_path / "kcp"), 0)
    path.symlink_to(precious)
    Capture(tunnel(tmp_path / "kcp"), 0)
    assert precious.read_text() == "gold"
    assert older.is_symlink() and not path.is_symlink()


class FullDisk:
    """Takes so much and no more."""

    def __init__(self, room: int) -> None:
        self.room, self.sizes = room, list[int]()

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return taken

    def truncate(self, size: int) -> None:
        self.sizes.append(size)


@pytest.mark.parametrize("room", [0, 100])
def test_full_disk_is_told_once_and_leaves_whole_packets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    capture = Capture(tunnel(tmp_path / "kcp.pcap"), 0)
    disk: Any = FullDisk(room)
    capture._file = disk
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            capture.write(bytes(200))
    path = paths_of(str(tmp_path / "kcp.pcap"), 0)[0]
    assert caplog.messages == [f"capture ends tunnel=kcp file={path} reason=no space left on device"]
    assert disk.sizes == [len(FILE_HEADER)]


def test_file_that_cannot_be_made_is_told_and_traffic_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    capture = Capture(tunnel(tmp_path / "nowhere" / "kcp.pcap"), 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no such file or directory" in caplog.text
    port = FakePort()
    header = Header(learnt(IPV4), False).for_run(3, 1400, 1, 2, 3, 4, 5)
    assert CapturingPort(port, capture).send(header, b"abc") == 3
    assert len(port.sent) == 1 and len(caplog.records) == 1


# What stands there


def test_frames_of_a_port_stand_there_in_both_directions(tmp_path: Path) -> None:
    path = paths_of(str(tmp_path / "kcp.pcap"), 0)[0]
    capture = Capture(tunnel(tmp_path / "kcp.pcap"), 0)
    inner = FakePort()
    port = CapturingPort(inner, capture)
    header = Header(learnt(IPV4), True).for_run(3000, 1400, 7, 8, 9, 10, 11)
    assert port.send(header, memoryview(bytes(3000))) == 3000
    inner.open = False
    assert port.send(header, memoryview(bytes(3000))) == -1
    came = Frame(payload=b"answer", flags=ACK).built()
    inner.coming.append(bytes(10) + came)
    view = memoryview(bytearray(70_000))
    assert port.receive_into(view) == len(came) + 10
    assert port.receive_into(view) == 0
    assert (port.device, port.link_bytes, port.fileno()) == (inner.device, 14, 0)
    first, *_, third, answer = packets(path)
    assert [len(each) for each in packets(path)] == [1452, 1452, 252, len(came) - len(ETHERNET4)]
    assert answer == came[len(ETHERNET4) :]
    numbers = [impacket().IPDecoder().decode(each).child().get_th_seq() for each in (first, third)]
    assert numbers == [7, 2807]


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_stand_there_with_headers_at_both_ends(tmp_path: Path, family: str) -> None:
    number, host = FAMILIES[family]
    path = paths_of(str(tmp_path / "udp.pcap"), 0)[0]
    sockets = [bound(number, "::" if number == socket.AF_INET6 else "0.0.0.0")]
    capture = Capture(tunnel(tmp_path / "udp.pcap"), 0)
    run = b"".join(bytes([index]) * 1000 for index in range(5)) + b"end"
    with Ends(number, host, sockets=sockets, record=capture) as ends:
        client, _ = ends.dial(host, ends.numbers[0])
        server, owner = ends.meet(client)
        assert server.owner is owner
        before = len(packets(path))
        assert client.send_run(memoryview(bytearray(run)), 1000, NOW) == len(run)
        while sum(len(data) for data, _ in owner.came) < len(run):
            ends.loop.turn()
        server.send_one(b"answer", NOW)
        ends.loop.turn()
        found = packets(path)[before:]
    decoder = impacket().IPDecoder if number == socket.AF_INET else impacket().IP6Decoder
    seen = [decoder().decode(each).child() for each in found]
    there = [(udp.get_uh_dport(), udp.get_packet()[8:]) for udp in seen]
    pieces = [run[at : at + 1000] for at in range(0, len(run), 1000)]
    port, own = ends.numbers[0], int(client.local.rpartition(":")[2])
    assert there == [(port, piece) for piece in pieces * 2] + [(own, b"answer")] * 2
    assert {each[-8 - len(piece) :][:4] for each, piece in zip(found, pieces, strict=False)} == {
        own.to_bytes(2) + port.to_bytes(2)
    }
