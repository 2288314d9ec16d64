"""What takes minutes: 10,000 conversations, 6 GiB on one connection behind a strict router, WireGuard and 1 GiB by scp.

FORWARDER_TEST_LONG=1 runs them. FORWARDER_TEST_TOTAL_BYTES is how much goes through the one connection (default 6 GiB),
and through WireGuard (default 1 GiB).
"""

import json
import os
import resource
import socket
import struct
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.netlab import Lab
from tests.system import wireguard
from tests.system.pair import ENDS
from tests.system.payload import together
from tests.system.processes import settled_levels, wait_level
from tests.system.programs import program, sha256, sshd, write_random
from tests.system.spray_pair import DATAGRAM_MAX, LOCAL, TARGET, SprayPair, answering
from tests.system.strict_nat import StrictNat
from tests.system.wireguard import ADDRESSES, Wireguard

TOTAL_BYTES = int(os.environ.get("FORWARDER_TEST_TOTAL_BYTES", "0"))
CONVERSATIONS = 10_000
AT_A_TIME = 250
GROWTH_BYTES = 8 << 20
FLOOD_BPS = 0.8e9
"""What two cores take without loss at both ends, at the router and at whoever counts."""
SIZE, RUN = 1300, 44
_UDP_SEGMENT, _UDP_GRO = 103, 104

pytestmark = pytest.mark.skipif(not os.environ.get("FORWARDER_TEST_LONG"), reason="FORWARDER_TEST_LONG=1 runs it")


def resident_bytes(pair: SprayPair) -> int:
    """Of all workers, what they do not share."""
    total = 0
    for end in ENDS:
        for worker in pair.status(end)["workers"]:
            text = Path(f"/proc/{worker['pid']}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Private_"))
    return total


@pytest.mark.deadline(600)
@pytest.mark.parametrize("workers", [(1, 1), (2, 2)])
def test_ten_thousand_conversations_of_one_client_and_their_memory_returns(lab: Lab, workers: tuple[int, int]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < CONVERSATIONS + 1000:
        pytest.skip(f"only {hard} descriptors")
    tunnel = 'duration = "20s"'
    with (
        SprayPair(lab, kind="all", workers=workers, client_tunnel=tunnel, server_tunnel=tunnel) as pair,
        pair.target() as target,
        answering(target),
    ):
        held = [resident_bytes(pair)]
        for turn in range(3):
            with ExitStack() as stack:
                applications = [stack.enter_context(pair.application()) for _ in range(CONVERSATIONS)]
                for start in range(0, CONVERSATIONS, AT_A_TIME):
                    some = applications[start : start + AT_A_TIME]
                    for number, application in enumerate(some, start):
                        application.send(struct.pack("!IH", number, turn))
                    for number, application in enumerate(some, start):
                        assert application.recv(DATAGRAM_MAX) == struct.pack("!IH", number, turn)
                assert [pair.flows_open(end) for end in ENDS] == [CONVERSATIONS, CONVERSATIONS], pair.logs()
            most = resident_bytes(pair)
            pair.wait_flows(0, 60)
            if turn == 0:
                before = settled_levels(pair)
            wait_level(pair, before)
            held.append(resident_bytes(pair))
            figures = ", ".join(f"{each / 2**20:.1f}" for each in (held[-2], most, held[-1]))
            print(f"MiB before, with and after {CONVERSATIONS} conversations: {figures}")
        # The first time makes room that later ones find.
        assert held[-1] < held[1] + GROWTH_BYTES, held
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def flood(application: socket.socket, over: threading.Event, bits_per_s: float) -> None:
    """Runs of datagrams, until it is over."""
    application.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, SIZE)
    run, sent, start_s = bytes(SIZE * RUN), 0, time.monotonic()
    while not over.is_set():
        with suppress(OSError):
            application.send(run)
        sent += len(run)
        time.sleep(max(start_s + sent * 8 / bits_per_s - time.monotonic(), 0))


def count(target: socket.socket, over: threading.Event) -> int:
    """Bytes that come, until it is over."""
    target.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    target.settimeout(0.5)
    place, total = bytearray(DATAGRAM_MAX), 0
    while not over.is_set():
        with suppress(TimeoutError):
            total += target.recv_into(place)
    return total


@pytest.mark.deadline(900)
def test_more_than_the_sequence_numbers_hold_passes_over_one_connection_behind_a_strict_router() -> None:
    total = TOTAL_BYTES or 6 << 30
    with (
        StrictNat() as nat,
        SprayPair(nat.labs[0], kind="tcp", ports=1) as pair,
        pair.target() as target,
        pair.application() as application,
    ):
        invalid, mappings = nat.invalid(), nat.mappings("tcp")
        over = threading.Event()

        def watch() -> None:
            """Until that much has come out at the other end."""
            try:
                while pair.tunnel("server")["bytes_in"] < total:
                    time.sleep(2)
            finally:
                over.set()

        start_s = time.monotonic()
        came = together(watch, lambda: flood(application, over, FLOOD_BPS), lambda: count(target, over))[2]
        took_s = time.monotonic() - start_s
        time.sleep(1)
        sent, taken = pair.tunnel("client")["bytes_out"], pair.tunnel("server")["bytes_in"]
        (carrier,) = (each for session in pair.tunnel("client")["sessions"] for each in session["carriers"])
        print(f"{sent / 2**30:.2f} GiB in {took_s:.0f} s, {sent - taken} bytes lost, {came / 2**30:.2f} GiB counted")
        assert carrier["age_s"] > took_s, "it was another connection in the end"
        assert nat.mappings("tcp") == mappings
        assert nat.invalid() == invalid
        assert total <= taken <= sent < 1.02 * taken, "lost, for want of CPU or at the router"


@pytest.mark.skipif(wireguard.is_missing(), reason="no wireguard-go here, or not root")
@pytest.mark.deadline(900)
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_wireguard_carries_iperf3_and_a_gibibyte_by_scp(kind: str, tmp_path: Path) -> None:
    total = TOTAL_BYTES or 1074_000_000
    scp, host = program("scp"), ADDRESSES["server"]
    original, copy = tmp_path / "original", tmp_path / "copy"
    write_random(original, total)
    with (
        Lab(emulate=False) as lab,
        SprayPair(lab, kind=kind) as pair,
        Wireguard(lab, LOCAL, TARGET[1]),
        sshd(lab, tmp_path, (host, 22), (host, 22)) as options,
    ):
        server = lab.popen("server", ["iperf3", "-s", "-1", "-B", host], stdout=-3)
        time.sleep(1)
        done = lab.run("client", ["iperf3", "-J", "-t", "5", "-c", host], timeout=60)
        server.wait()
        bits_per_s = json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]
        start_s = time.monotonic()
        lab.run("client", [scp, "-q", *options, str(original), f"{host}:{copy}"], timeout=600)
        took_s = time.monotonic() - start_s
        print(f"iperf3 {bits_per_s / 1e6:.0f} Mbit/s; {total} bytes at {total * 8 / took_s / 1e6:.0f} Mbit/s")
        assert sha256(copy) == sha256(original)
        assert all(pair.tunnel(end)["bytes_in"] > 0 for end in ENDS)
        assert pair.tunnel("client")["bytes_out"] > total
