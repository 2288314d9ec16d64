"""Floods of strangers from another address, on a link of 500 Mbit/s that an established connection fills: its goodput
stays, and afterwards memory and descriptors are what they were.

FORWARDER_TEST_FLOOD_S: how long each flood lasts (default 3).
"""

import base64
import os
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bench.measure import BUSY_CORES, Others
from tests.netlab import Lab, Link
from tests.system.flood import Count, flooding
from tests.system.load import Bulk
from tests.system.pair import KEY_ID, Pair
from workers.core.handshake import ClientHandshake, Hello, Mode, WorkerId
from workers.core.noise import Suite

pytestmark = pytest.mark.alone

FLOOD_S = float(os.environ.get("FORWARDER_TEST_FLOOD_S", "3"))
BEFORE_S = 1.5
ONSET_S = 1.0
"""After so much of a flood, goodput counts."""
DEADLINE_S = 2
QUEUE_S = 10.0
"""In which the server has done with those that the kernel has accepted and nobody answered."""
KEPT = 0.8
REACHED = 0.8
"""Of the strangers that were asked for."""
ATTEMPTS = 2
GROWTH_BYTES = 6 << 20
LINK = Link(delay_ms=25, rate_bps=500e6)
DESCRIPTORS = 8192


def private_bytes(pid: int) -> int:
    """Without the arena, where the connection's bytes come and go."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0]) << 10


@dataclass(frozen=True)
class Level:
    """What has to be as before."""

    descriptors: list[int]
    memory: int

    @classmethod
    def of(cls, pair: Pair) -> "Level":
        return cls(
            [counts["descriptors"] for counts in pair.open_counts("server")],
            sum(map(private_bytes, pair.worker_pids("server"))),
        )


@pytest.fixture(scope="module", params=[1, 2])
def bulk(request: pytest.FixtureRequest) -> Iterator[Bulk]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < DESCRIPTORS:
        pytest.skip(f"no more than {hard} descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    workers = (request.param, request.param)
    patience = f'handshake_timeout = "{DEADLINE_S}s"'
    try:
        with (
            Lab(LINK, addresses=2) as lab,
            Pair(lab, workers=workers, server_tunnel=patience) as pair,
            pair.listen() as listener,
            Bulk(pair, listener) as made,
        ):
            made.bits_per_s(3)  # slow start
            yield made
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def message_1(secret: bytes) -> bytes:
    hello = Hello(random.getrandbits(64), random.getrandbits(64), 0, 0, "web", (WorkerId(0, 77),))
    ephemeral = os.urandom(32)
    made = ClientHandshake(KEY_ID, secret, Suite.AES256GCM, Mode.STRIPE, hello, ephemeral_private=ephemeral)
    return made.message_to_send


def check_flood(bulk: Bulk, per_second: float, *, least_held: int = 0, **flood: Any) -> Count:
    """Skips where other programs have taken so much that there was no flood, or no goodput."""
    pair = bulk.pair
    level = Level.of(pair)
    why = ""
    for _ in range(ATTEMPTS):
        before, others = bulk.bits_per_s(BEFORE_S), Others()
        with flooding(pair.lab, pair.host_port, per_second, FLOOD_S, **flood) as counts:
            time.sleep(ONSET_S)
            meanwhile = bulk.bits_per_s(FLOOD_S - ONSET_S)
        count: Count = counts[0]
        why = f"{before / 1e6:.0f} -> {meanwhile / 1e6:.0f} Mbit/s, {count.per_second:.0f} strangers a second"
        print(f"{why}: {count}")
        reached = count.begun > REACHED * per_second * FLOOD_S and count.most_held >= least_held
        if meanwhile >= KEPT * before and reached:
            break
        busy = others.cores()
    else:
        if busy > BUSY_CORES:
            pytest.skip(f"this machine is too busy: {why} while other programs used {busy:.1f} cores")
        pytest.fail(why)
    pair.wait(lambda: not pending(pair), "end of what is pending", DEADLINE_S + QUEUE_S)
    pair.wait(lambda: sum(Level.of(pair).descriptors) <= sum(level.descriptors), f"end of descriptors, {level}", 5)
    assert Level.of(pair).memory < level.memory + GROWTH_BYTES
    return count


def pending(pair: Pair) -> int:
    return sum(counts["pending"] for counts in pair.open_counts("server"))


def refused(pair: Pair) -> int:
    return sum(counts["refused"] for counts in pair.open_counts("server"))


def test_handshakes_with_a_wrong_key(bulk: Bulk) -> None:
    before = refused(bulk.pair)
    count = check_flood(bulk, 5000, message=message_1(bytes(32)))
    assert not count.answered
    handled = refused(bulk.pair) - before
    print(f"handled: {handled}")
    assert handled > 0.2 * count.established


def test_silent_connections(bulk: Bulk) -> None:
    count = check_flood(bulk, 1000, least_held=1500, message=b"", hold_s=2)
    assert not count.answered


def test_slow_drips(bulk: Bulk) -> None:
    count = check_flood(bulk, 500, least_held=750, message=message_1(bytes(32)), hold_s=2, drip=True)
    assert not count.answered


def test_replays_of_message_1(bulk: Bulk) -> None:
    secret = base64.b64decode((bulk.pair.folder / "laptop.key").read_bytes())
    sessions = [each["id"] for each in bulk.pair.tunnel("server")["sessions"]]
    count = check_flood(bulk, 2000, message=message_1(secret))
    assert count.answered <= ATTEMPTS
    assert [each["id"] for each in bulk.pair.tunnel("server")["sessions"]] == sessions
