"""What a host brings: no descriptors, no memory, no room for the log, a clock that jumps. Less is done, nothing breaks.

Each test breaks something, looks at who is served and who is refused meanwhile, mends it, and finds everything level.
"""

import base64
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.netlab import Lab
from tests.system.pair import ENDS, Pair
from tests.system.processes import all_up, is_alive, kill_worker, settled_levels, wait_level, wait_serving, workers
from tests.system.traffic import RESET, WHOLE, Exchange, Traffic

MIB = 1 << 20
BACK_S = 5.0
STALLED = 8
"""Streams that nobody reads; twice as many, and new ones would be refused."""
DAY_S = 86_400
LOG_LINES_MAX = 4
"""A shortage is told once in ten seconds by each worker."""


def start(pair: Pair, *module: str, ends: tuple[str, ...] = ENDS) -> None:
    """Both ends, of which `ends` are that program."""
    for end in ("server", "client"):
        if end in ends and module:
            pair.modules[end] = list(module)
        pair.start(end)
    pair.wait_carriers(int(pair.somaxconn))


def levels_after_use(pair: Pair, traffic: Traffic) -> dict[str, Any]:
    """What is open when nothing is going on any more."""
    traffic.wait(traffic.open(8, MIB), 20)
    return settled_levels(pair)


def storm(pair: Pair, listener: socket.socket, count: int) -> tuple[list[socket.socket], int]:
    """So many applications at once, which say a few bytes and wait. Open sockets, and how many were refused: each is,
    unless it reaches the target."""
    applications = []
    for _ in range(count):
        with contextlib.suppress(ConnectionError):
            application = pair.connect()
            application.sendall(b"hello")
            applications.append(application)
    deadline = time.monotonic() + 10
    listener.setblocking(False)
    served: list[socket.socket] = []
    refused = count - len(applications)
    waiting = applications
    while len(served) < len(waiting):
        assert time.monotonic() < deadline, f"{len(waiting)} wait, {len(served)} are served, {refused} are refused"
        with contextlib.suppress(BlockingIOError):
            while True:
                served.append(listener.accept()[0])
        waiting = [each for each in waiting if not was_reset(each)]
        refused = count - len(waiting)
        time.sleep(0.02)
    listener.settimeout(20)
    return applications + served, refused


