"""What memory, descriptors and slots come to, however many connections there are and whatever they do.

FORWARDER_TEST_CHURN_S: how long connections come and go while stripes die (default 12; 600 makes 60,000 of them).
"""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bench.measure import family, memory_bytes
from tests.netlab import Lab, Link
from tests.system.pair import ENDS, Pair

IDLE = 5000
IDLE_BYTES = 32 << 10
"""Of one end, all processes, for each idle connection."""
DESCRIPTORS = 4 * IDLE
WORKER_BYTES = 200 << 20
CHURN_S = float(os.environ.get("FORWARDER_TEST_CHURN_S", "12"))
CHURN_PER_S = 120
CHURN = [sys.executable, "-m", "tests.system.churn"]
ROOT = Path(__file__).parents[2]
WARM_UP_S = min(max(CHURN_S / 5, 4.0), 70.0)
"""In the long form for more than a minute: for so long closed streams are remembered."""
LEVEL_BYTES = 8 << 20
"""How much a process may grow by while nothing that it holds does: allocators keep some."""
pytestmark = [pytest.mark.alone, pytest.mark.deadline(120 + 2 * CHURN_S)]


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """For this process and those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < DESCRIPTORS:
        pytest.skip(f"no more than {hard} descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def lab() -> Iterator[Lab]:
    with many_descriptors(), Lab(emulate=False) as made:
        yield made


def end_bytes(pair: Pair, end: str) -> int:
    """Proportional set sizes of all its processes."""
    return sum(map(memory_bytes, family([pair.processes[end].pid])))


def connect_again(pair: Pair) -> socket.socket:
    """The first that is not refused: workers do not share connections evenly, and each has room for some thousands."""
    while True:
        try:
            return pair.connect()
        except ConnectionResetError:
            continue


@pytest.mark.parametrize("workers", [1, 2])
def test_idle_connections_are_cheap(lab: Lab, workers: int) -> None:
    """Each has carried something."""
    with Pair(lab, workers=(workers, workers)) as pair, contextlib.ExitStack() as stack:
        listener = stack.enter_context(pair.listen(IDLE))
        applications = []
        targets = []
        for _ in range(IDLE // 50):
            applications += [stack.enter_context(connect_again(pair)) for _ in range(50)]
            targets += [stack.enter_context(listener.accept()[0]) for _ in range(50)]
        for application in applications:
            application.sendall(bytes(500))
        for target in targets:
            target.settimeout(20)
            assert target.recv(1000)
            target.sendall(bytes(500))
        for application in applications:
            assert application.recv(1000)
        time.sleep(1)
        assert [pair.flows_open(end) for end in ENDS] == [IDLE] * 2
        each = {end: end_bytes(pair, end) / IDLE for end in ENDS}
        print({end: f"{size / 1024:.1f} KiB" for end, size in each.items()})
        assert max(each.values()) <= IDLE_BYTES


class Mover:
    """One connection that is sent to as fast as it takes, and read by `read`."""

    def __init__(self, pair: Pair, listener: socket.socket, read: Callable[[socket.socket], int]) -> None:
        self.sent = self.received = 0
        self._stopping = False
        self._application = pair.connect(timeout=0.2)
        self._target = listener.accept()[0]
        self._target.settimeout(0.2)
        self._read = read
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        data = bytes(1 << 20)
        while not self._stopping:
            with contextlib.suppress(TimeoutError):
                self.sent += self._application.send(data)

    def _receive(self) -> None:
        while not self._stopping:
            with contextlib.suppress(TimeoutError):
                self.received += self._read(self._target)

    def close(self) -> None:
        self._stopping = True
        for thread in self._threads:
            thread.join()
        self._application.close()
        self._target.close()


def read_all(sock: socket.socket) -> int:
    return len(sock.recv(1 << 20))


def read_a_kilobyte_a_second(sock: socket.socket) -> int:
    time.sleep(0.1)
    return len(sock.recv(100))


def rate(mover: Mover, seconds: float) -> float:
    """Bytes a second from now on."""
    before, began_s = mover.received, time.monotonic()
    time.sleep(seconds)
    return (mover.received - before) / (time.monotonic() - began_s)


def test_slow_reader_costs_little_and_slows_nobody(lab: Lab) -> None:
    with Pair(lab, workers=(2, 2), somaxconn=1000) as pair, pair.listen() as listener:
        other = Mover(pair, listener, read_all)
        alone = rate(other, 2)
        slow = Mover(pair, listener, read_a_kilobyte_a_second)
        most, beside = 0, []
        for _ in range(4):
            beside.append(rate(other, 1))
            most = max(most, *(memory_bytes(pid) for end in ENDS for pid in pair.worker_pids(end)))
        print(f"{most >> 20} MiB a worker; {alone / 1e6:.0f} -> {max(beside) / 1e6:.0f} MB/s; slow: {slow.sent} sent")
        for mover in (slow, other):
            mover.close()
        assert most <= WORKER_BYTES
        assert max(beside) >= 0.7 * alone
        assert slow.sent < 32 << 20


def test_fast_reader_that_becomes_slow_holds_a_window_at_most() -> None:
    """Over a long way, where windows are large."""
    became_slow = threading.Event()

    def read(sock: socket.socket) -> int:
        return read_a_kilobyte_a_second(sock) if became_slow.is_set() else read_all(sock)

    with Lab(Link(delay_ms=50, rate_bps=300e6)) as lab, Pair(lab, somaxconn=10) as pair, pair.listen() as listener:
        mover = Mover(pair, listener, read)
        fast = rate(mover, 4)
        became_slow.set()
        time.sleep(2)
        most = max(memory_bytes(pid) for end in ENDS for pid in pair.worker_pids(end))
        print(f"{fast / 1e6:.0f} MB/s; {most >> 20} MiB a worker")
        mover.close()
        assert most <= WORKER_BYTES


Counts = dict[str, list[dict[str, int]]]


def level(pair: Pair) -> Counts:
    names = ("descriptors", "watchers", "greenlets", "slots", "slots_lent", "credit_reserved_bytes", "endpoints")
    return {end: [{name: counts[name] for name in names} for counts in pair.open_counts(end)] for end in ENDS}


def resident(pair: Pair) -> dict[int, int]:
    return {pid: memory_bytes(pid) for end in ENDS for pid in pair.worker_pids(end)}


def churn(pair: Pair, seconds: float) -> int:
    """Connections that carry a little each way, CHURN_PER_S of them a second, while a stripe dies every half second."""
    words = ["ask", str(pair.local_port), str(CHURN_PER_S), str(seconds)]
    process = pair.lab.popen("client", [*CHURN, *words], stdout=subprocess.PIPE, cwd=ROOT)
    resets = 0
    while process.poll() is None:
        stripes = [each for each in pair.lab.connections() if each.server[1] == pair.host_port]
        pair.lab.reset(stripes[resets % len(stripes)])
        resets += 1
        time.sleep(0.5)
    assert process.stdout is not None
    counts: dict[str, int] = json.loads(process.stdout.read())
    process.stdout.close()
    assert counts["whole"] == counts["opened"] and resets >= seconds, f"{counts}{pair.logs()}"
    return counts["opened"]


def test_connections_come_and_go_while_stripes_die() -> None:
    with Lab(Link(delay_ms=1)) as lab, Pair(lab, workers=(2, 2)) as pair:
        service = lab.popen("server", [*CHURN, "serve", str(pair.target_port)], cwd=ROOT)
        time.sleep(0.5)
        churn(pair, WARM_UP_S)
        before = settled(pair)
        memory = resident(pair)
        opened = churn(pair, CHURN_S)
        pair.wait(lambda: settled(pair) == before, f"level of {before}, not {level(pair)}", 20)
        growth = {pid: now - memory[pid] for pid, now in resident(pair).items()}
        print(f"{opened} connections; growth {growth}")
        assert max(growth.values()) < LEVEL_BYTES
        service.kill()
        service.wait()


def settled(pair: Pair) -> Counts:
    """The level with all stripes and no flow."""
    pair.wait_carriers(pair.somaxconn)
    pair.wait(lambda: not any(pair.flows_open(end) for end in ENDS), "end of flows")
    time.sleep(0.2)  # for a moment after handshakes a server may accept none
    return level(pair)
