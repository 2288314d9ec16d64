"""Spray tunnels as others see them: a router that translates addresses and drops what is not TCP as it should be, and
an observer of the wire.

FORWARDER_TEST_TOTAL_BYTES is how much passes the observer (default: what does in a second).
"""

import os
import struct
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.netlab import Lab
from tests.system.fake_tcp_ends import packet_port
from tests.system.segments import ACK, EVERYTHING, FIN, RST, SYN, Segment, options_of, read
from tests.system.spray_pair import SprayPair
from tests.system.spray_traffic import Echoes
from tests.system.strict_nat import OUTSIDE, StrictNat

HEAL_S = 3.0
PORTS = 4
MSS, SCALE, SACK, TIMESTAMPS = 2, 3, 4, 8
BARE = 1 / 1000
TOTAL_BYTES = int(os.environ.get("FORWARDER_TEST_TOTAL_BYTES", "0"))

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(scope="module")
def nat() -> Iterator[StrictNat]:
    with StrictNat() as made:
        yield made


@pytest.fixture(scope="module")
def pairs(nat: StrictNat, backend: str) -> Iterator[tuple[SprayPair, SprayPair]]:
    """A client and a server, and a second client of that server."""
    nat.forget()  # those of another backend
    with (
        SprayPair(nat.labs[0], kind="all", ports=PORTS) as pair,
        SprayPair(nat.labs[1], kind="all", ports=PORTS, start=False) as second,
    ):
        (second.folder / "laptop.key").write_bytes((pair.folder / "laptop.key").read_bytes())
        second.start("client")
        second.wait(lambda: second.carriers_up() == second.carriers, "ports of the second client")
        yield pair, second


def test_every_echo_returns_to_each_of_two_clients_behind_one_address(
    nat: StrictNat, pairs: tuple[SprayPair, SprayPair]
) -> None:
    pair, second = pairs
    invalid = nat.invalid()
    with Echoes(pair, second, per_second=2000) as echoes:
        time.sleep(1.5)
    lost = echoes.lost(0)
    assert lost.sent > 2000
    assert lost.there == lost.back == 0, f"{lost}{pair.logs()}{second.logs()}"
    assert echoes.wrong == echoes.repeated == 0
    assert nat.invalid() == invalid
    for each in (pair, second):
        assert each.carriers_up() == each.carriers
        assert all(port["bytes_in"] and port["bytes_out"] for port in carriers(each, "client"))
    assert {each["peer"].rpartition(":")[0] for each in carriers(pair, "server")} == {OUTSIDE}


def test_mappings_that_change_heal(nat: StrictNat, pairs: tuple[SprayPair, SprayPair]) -> None:
    pair, second = pairs
    before = nat.mappings("tcp") | nat.mappings("udp")
    assert len(before) == 2 * pair.carriers
    with Echoes(pair, second, per_second=1000) as echoes:
        time.sleep(0.2)
        nat.forget()
        forgotten_s = time.monotonic()
        time.sleep(HEAL_S + 1)
        after = nat.mappings("tcp") | nat.mappings("udp")
    lost = echoes.lost(forgotten_s + HEAL_S)
    print(lost, "healed", echoes.healed_s(forgotten_s))
    assert lost.there == lost.back == 0, f"{lost}{pair.logs()}"
    assert len(after - before) >= 2 * pair.carriers
    for each in (pair, second):
        assert each.carriers_up() == each.carriers


def carriers(pair: SprayPair, end: str) -> list[dict[str, Any]]:
    return [each for session in pair.tunnel(end)["sessions"] for each in session["carriers"]]


# On the wire


@pytest.mark.deadline(120 + TOTAL_BYTES // 5_000_000)
@pytest.mark.parametrize("version", [4, 6])
def test_observer_sees_real_handshakes_few_bare_acknowledgements_and_no_reset(
    lab: Lab, backend: str, version: int
) -> None:
    with (
        packet_port(lab, "server", program=EVERYTHING) as observer,
        SprayPair(lab, ports=PORTS, version=version, start=False) as pair,
    ):
        pair.start("server")
        pair.start("client")
        pair.wait_carriers(PORTS)
        greetings = seen(observer)
        with pair.target() as target, pair.application() as application:
            target.settimeout(0.2)
            counts, segments = Counter[str](), 0
            until_s = time.monotonic() + 1
            while time.monotonic() < until_s or segments * 1300 < TOTAL_BYTES:
                for _ in range(64):
                    application.send(bytes(1300))
                for each in seen(observer):
                    counts[kind_of(each)] += 1
                    if each.payload and each.target_port in pair.ports:
                        segments += -(-len(each.payload) // (each.gso_size or len(each.payload)))
    check_handshakes(greetings, pair.ports)
    # Through a raw socket each segment comes by itself, which this process takes its time for; at so slow a pace most
    # acknowledgements are for pauses, of 40 ms each.
    assert segments > (20_000 if backend == "packet" else 1000), segments
    print(counts, segments)
    assert counts["reset"] == counts["end"] == counts["begin"] == 0, counts
    assert counts["bare"] <= (BARE * segments if backend == "packet" else 25 * PORTS), (counts, segments)


def seen(observer: object) -> list[Segment]:
    found = []
    while (segment := read(observer, 0)) is not None:  # type: ignore[arg-type]
        found.append(segment)
    return found


def kind_of(segment: Segment) -> str:
    for flag, name in ((RST, "reset"), (FIN, "end"), (SYN, "begin")):
        if segment.flags & flag:
            return name
    return "payload" if segment.payload else "bare"


def check_handshakes(frames: list[Segment], ports: list[int]) -> None:
    """SYN, SYN-ACK and ACK of each port, with the options that a kernel sends, before any payload."""
    for port in ports:
        of_port = [each for each in frames if port in (each.source_port, each.target_port)]
        syn, answer, ack = of_port[:3]
        assert [each.flags for each in (syn, answer, ack)] == [SYN, SYN | ACK, ACK]
        assert not (syn.payload or answer.payload or ack.payload)
        assert answer.acknowledged == ack.sequence == (syn.sequence + 1) % 2**32
        assert ack.acknowledged == (answer.sequence + 1) % 2**32
        for each in (syn, answer):
            options = tcp_options(each)
            assert set(options) >= {MSS, SCALE, SACK, TIMESTAMPS}, options
            assert struct.unpack("!H", options[MSS])[0] > 1000
        assert answer.echoed == syn.timestamp and ack.echoed == answer.timestamp
        assert not any(each.flags & RST for each in of_port)


def tcp_options(segment: Segment) -> dict[int, bytes]:
    tcp = 10 + 14 + segment.ip_bytes
    return options_of(segment.frame[tcp + 20 : tcp + (segment.frame[tcp + 12] >> 4) * 4])