def was_reset(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        assert sock.recv(1) == b"no end of stream was expected"
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    return False


def close_all(socks: list[socket.socket]) -> None:
    for sock in socks:
        with sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def finish(traffic: Traffic, exchanges: list[Exchange]) -> None:
    for exchange in exchanges:
        exchange.speed_up(1e12)
    traffic.wait(exchanges, 30)
    assert [exchange.outcome for exchange in exchanges] == [WHOLE] * len(exchanges), f"{exchanges}{traffic.pair.logs()}"


def warnings(pair: Pair, end: str, sentence: str) -> int:
    return sum("WARNING" in line and sentence in line for line in pair.log(end).splitlines())


def check_warned(pair: Pair, end: str, sentence: str) -> None:
    """It is said, within a moment, and not over and over."""
    pair.wait(lambda: warnings(pair, end, sentence), f"warning of {sentence!r}")
    assert warnings(pair, end, sentence) <= LOG_LINES_MAX, pair.logs()


# Descriptors


@pytest.mark.parametrize("end", ENDS)
def test_instance_at_its_descriptor_limit_refuses_what_is_new_and_serves_what_is_there(lab: Lab, end: str) -> None:
    with Pair(lab, workers=(2, 2), start=False) as pair, Traffic(pair) as traffic:
        start(pair, "tests.system.faulty", "descriptors:96", ends=(end,))
        assert warnings(pair, end, "the limit of open files is low") == 1
        before = levels_after_use(pair, traffic)
        total = pair.tunnel(end)["flows_reset"]
        exchanges = traffic.open(4, 64 * MIB, rate_bps=8e6)
        traffic.wait_received(exchanges, 64 << 10)
        opened, refused = storm(pair, traffic.listener, 100)
        assert refused > 20, f"{refused} refused of 100"
        assert pair.tunnel(end)["flows_reset"] - total > 20
        assert [worker["restarts"] for worker in workers(pair, end)] == [0, 0], pair.logs()
        check_warned(pair, end, "few descriptors are left")
        progress = [exchange.received for exchange in exchanges]
        time.sleep(0.5)
        assert all(now.received > then for now, then in zip(exchanges, progress, strict=True)), pair.logs()
        close_all(opened)
        finish(traffic, [*exchanges, *(traffic.open_again(MIB, BACK_S) for _ in range(8))])
        wait_level(pair, before)
        assert pair.carriers_up() == 10


def is_replaced(pair: Pair, end: str) -> bool:
    return [worker["restarts"] for worker in workers(pair, end)] == [1, 0] and all_up(pair, end)


def test_worker_that_dies_while_descriptors_are_short_is_replaced(lab: Lab) -> None:
    with Pair(lab, workers=(2, 2), start=False) as pair, Traffic(pair) as traffic:
        start(pair, "tests.system.faulty", "descriptors:96")
        before = levels_after_use(pair, traffic)
        opened, _ = storm(pair, traffic.listener, 100)
        for end in ENDS:
            kill_worker(pair, end, 0)
        for end in ENDS:
            pair.wait(partial(is_replaced, pair, end), f"a new worker at the {end}", BACK_S)
        close_all(opened)
        wait_serving(pair)
        finish(traffic, [traffic.open_again(MIB, BACK_S) for _ in range(8)])
        wait_level(pair, before)


@pytest.mark.parametrize("end", ENDS)
def test_stripes_leave_descriptors_for_streams_and_for_a_new_worker(lab: Lab, end: str) -> None:
    """Far more stripes are configured than there are descriptors."""
    with Pair(lab, workers=(2, 2), somaxconn=200, start=False) as pair, Traffic(pair) as traffic:
        pair.modules[end] = ["tests.system.faulty", "descriptors:96"]
        pair.start("server")
        pair.start("client")
        pair.wait_carriers(20)
        exchanges = traffic.open(8, 8 * MIB, rate_bps=8e6)
        traffic.wait_received(exchanges, 64 << 10)
        doomed = workers(pair, end)[0]["streams"]
        kill_worker(pair, end, 0)
        pair.wait(lambda: all_up(pair, end), "a new worker", BACK_S)
        for exchange in exchanges:
            exchange.speed_up(1e12)
        traffic.wait(exchanges, 30)
        outcomes = [exchange.outcome for exchange in exchanges]
        assert outcomes.count(RESET) == doomed and outcomes.count(WHOLE) == 8 - doomed, exchanges
        assert [worker["restarts"] for worker in workers(pair, end)] == [1, 0], pair.logs()
        finish(traffic, [traffic.open_again(MIB, BACK_S) for _ in range(8)])
        assert 10 <= pair.carriers_up() < 100
        assert pair.tunnel("client")["state"] == "degraded"
        check_warned(pair, end, "few descriptors")


# Memory


@pytest.mark.parametrize("end", ENDS)
def test_streams_beyond_the_arena_are_refused_and_those_within_are_whole(lab: Lab, end: str) -> None:
    with Pair(lab, workers=(2, 2), start=False) as pair, Traffic(pair) as traffic:
        start(pair, "tests.system.faulty", "arena:8192,2048", ends=(end,))
        before = levels_after_use(pair, traffic)
        total = pair.tunnel(end)["flows_reset"]
        exchanges = traffic.open(4, 64 * MIB, rate_bps=8e6)
        opened, refused = storm(pair, traffic.listener, 90)
        assert refused > 20, f"{refused} refused of 90"
        assert pair.tunnel(end)["flows_reset"] - total > 20
        check_warned(pair, end, "no room for more streams")
        for worker in workers(pair, end):
            assert worker["arena_used_bytes"] <= 10 * MIB and worker["restarts"] == 0
        close_all(opened)
        finish(traffic, [*exchanges, *(traffic.open_again(MIB, BACK_S) for _ in range(8))])
        wait_level(pair, before)


@pytest.mark.parametrize("end", ENDS)
def test_readers_that_stall_fill_the_arena_and_others_go_on(lab: Lab, end: str) -> None:
    """Data waits for every one of them in all of its window; what is left moves the other streams."""
    with Pair(lab, workers=(2, 2), start=False) as pair, Traffic(pair) as traffic:
        start(pair, "tests.system.faulty", "arena:16384,2048")
        before = levels_after_use(pair, traffic)
        with contextlib.ExitStack() as stack:
            for _ in range(STALLED):
                application = stack.enter_context(pair.connect())
                application.sendall(b"?")
                target = stack.enter_context(traffic.listener.accept()[0])
                writer = application if end == "server" else target
                writer.setblocking(False)
                stack.callback(close_all, [writer])
                stuff(writer)
            time.sleep(0.5)
            finish(traffic, traffic.open(4, 4 * MIB))
            assert [worker["restarts"] for each in ENDS for worker in workers(pair, each)] == [0] * 4, pair.logs()
        finish(traffic, [traffic.open_again(MIB, BACK_S) for _ in range(8)])
        wait_level(pair, before)


def stuff(sock: socket.socket) -> None:
    """Send until nothing more is taken for a moment."""
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        try:
            sock.send(bytes(256 << 10))
            deadline = time.monotonic() + 0.1
        except BlockingIOError:
            time.sleep(0.01)


def test_streams_past_max_streams_are_refused_and_told_of(lab: Lab) -> None:
    with Pair(lab, workers=(2, 2), server_tunnel="max_streams = 20") as pair, Traffic(pair) as traffic:
        before = levels_after_use(pair, traffic)
        exchanges = traffic.open(4, 64 * MIB, rate_bps=8e6)
        opened, refused = storm(pair, traffic.listener, 100)
        assert 100 - 2 * 20 <= refused <= 100 - 20
        assert pair.tunnel("client")["flows_reset"] >= refused
        assert pair.tunnel("server")["flows_reset"] >= refused
        check_warned(pair, "server", "no room for more streams")
        close_all(opened)
        finish(traffic, [*exchanges, *(traffic.open_again(MIB, BACK_S) for _ in range(8))])
        wait_level(pair, before)


# The log


@pytest.mark.parametrize("where", ["file", "standard error"])
def test_log_that_cannot_be_written_stops_nothing(lab: Lab, where: str) -> None:
    settings = '[log]\nlevel = "debug"\n' + ('file = "/dev/full"\n' if where == "file" else "")
    tables: dict[str, Any] = {"client": settings, "server": settings}
    with Pair(lab, workers=(2, 2), start=False, **tables) as pair, Traffic(pair) as traffic:
        for end in ("server", "client"):
            pair.start(end, output="/dev/full")
        pair.wait_carriers(10)
        before = levels_after_use(pair, traffic)
        exchanges = traffic.open(8, 8 * MIB, rate_bps=8e6)
        traffic.wait_received(exchanges, 64 << 10)
        doomed = {end: workers(pair, end)[0]["streams"] for end in ENDS}
        kill_worker(pair, "server", 0)
        wait_serving(pair)
        for exchange in exchanges:
            exchange.speed_up(1e12)
        traffic.wait(exchanges, 30)
        outcomes = [exchange.outcome for exchange in exchanges]
        assert outcomes.count(RESET) == doomed["server"] and outcomes.count(WHOLE) == 8 - doomed["server"], exchanges
        finish(traffic, [traffic.open_again(MIB, BACK_S) for _ in range(4)])
        wait_level(pair, before)
        assert [pair.stop(end) for end in ENDS] == [0, 0]


@pytest.mark.parametrize(("name", "code"), [("nosuch", 78), ("invalid", 78), ("valid", 69)])
def test_exit_code_is_told_even_if_the_reason_cannot_be(tmp_path: Path, name: str, code: int) -> None:
    """The valid one is refused for its pid file."""
    (tmp_path / "invalid").write_text('role = "client"\n')
    (tmp_path / "valid").write_text(
        f'role = "client"\n[auth]\nkey_id = "laptop"\nkey = "{base64.b64encode(bytes(32)).decode()}"\n'
        f'[control]\nsocket = "{tmp_path}/sock"\n'
        '[[tunnel]]\nname = "web"\nmode = "stripe"\nhost = "::1"\nhost_port = 1\nlocal_port = 1\n'
    )
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "forwarder", "start", "-c", str(tmp_path / name)]
        command += ["--pid-file", "/nosuch/pid"]
        assert subprocess.run(command, check=False, stderr=full, cwd=Path(__file__).parents[2]).returncode == code


