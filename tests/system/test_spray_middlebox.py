"""Spray tunnels through a router that strips TCP options or has a small MTU that nobody tells of, over links of any MTU
and with offloads on and off.

All of it with FORWARDER_TEST_LONG=1 only, but for one of each kind.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.netlab import Lab
from tests.system.fake_tcp_ends import packet_port
from tests.system.segments import EVERYTHING, SYN, Segment, read
from tests.system.spray_pair import SprayPair, answering, ask
from tests.system.spray_traffic import Echoes
from tests.system.strict_nat import StrictNat

LONG = bool(os.environ.get("FORWARDER_TEST_LONG"))
SIZES = (1, 1399, 1472, 1473, 9000, 65_507)
SMALL_MTU = 1280
SCALE_7_BYTES = 6 << 20
FOUND_S = 20.0
PORTS = 2
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.deadline(240)]
only_long = pytest.mark.skipif(not LONG, reason="FORWARDER_TEST_LONG=1 does it")


def check_echoes(pair: SprayPair, seconds: float = 2.0) -> None:
    with Echoes(pair, per_second=2000) as echoes:
        time.sleep(seconds)
    lost = echoes.lost(0)
    assert lost.sent > 1000 * seconds
    assert lost.there == lost.back == 0, f"{lost}{pair.logs()}"
    assert echoes.wrong == echoes.repeated == 0


def check_sizes(pair: SprayPair) -> None:
    contents = random.Random(7)
    with pair.target() as target, answering(target), pair.application() as application:
        for size in SIZES * 3:
            try:
                ask(application, contents.randbytes(size))
            except TimeoutError:
                pytest.fail(f"{size} bytes did not come back{pair.logs()}")


# Options


@contextmanager
def router_that_strips(options: str) -> Iterator[StrictNat]:
    with StrictNat() as nat:
        if options:
            rule = f"-t mangle -A FORWARD -p tcp -j TCPOPTSTRIP --strip-options {options}"
            try:
                nat.router("iptables", "-w", *rule.split())
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no such rule here: {error.stderr}")
        yield nat


@only_long
@pytest.mark.parametrize("options", ["timestamp", "wscale", "mss", "timestamp,wscale,mss,sack-permitted"])
def test_tunnel_works_where_options_are_stripped(options: str) -> None:
    with router_that_strips(options) as nat, SprayPair(nat.labs[0], ports=PORTS) as pair:
        check_echoes(pair)
        check_sizes(pair)
        check_echoes(pair)
        assert nat.invalid() == 0
        assert pair.carriers_up() == PORTS


@only_long
def test_tunnel_works_with_a_window_scale_of_7() -> None:
    with router_that_strips("") as nat, SprayPair(nat.labs[0], ports=PORTS, start=False) as pair:
        for end in ("client", "server"):
            pair.modules[end] = ["tests.system.narrow", str(SCALE_7_BYTES)]
            nat.labs[0].run(end, ["sysctl", "-qw", f"net.ipv4.tcp_rmem=4096 131072 {SCALE_7_BYTES}"])
        with packet_port(nat.labs[0], "server", program=EVERYTHING) as observer:
            pair.start("server")
            pair.start("client")
            pair.wait_carriers(PORTS)
            greetings = [each for each in seen(observer) if each.flags & SYN]
        assert {each.scale for each in greetings} == {7}
        check_echoes(pair)
        check_sizes(pair)
        assert nat.invalid() == 0


def seen(observer: object) -> list[Segment]:
    found = []
    while (segment := read(observer, 0)) is not None:  # type: ignore[arg-type]
        found.append(segment)
    return found


# Path MTU


def time_to_find(pair: SprayPair) -> float:
    """Until all ports have carried full datagrams both ways, as far as one can tell: many in a row come back."""
    start_s = time.monotonic()
    in_a_row = 0
    with pair.target() as target, answering(target), pair.application() as application:
        application.settimeout(0.5)
        while in_a_row < 20 * PORTS:
            assert time.monotonic() < start_s + FOUND_S, f"no way for full datagrams{pair.logs()}"
            datagram = random.randbytes(1399)
            application.send(datagram)
            try:
                while application.recv(2000) != datagram:
                    pass
                in_a_row += 1
            except TimeoutError:
                in_a_row = 0
    return time.monotonic() - start_s


@only_long
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_small_mtu_that_nobody_tells_of_is_found(kind: str) -> None:
    with StrictNat() as nat:
        nat.router("ip", "link", "set", "outside", "mtu", str(SMALL_MTU))
        nat.router("iptables", "-w", "-A", "OUTPUT", "-p", "icmp", "-j", "DROP")
        with SprayPair(nat.labs[0], kind=kind, ports=PORTS) as pair:
            print(f"found after {time_to_find(pair):.1f} s")
            check_sizes(pair)
            check_echoes(pair)
            assert pair.carriers_up() == PORTS


@only_long
@pytest.mark.parametrize(("kind", "version"), [("tcp", 4), ("tcp", 6), ("udp", 4)])
def test_large_mtu_carries_everything(kind: str, version: int) -> None:
    with Lab(emulate=False, mtu=9000) as lab, SprayPair(lab, kind=kind, ports=PORTS, version=version) as pair:
        check_sizes(pair)
        check_echoes(pair)


# Offloads

_SET = "import sys; from tests.netlab import kernel; kernel.set_features('eth0', eval(sys.argv[1]))"
_CUTTING = ("tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-udp-segmentation", "tx-generic-segmentation")
_MERGING = ("rx-gro", "rx-udp-gro-forwarding")


@pytest.mark.parametrize(
    ("client", "server"),
    [
        pytest.param((True, False), (False, True), id="cut-merge"),
        *(
            pytest.param(client, server, id=f"{client}-{server}", marks=only_long)
            for client, server in (((False, False),) * 2, ((True, True),) * 2, ((False, True), (True, False)))
        ),
    ],
)
def test_offloads_do_no_harm(client: tuple[bool, bool], server: tuple[bool, bool]) -> None:
    """Of each end: whether its device takes runs whole, and whether it merges segments that come in."""
    with Lab(emulate=False) as lab:
        for end, (cutting, merging) in (("client", client), ("server", server)):
            wanted = dict.fromkeys(_CUTTING, cutting) | dict.fromkeys(_MERGING, merging)
            lab.run(end, [sys.executable, "-c", _SET, repr(wanted)], cwd=ROOT)
        with SprayPair(lab, kind="all", ports=PORTS) as pair:
            check_sizes(pair)
            check_echoes(pair)
