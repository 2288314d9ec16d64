"""What paths and hosts do to a spray tunnel: ports that are blocked, reset or lossy, and processes that are killed."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from tests.netlab import Connection, Lab, Link, LiveConnection, rerun_if_void
from tests.system.fake_tcp_ends import packet_port
from tests.system.pair import ENDS
from tests.system.processes import is_alive, kill_worker, workers
from tests.system.segments import ACK, EVERYTHING, RST, Segment, read, send
from tests.system.spray_pair import SprayPair, answering, ask
from tests.system.spray_traffic import Echoes

pytestmark = pytest.mark.alone

KINDS = os.environ.get("FORWARDER_TEST_SPRAY_KINDS", "all").split(",")
HEAL_S = 3.0
LOST = 0.005
"""What may be lost once a tunnel has found its way around a fault."""
SHARES = 0.10
BLOCKED, RESET, LOSSY = 7001, 7002, 7003
LOSSY_LOSS = 0.3
REPLACED_S = 10.0
"""From a worker's end until all ports are up again."""
GONE_S = 3.0
TABLES = ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet")
RULES = ("iptables-save", "ip6tables-save", "nft list ruleset", "tc qdisc show", "tc filter show dev eth0", "ip rule")

pytestmark = pytest.mark.usefixtures("backend")


# Ports


@contextmanager
def broken(lab: Lab) -> Iterator[None]:
    """Block one port without a word, reset another every second, and make a third lossy, whoever dials them anew."""
    over = threading.Event()
    limited: set[int] = set()

    def on(port: int) -> list[LiveConnection]:
        return [each for each in lab.connections() if each.server[1] == port]

    def work() -> None:
        reset_s = 0.0
        while not over.wait(0.01):
            lab.blackhole(port=BLOCKED)
            for each in on(LOSSY):
                if each.index not in limited:
                    limited.add(each.index)
                    lab.limit(each, Connection(loss=LOSSY_LOSS))
            if time.monotonic() > reset_s:
                reset_s = time.monotonic() + 1
                lab.reset(port=RESET)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def bytes_out(pair: SprayPair, end: str) -> dict[tuple[str, int], int]:
    """By kind and the server's port, of those that nothing is done to."""
    side = "peer" if end == "client" else "local"
    (session,) = pair.tunnel(end)["sessions"]
    ports = {(each["kind"], int(each[side].rpartition(":")[2])): each["bytes_out"] for each in session["carriers"]}
    return {place: sent for place, sent in ports.items() if place[1] not in (BLOCKED, RESET, LOSSY)}


@pytest.mark.parametrize("kind", KINDS)
@rerun_if_void()
def test_blocked_reset_and_lossy_ports_cost_little_and_the_others_share_evenly(kind: str) -> None:
    link = Link(delay_ms=10)
    with Lab(link) as lab, SprayPair(lab, kind=kind, ports=10) as pair:
        with Echoes(pair, per_second=2000) as echoes:
            time.sleep(1)
            with broken(lab):
                struck_s = time.monotonic()
                time.sleep(HEAL_S)
                before = {end: bytes_out(pair, end) for end in ENDS}
                time.sleep(3)
                after = {end: bytes_out(pair, end) for end in ENDS}
        lab.check(p99_ms=50)
        lost = echoes.lost(struck_s + HEAL_S)
        print(lost)
        assert max(lost.there, lost.back) <= LOST, f"{lost}{pair.logs()}"
        assert echoes.wrong == echoes.repeated == 0
        for end in ENDS:
            sent = [after[end][place] - before[end][place] for place in before[end]]
            mean = sum(sent) / len(sent)
            print(f"{end}: shares from {min(sent) / mean:.3f} to {max(sent) / mean:.3f}")
            assert len(sent) == pair.carriers * 7 // 10
            assert max(abs(each - mean) for each in sent) <= SHARES * mean, f"{end}: {sent}{pair.logs()}"


class Last:
    """The newest frame of each connection and direction on the wire, as a thread of its own sees them."""

    def __init__(self, lab: Lab) -> None:
        self.frames: dict[tuple[int, int], Segment] = {}
        self._lab = lab
        self._over = threading.Event()

    def __enter__(self) -> "Last":
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        return self

    def _work(self) -> None:
        with packet_port(self._lab, "client", program=EVERYTHING) as observer:
            while not self._over.is_set():
                segment = read(observer, 0.05)
                if segment is not None and not segment.flags & RST:
                    self.frames[segment.source_port, segment.target_port] = segment

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()