# The clock


class Clock:
    """What the processes of a pair take for the time of day; never the real clock."""

    def __init__(self, file: Path) -> None:
        library = next(iter(Path("/usr/lib").glob("**/faketime/libfaketime.so.1")), None)
        if library is None:
            pytest.skip("there is no libfaketime")
        self._file = file
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        self.set(0)

    def set(self, offset_s: int) -> None:
        """So far from the real time, from now on."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{offset_s:+d}\n")
        fresh.rename(self._file)


@contextlib.contextmanager
def shared_memory_of_the_clock() -> Iterator[None]:
    """What libfaketime leaves of a process that is killed goes with the test."""
    before = set(Path("/dev/shm").glob("*faketime_s*"))
    try:
        yield
    finally:
        for left in set(Path("/dev/shm").glob("*faketime_s*")) - before:
            left.unlink(missing_ok=True)


def test_clock_that_jumps_a_day_stops_nothing(lab: Lab, tmp_path: Path) -> None:
    """Streams move, lost stripes and workers that die or hang are replaced, after a jump forth and one back."""
    clock = Clock(tmp_path / "clock")
    with shared_memory_of_the_clock(), Pair(lab, workers=(2, 2), start=False) as pair, Traffic(pair) as traffic:
        for end in ("server", "client"):
            pair.environment[end] = clock.environment
            pair.start(end)
        pair.wait_carriers(10)
        before = levels_after_use(pair, traffic)
        days = []
        for offset_s in (DAY_S, -DAY_S, 0):
            jump_in_an_outage(pair, traffic, clock, offset_s)
            days.append(pair.log("server").splitlines()[-1][:10])
            lose_a_worker(pair, signal.SIGSTOP if offset_s < 0 else signal.SIGKILL)
            exchanges = traffic.open(4, 4 * MIB, rate_bps=16e6)
            traffic.wait_received(exchanges, 64 << 10)
            clock.set(0 if offset_s else DAY_S)
            finish(traffic, exchanges)
            clock.set(offset_s)
        assert len(set(days)) == 3, f"the clock did not jump: {days}"
        assert [worker["restarts"] for worker in workers(pair, "server")] == [0, 0], pair.logs()
        assert [worker["restarts"] for worker in workers(pair, "client")] == [3, 0], pair.logs()
        wait_level(pair, before)


def jump_in_an_outage(pair: Pair, traffic: Traffic, clock: Clock, offset_s: int) -> None:
    """While the server is away, so that the client is in the middle of a pause; all stripes come back soon."""
    exchanges = traffic.open(4, 64 * MIB, rate_bps=8e6)
    traffic.wait_received(exchanges, 64 << 10)
    pair.stop("server", signal.SIGKILL)
    time.sleep(0.5)
    clock.set(offset_s)
    pair.start("server")
    pair.wait_carriers(int(pair.somaxconn), BACK_S)
    traffic.wait(exchanges, 10)
    assert [exchange.outcome for exchange in exchanges] == [RESET] * 4, exchanges


def lose_a_worker(pair: Pair, sig: signal.Signals) -> None:
    """The client's first one; another takes its place soon."""
    victim = pair.worker_pids("client")[0]
    os.kill(victim, sig)
    pair.wait(lambda: not is_alive(victim), "end of the worker", BACK_S)
    wait_serving(pair)
