"""A real client and a real server that are reloaded, resized and upgraded while traffic goes on.

FORWARDER_TEST_LONG=1: 50 reloads and 5 upgrades of both ends during 1 GiB each way and 200 new connections a second.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forwarder.control import request
from tests.bench.measure import family, memory_bytes
from tests.netlab import Lab
from tests.system.pair import ENDS, Pair
from tests.system.processes import settled_levels
from tests.system.traffic import WHOLE, Traffic

LONG = bool(os.environ.get("FORWARDER_TEST_LONG"))
RELOADS, UPGRADES = (50, 5) if LONG else (3, 1)
TOTAL_BYTES, RATE_BPS = (1 << 30, 100e6) if LONG else (8 << 20, 20e6)
ROUND_S = 10.0 if LONG else 3.0
PER_SECOND = 200 if LONG else 50
CHURN = [sys.executable, "-m", "tests.system.churn"]
ROOT = Path(__file__).parents[2]
SHORT_PORTS = (8081, 9001, 8001)
SHORT = {
    "client": 'host = "{address}"\nhost_port = 9001\nlocal_port = 8081\nsomaxconn = 4\n',
    "server": "host_port = 9001\nremote_port = 8001\n",
}
PATIENCE_S = 90.0 if LONG else 30.0
MEMORY_BYTES = 96 << 20


class Life:
    """A pair with a second tunnel for short connections, and the verbs of an operator."""

    def __init__(self, lab: Lab, pair: Pair) -> None:
        self.lab, self.pair = lab, pair
        for end in ENDS:
            self.add(end, "short", SHORT[end].format(address=lab.server_ip4))
        self.texts = {end: pair.config(end).read_text() for end in ENDS}
        pair.start("server")
        pair.start("client")
        pair.wait_carriers(int(pair.somaxconn))

    def add(self, end: str, name: str, keys: str) -> None:
        with self.pair.config(end).open("a") as file:
            file.write(f'[[tunnel]]\nname = "{name}"\nmode = "stripe"\n{keys}')

    def rewrite(self, end: str, number: int) -> None:
        """The file of before, and a third tunnel that comes, changes and goes."""
        self.pair.config(end).write_text(self.texts[end])
        if number % 3 < 2:
            port = 9002 + number % 3
            more = {
                "client": f'host = "{self.lab.server_ip4}"\nhost_port = {port}\nlocal_port = 8082\nsomaxconn = 2\n',
                "server": f"host_port = {port}\nremote_port = 8001\n",
            }
            self.add(end, "third", more[end])

    def reload(self, end: str) -> dict[str, Any]:
        return request(self.pair.folder / f"{end}.sock", {"command": "reload"}, PATIENCE_S)

    def slots(self, end: str) -> set[int]:
        return {worker["serial"] for worker in self.pair.status(end)["workers"] if worker["state"] == "up"}

    def signalled(self, end: str, signum: signal.Signals, patience_s: float = PATIENCE_S) -> None:
        """Until another generation serves."""
        before = self.slots(end)
        self.pair.processes[end].send_signal(signum)
        self.pair.wait(
            lambda: (now := self.slots(end)) and not now & before, f"another generation at the {end}", patience_s
        )

    def wait_alone(self, end: str, workers: int, patience_s: float = PATIENCE_S) -> None:
        """Until earlier generations have ended."""
        self.pair.wait(
            lambda: [worker["state"] for worker in self.pair.status(end)["workers"]] == ["up"] * workers,
            f"{workers} workers alone at the {end}",
            patience_s,
        )

    @contextmanager
    def storm(self) -> Iterator[dict[str, int]]:
        """Short connections until the block ends; what became of them is known afterwards."""
        local, _, target = SHORT_PORTS
        options: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.PIPE}
        counts = {"opened": 0, "whole": 0}
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                command = [*CHURN, "ask", str(local), str(PER_SECOND), str(ROUND_S)]
                answer, _ = self.lab.popen("client", command, **options).communicate(timeout=ROUND_S + 60)
                for name, value in json.loads(answer).items():
                    counts[name] += value

        service = self.lab.popen("server", [*CHURN, "serve", str(target)], **options)
        try:
            with ThreadPoolExecutor(1) as pool:
                time.sleep(0.5)
                asking = pool.submit(ask)
                try:
                    yield counts
                finally:
                    done.set()
                asking.result()
        finally:
            service.kill()
            service.communicate()


@pytest.fixture
def life() -> Iterator[Life]:
    with Lab(emulate=False) as lab, Pair(lab, workers=(2, 2), somaxconn=8, start=False) as pair:
        yield Life(lab, pair)


@pytest.mark.deadline(1500 if LONG else 240)
def test_reloads_and_upgrades_during_transfers_and_a_storm_lose_nothing(life: Life) -> None:
    pair = life.pair
    with life.storm():
        time.sleep(0.5)
    before, memory = settled_levels(pair), resident(pair)
    seconds = TOTAL_BYTES * 8 / RATE_BPS
    began = time.monotonic()
    with Traffic(pair) as traffic, life.storm() as counts:
        (exchange,) = traffic.open(1, TOTAL_BYTES, RATE_BPS)
        for number in range(RELOADS):
            for end in ENDS:
                life.rewrite(end, number)
                answer = life.reload(end)
                assert answer.get("changes"), f"{end} {number}: {answer}{pair.logs()}"
            if number % (RELOADS // UPGRADES) == RELOADS // UPGRADES - 1:
                for end in ENDS:
                    life.signalled(end, signal.SIGUSR2)
            pause_s = began + seconds * 0.8 * (number + 1) / RELOADS - time.monotonic()
            time.sleep(max(0.0, pause_s))
        traffic.wait([exchange], seconds + 60)
        assert exchange.outcome == WHOLE
    print(f"\n{counts} in {time.monotonic() - began:.1f} s")
    assert counts["opened"] == counts["whole"] > 0, f"{counts}{pair.logs()}"
    for end in ENDS:
        life.wait_alone(end, 2)
        assert " ERROR " not in pair.log(end) and " CRITICAL " not in pair.log(end), pair.log(end)
    pair.wait_carriers(8)
    compare(pair, before)
    growth = {end: now - memory[end] for end, now in resident(pair).items()}
    print(f"growth of memory {growth}")
    assert max(growth.values()) < MEMORY_BYTES


def resident(pair: Pair) -> dict[str, int]:
    """Bytes that each end's processes have in memory."""
    return {end: sum(map(memory_bytes, family([pair.processes[end].pid]))) for end in ENDS}


