"""The debug option `capture`: what two real instances write is what tcpdump and impacket read."""

import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from struct import unpack_from

import pytest

from tests.core.test_tcp_header import impacket
from tests.netlab import Lab
from tests.system.spray_pair import SprayPair, answering, ask, backend_in_use

SIZES = (1, 1400, 9000, 40_000)
FILE_HEADER_BYTES, PACKET_HEADER_BYTES = 24, 16


def packets(path: Path) -> list[tuple[float, bytes]]:
    raw = path.read_bytes()
    found, at = [], FILE_HEADER_BYTES
    while at < len(raw):
        seconds, rest, stands, _ = unpack_from("=IIII", raw, at)
        at += PACKET_HEADER_BYTES
        found.append((seconds + rest / 1e6, raw[at : at + stands]))
        at += stands
    assert at == len(raw), "half a packet at the end"
    return found


@pytest.mark.pcap
@pytest.mark.parametrize(("version", "workers"), [(4, 1), (6, 2)])
def test_captures_hold_what_passed_the_ports(
    lab: Lab, backend: str, tmp_path: Path, version: int, workers: int
) -> None:
    assert backend_in_use[0] == backend
    start_s = time.time()
    with (
        SprayPair(
            lab,
            kind="all",
            ports=2,
            version=version,
            workers=(workers, workers),
            client_tunnel=f'capture = "{tmp_path}/client.pcap"\n',
            server_tunnel=f'capture = "{tmp_path}/server"\ncapture_max = "1GiB"\n',
        ) as pair,
        pair.target() as target,
        answering(target),
        pair.application() as application,
    ):
        for size in SIZES * 4:
            ask(application, bytes(size))
    names = [f"{end}.{worker}.pcap" for end in ("client", "server") for worker in range(workers)]
    assert sorted(each.name for each in tmp_path.iterdir()) == names
    for name in names:
        path = tmp_path / name
        assert path.stat().st_mode & 0o777 == 0o600
        found = packets(path)
        assert all(start_s <= time_s <= time.time() for time_s, _ in found)
        check_with_impacket([packet for _, packet in found], version)
        check_with_tcpdump(path, len(found))


def check_with_impacket(found: list[bytes], version: int) -> None:
    """Both kinds of ports are there, each direction of each connection goes on where it was, and no segment is there
    twice."""
    kinds, expected, bare = set(), dict[tuple[int, int], int](), Counter[bytes]()
    decoder = impacket().IPDecoder if version == 4 else impacket().IP6Decoder
    for packet in found:
        inner = decoder().decode(packet).child()
        kinds.add(type(inner).__name__)
        if type(inner).__name__ != "TCP":
            continue
        way = inner.get_th_sport(), inner.get_th_dport()
        length = len(packet) - (20 if version == 4 else 40) - inner.get_header_size()
        first = inner.get_th_seq()
        if not length and not inner.get_SYN():
            bare[packet] += 1
            continue
        if way in expected and not inner.get_SYN():
            assert first == expected[way], f"{way} goes on at {first} instead of {expected[way]}"
        expected[way] = (first + length + inner.get_SYN()) % 2**32
    assert kinds == {"TCP", "UDP"}
    assert set(bare.values()) == {1}, bare


def check_with_tcpdump(path: Path, count: int) -> None:
    """Every packet, and no wrong checksum."""
    if shutil.which("tcpdump") is None:
        pytest.skip("no tcpdump here")
    done = subprocess.run(["tcpdump", "-nvvr", path], capture_output=True, text=True, check=True, timeout=60)
    assert len(re.findall(r"^(?=[0-9]{2}:)", done.stdout, re.MULTILINE)) == count
    assert not re.search(r"incorrect|bad udp cksum|truncated", done.stdout)
    assert "correct" in done.stdout and "sum ok" in done.stdout


def test_capture_that_finds_no_place_is_told_and_traffic_goes_on(lab: Lab, tmp_path: Path) -> None:
    place = tmp_path / "readonly.0.pcap"
    place.with_name("readonly.0.old.pcap").mkdir()
    place.write_text("in the way")
    with (
        SprayPair(lab, ports=2, client_tunnel=f'capture = "{tmp_path}/readonly.pcap"\n') as pair,
        pair.target() as target,
        answering(target),
        pair.application() as application,
    ):
        for size in SIZES:
            ask(application, bytes(size))
        assert pair.log("client").count("WARNING") == 1, pair.logs()
        assert f"capture ends tunnel=kcp file={place} reason=" in pair.log("client")
    assert place.read_text() == "in the way"