def test_forged_resets_end_no_port(lab: Lab) -> None:
    """Each with the very number that is expected, to both ends of every port."""
    with SprayPair(lab, ports=4) as pair, Last(lab) as last:
        with (
            Echoes(pair, per_second=1000) as echoes,
            packet_port(lab, "client", program=EVERYTHING) as upwards,
            packet_port(lab, "server", program=EVERYTHING) as downwards,
        ):
            time.sleep(0.5)
            before = local_ends(pair)
            struck_s = time.monotonic()
            for _ in range(10):
                time.sleep(0.2)
                for (source, _), frame in list(last.frames.items()):
                    port = downwards if source in pair.ports else upwards
                    send(port, frame, frame.sequence + len(frame.payload), b"", flags=RST | ACK)
        lost = echoes.lost(struck_s)
        assert max(lost.there, lost.back) <= LOST, f"{lost}{pair.logs()}"
        assert local_ends(pair) == before, pair.logs()


def local_ends(pair: SprayPair) -> list[str]:
    """The client's own address of each port: another one each time that it is dialled."""
    return sorted(each["local"] for session in pair.tunnel("client")["sessions"] for each in session["carriers"])


# Processes


def test_killed_worker_is_replaced_while_the_other_carries_on(lab: Lab) -> None:
    """First one of the server, then one of the client."""
    with SprayPair(lab, kind="all", ports=4, workers=(2, 2)) as pair:
        struck_s, replaced_s = {}, {}
        with Echoes(pair, per_second=2000, applications=16) as echoes:
            for end in ("server", "client"):
                time.sleep(0.5)
                before = workers(pair, end)
                struck_s[end] = kill_worker(pair, end, 0)
                pair.wait(partial(is_replaced, pair, end, before[0]["pid"]), "a replacement", REPLACED_S)
                pair.wait_carriers(pair.carriers, REPLACED_S)
                replaced_s[end] = time.monotonic() - struck_s[end]
                time.sleep(max(HEAL_S - replaced_s[end], 0) + 1)
                after = workers(pair, end)
                assert [worker["restarts"] for worker in after] == [1, 0]
                assert after[1]["pid"] == before[1]["pid"]
        for end, at_s in struck_s.items():
            meanwhile, lost = echoes.lost(at_s, at_s + HEAL_S), echoes.lost(at_s + HEAL_S, at_s + HEAL_S + 1)
            figures = f"{end}: replaced in {replaced_s[end]:.2f} s, {meanwhile}, then {lost}"
            print(figures)
            assert replaced_s[end] < REPLACED_S
            assert max(lost.there, lost.back) <= LOST, f"{figures}{pair.logs()}"
            whole = [echoes.lost(at_s, at_s + HEAL_S, number).there == 0 for number in range(16)]
            assert any(whole), f"{figures}: the other worker's conversations lost some, too"


def is_replaced(pair: SprayPair, end: str, pid: int) -> bool:
    worker = workers(pair, end)[0]
    return bool(worker["pid"] != pid and worker["state"] == "up")


def traces(lab: Lab) -> dict[str, Any]:
    """What a program can leave behind on a host."""
    found: dict[str, Any] = {"shared memory": [name for name in os.listdir("/dev/shm") if "forwarder" in name]}
    for end in ENDS:
        for table in TABLES:
            done = lab.run(end, ["cat", f"/proc/net/{table}"])
            found[f"{end} {table}"] = done.stdout.splitlines()[1:]
        for command in filter(lambda command: shutil.which(command.split()[0]), RULES):
            done = lab.run(end, command.split(), check=False)
            found[f"{end} {command}"] = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return found


def test_killed_instances_leave_nothing_behind_and_come_back() -> None:
    with Lab(emulate=False) as own, SprayPair(own, kind="all", ports=4, workers=(2, 2), start=False) as pair:
        before = traces(own)
        for end in ("server", "client"):
            pair.start(end)
        pair.wait_carriers(pair.carriers)
        with Echoes(pair, per_second=1000, applications=8):
            time.sleep(0.5)
            supervisors = [pair.processes[end].pid for end in ENDS]
            pids = [*supervisors, *(pid for end in ENDS for pid in pair.worker_pids(end))]
            # The server's workers have to notice by themselves.
            for pid in (*pair.worker_pids("client"), *supervisors):
                os.kill(pid, signal.SIGKILL)
            killed_s = time.monotonic()
        for end in ENDS:
            pair.processes.pop(end).wait()
        while (now := traces(own)) != before or any(map(is_alive, pids)):
            assert time.monotonic() < killed_s + GONE_S, f"left behind: {differences(before, now)}"
            time.sleep(0.1)
        print(f"nothing left after {time.monotonic() - killed_s:.2f} s")
        for end in ("server", "client"):
            pair.start(end)
        pair.wait_carriers(pair.carriers)
        with pair.target() as target, answering(target), pair.application() as application:
            ask(application, b"back again")


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {name: now[name] for name in now if now[name] != before[name]}