def compare(pair: Pair, before: dict[str, Any]) -> None:
    """What has to be as before; slots are others."""
    after = settled_levels(pair)
    for end in ENDS:
        assert after[f"{end} children"] == before[f"{end} children"]
        assert abs(after[f"{end} descriptors"] - before[f"{end} descriptors"]) <= 2, (before, after)


def test_keys_count_at_once(life: Life) -> None:
    pair = life.pair
    text = pair.config("server").read_text()
    other = text.replace('key_id = "laptop"\n', 'key_id = "tablet"\n')
    pair.config("server").write_text(other)
    assert life.reload("server") == {"changes": ["key 'laptop': removed", "key 'tablet': added"]}
    assert pair.stop("client") == 0
    pair.start("client")
    time.sleep(1.0)
    assert pair.carriers_up() == 0
    pair.config("server").write_text(text)
    assert life.reload("server") == {"changes": ["key 'tablet': removed", "key 'laptop': added"]}
    pair.wait_carriers(8)
    with Traffic(pair) as traffic:
        exchange = traffic.open_again(1 << 20, PATIENCE_S)
        traffic.wait([exchange], PATIENCE_S)
        assert exchange.outcome == WHOLE


def test_more_workers_and_fewer_during_a_transfer(life: Life) -> None:
    pair = life.pair
    with Traffic(pair) as traffic:
        exchanges = traffic.open(3, 4 << 20, 16e6)
        for end, signum in (("client", signal.SIGTTIN), ("server", signal.SIGTTIN), ("client", signal.SIGTTOU)):
            life.signalled(end, signum)
        traffic.wait(exchanges, PATIENCE_S)
        assert [exchange.outcome for exchange in exchanges] == [WHOLE] * 3
    life.wait_alone("client", 2)
    life.wait_alone("server", 3)
    pair.wait_carriers(8)
    assert pair.stop("client") == pair.stop("server") == 0
