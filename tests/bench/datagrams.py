"""Datagrams over a link that limits nothing: mode spray beside UDP itself and udp2raw, and under kcptun."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import ways
from tests.bench.datagram_ends import SIZE
from tests.bench.limited import workers_text
from tests.bench.measure import BenchError, Meter, Others, flow, programs_missing, wait_listening
from tests.bench.section import Section
from tests.bench.table import Column, Row, Table
from tests.bench.trips import trips
from tests.bench.ways import Between, Way
from tests.netlab import Lab, Link
from tests.system.kcptun import ENTRANCE, PROGRAMS, Kcptun
from tests.system.pair import ENDS
from tests.system.spray_pair import LOCAL, TARGET, SprayPair

PORTS, MANY_PORTS = 10, 1000
RUN = 44
KINDS = ("udp", "tcp")
WORKERS = (1, 2)
SECONDS = 4
ASK_S, LOADED_S = 1.5, 0.5
DIRECT, KCPTUN = "UDP itself", "kcptun over UDP"
LIMITED, LIMITED_TEXT = Link(delay_ms=25, rate_bps=200e6), "200 Mbit/s and 50 ms"
LIMITED_KCPTUN = f"{KCPTUN}, {LIMITED_TEXT}"
LIMITED_WINDOW = 4096
"""What fills that link: kcptun's own clock makes its round trip about twice as long."""
_UDP2RAW_PORT = 4096
_SETTLE_S = 0.5
_PATIENCE_S = 30.0
_ROOT = Path(__file__).parents[2]
_ENDS = (sys.executable, "-m", "tests.bench.datagram_ends")


@dataclass(frozen=True, slots=True)
class Contender:
    """`row` is its name for the command line, `base` that of the contender it is compared to. `stream`: TCP goes
    through, by kcptun. `run`: datagrams that the applications send and receive in one call. `is_limited`: over LIMITED.
    """

    row: str
    name: str
    way: Way
    base: str = DIRECT
    programs: tuple[str, ...] = ()
    stream: bool = False
    run: int = 1
    is_limited: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """`loss` is that of half the rate which UDP itself reached in the round; None: unknown."""

    bits_per_s: float
    loss: float | None
    p50_us: float
    cpu_s_per_gb: float
    others_cores: float


Round = dict[str, Result]
"""By the contender's name."""


def contenders() -> list[Contender]:
    """In the order of the table."""
    found = [Contender("datagrams-direct", DIRECT, direct)]
    found += [
        Contender(f"datagrams-{kind}-{workers}", f"{kind}, {workers_text(workers)}", spray(kind, workers))
        for kind in KINDS
        for workers in WORKERS
    ]
    for kind in KINDS:
        name = f"{kind}, {workers_text(1)}, {MANY_PORTS:,} ports"
        found.append(Contender(f"datagrams-{kind}-many", name, spray(kind, 1, MANY_PORTS)))
        name = f"{kind}, {workers_text(1)}, {RUN} datagrams a call"
        found.append(Contender(f"datagrams-{kind}-runs", name, spray(kind, 1), run=RUN))
    found.append(Contender("datagrams-udp2raw", "udp2raw", udp2raw, programs=("udp2raw", "iptables")))
    found.append(Contender("datagrams-kcptun", KCPTUN, kcptun(None, 0), KCPTUN, PROGRAMS, stream=True))
    found += [
        Contender(
            f"datagrams-kcptun-{kind}",
            f"kcptun over {kind}, {workers_text(1)}",
            kcptun(kind, 1),
            KCPTUN,
            PROGRAMS,
            True,
        )
        for kind in KINDS
    ]
    bare = kcptun(None, 0, LIMITED_WINDOW)
    found.append(
        Contender("datagrams-limited", LIMITED_KCPTUN, bare, LIMITED_KCPTUN, PROGRAMS, stream=True, is_limited=True)
    )
    for kind in KINDS:
        name = f"kcptun over {kind}, {workers_text(1)}, {LIMITED_TEXT}"
        way = kcptun(kind, 1, LIMITED_WINDOW)
        row = f"datagrams-limited-{kind}"
        found.append(Contender(row, name, way, LIMITED_KCPTUN, PROGRAMS, stream=True, is_limited=True))
    return found


# The ways


@contextlib.contextmanager
def direct(lab: Lab) -> Iterator[Between]:
    yield Between((lab.server_ip4, TARGET[1]), [])


def spray(kind: str, workers: int, ports: int = PORTS) -> Way:
    """Ports of that kind, and workers at each end."""

    @contextlib.contextmanager
    def way(lab: Lab) -> Iterator[Between]:
        try:
            quickly = f"dial_rate = {ports}"
            both = (workers, workers)
            with SprayPair(lab, kind=kind, ports=ports, workers=both, client_tunnel=quickly, start=False) as pair:
                for end in reversed(ENDS):
                    pair.start(end)
                pair.wait_carriers(pair.carriers, _PATIENCE_S)
                yield Between(LOCAL, [pair.processes[end].pid for end in ENDS], pair)
        except AssertionError as error:
            first, *rest = str(error).strip().splitlines() or ["no pair"]
            raise BenchError(f"{first} {rest[-1]}" if rest else first) from error

    return way


@contextlib.contextmanager
def udp2raw(lab: Lab) -> Iterator[Between]:
    """As it looks like TCP, with its own cipher."""
    both = ["--raw-mode", "faketcp", "-k", "a key", "-a"]
    far = ["udp2raw", "-s", "-l", f"0.0.0.0:{_UDP2RAW_PORT}", "-r", f"{TARGET[0]}:{TARGET[1]}", *both]
    near = ["udp2raw", "-c", "-l", f"{LOCAL[0]}:{LOCAL[1]}", "-r", f"{lab.server_ip4}:{_UDP2RAW_PORT}", *both]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [lab.popen(end, argv, **silent) for end, argv in (("server", far), ("client", near))]
    try:
        time.sleep(4 * _SETTLE_S)
        yield Between(LOCAL, [process.pid for process in started])
    finally:
        for process in started:
            process.terminate()
            process.wait()


def kcptun(kind: str | None, workers: int, window: int = 1024) -> Way:
    """Over UDP, or through ports of that kind. `window`: in packets."""

    @contextlib.contextmanager
    def way(lab: Lab) -> Iterator[Between]:
        under: AbstractContextManager[Between] = spray(kind, workers)(lab) if kind else direct(lab)
        with under as lower:
            target = TARGET if kind else lower.target
            with Kcptun(lab, lower.target, target, window=window) as relay:
                wait_listening(lab, "client", ENTRANCE[1])
                yield Between(ENTRANCE, [*lower.pids, *relay.pids])

    return way


# Measuring


def once(lab: Lab, contender: Contender, *, seconds: int, direct_bps: float) -> Result:
    """One contender. `direct_bps`: what UDP itself reached; 0: unknown. Raises BenchError."""
    with contender.way(lab) as between:
        time.sleep(_SETTLE_S)
        if contender.stream:
            return _stream(lab, between, seconds)
        return _flow(lab, between, seconds, direct_bps, contender.run)


def _stream(lab: Lab, between: Between, seconds: int) -> Result:
    trip = trips(lab, between, idle_s=ASK_S, loaded_s=LOADED_S).idle
    found = flow(lab, between.target, ways.SERVICE_PORT, seconds=seconds, relays=between.pids)
    return Result(found.bits_per_s, None, trip.p50_us, found.cpu_s_per_gb, found.others_cores)


def _flow(lab: Lab, between: Between, seconds: int, direct_bps: float, run: int) -> Result:
    p50_us = _ask(lab, between)
    meter, others = Meter(between.pids), Others()
    with meter.running():
        sent, came, took_s = _offer(lab, between, seconds, 0.0, run)
    others_cores = others.cores()
    bits_per_s = came * SIZE * 8 / took_s
    half = (direct_bps if between.pids else bits_per_s) / 2
    loss = None
    if half:
        sent, paced, _ = _offer(lab, between, seconds, half, run)
        loss = max(1 - paced / sent, 0.0)
    return Result(bits_per_s, loss, p50_us, meter.cpu_s / (came * SIZE / 1e9), others_cores)


def _ask(lab: Lab, between: Between) -> float:
    server = lab.popen("server", [*_ENDS, "echo", str(TARGET[1])], cwd=_ROOT)
    try:
        time.sleep(_SETTLE_S)
        return float(_run(lab, ["ask", *map(str, between.target), str(ASK_S)])["p50_us"])
    finally:
        server.kill()
        server.wait()


def _offer(lab: Lab, between: Between, seconds: int, bits_per_s: float, run: int) -> tuple[int, int, float]:
    """Datagrams that left and that came, and in how many seconds those did."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    taker = lab.popen("server", [*_ENDS, "take", str(TARGET[1]), str(run)], cwd=_ROOT, **pipes)
    try:
        assert taker.stdout is not None
        taker.stdout.readline()
        sent = _run(lab, ["send", *map(str, between.target), str(seconds), str(bits_per_s), str(run)])
        output, errors = taker.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise BenchError("datagrams do not cease to come") from error
    finally:
        taker.kill()
        taker.communicate()
    if taker.returncode:
        raise BenchError(errors.strip().rpartition("\n")[2])
    came = json.loads(output)
    if not came["seconds"]:
        raise BenchError(f"{came['datagrams']} datagrams came")
    return int(sent["datagrams"]), int(came["datagrams"]), float(came["seconds"])


def _run(lab: Lab, words: list[str]) -> dict[str, Any]:
    done = lab.run("client", [*_ENDS, *words], cwd=_ROOT, timeout=_PATIENCE_S, check=False)
    if done.returncode:
        raise BenchError(done.stderr.strip().rpartition("\n")[2])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# The table


def duration_s(wanted: Sequence[Contender], rounds: int, seconds: int) -> float:
    """About how long the table takes."""
    return rounds * sum((1 if each.stream else 2) * (seconds + 2) + ASK_S + 5 for each in wanted)


def table(wanted: Sequence[Contender], section: Section) -> Table:
    """All contenders, in turn in every round."""
    present = []
    for each in wanted:
        if missing := programs_missing(*each.programs):
            section.without(each.name, f"no {' and no '.join(missing)} here")
        else:
            present.append(each)
    results: list[Round] = []
    if not present:
        return _tabulate(present, results, section)
    with Lab(emulate=False) as plain, Lab(LIMITED) as limited:
        for turn in range(section.rounds):
            results.append({})
            for each in present:
                direct_bps = results[-1][DIRECT].bits_per_s if DIRECT in results[-1] else 0.0
                lab = limited if each.is_limited else plain
                measure = partial(once, lab, each, seconds=section.seconds, direct_bps=direct_bps)
                result = section.measure(turn, each.name, measure, _show)
                if result is not None:
                    results[-1][each.name] = result
                    section.others_cores = max(section.others_cores, result.others_cores)
    return _tabulate(present, results, section)


def _show(result: Result) -> str:
    loss = "" if result.loss is None else f", loss {result.loss:.2%}"
    return f"{result.bits_per_s / 1e6:.0f} Mbit/s, {result.cpu_s_per_gb:.2f} CPU s/GB, p50 {result.p50_us:.0f} µs{loss}"


def _tabulate(present: Sequence[Contender], results: list[Round], section: Section) -> Table:
    columns = [
        Column("through", "through"),
        Column("mbit_s", "Mbit/s", 0),
        Column("ratio", "to the bare one", 2),
        Column("loss_percent", "loss %", 2),
        Column("p50_us", "round trip p50 µs", 0),
        Column("cpu_s_per_gb", "CPU s/GB", 2),
    ]
    conditions = (
        f"One flow of datagrams of {SIZE} bytes, sent as fast as one plain sender can; what arrives. Loss is that of "
        f"half the rate which UDP itself reached, the round trip that of 1200 bytes, idle. forwarder has {PORTS} ports "
        f"that look like UDP or TCP, unless said. With kcptun (no cipher): one iperf3 connection, round trips of 64 "
        f"bytes; its windows are {LIMITED_WINDOW} packets where the link is limited. {section.seconds} s, "
        f"{section.median}, ratios within a round; CPU is of all relay processes of both ends, workers are at each."
    )
    rows = [_row(each, results) for each in present]
    title = "Datagrams over a link that limits nothing"
    return Table("datagrams", title, conditions, columns, rows, section.left_out, section.others_cores)


def _row(contender: Contender, results: list[Round]) -> Row:
    own = [each[contender.name] for each in results if contender.name in each]

    def middle(value: Callable[[Result], float | None]) -> float | None:
        found = [figure for result in own if (figure := value(result)) is not None]
        return median(found) if found else None

    ratios = [
        each[contender.name].bits_per_s / each[contender.base].bits_per_s
        for each in results
        if contender.name in each and contender.base in each
    ]
    return {
        "through": contender.name,
        "mbit_s": middle(lambda result: result.bits_per_s / 1e6),
        "ratio": median(ratios) if ratios else None,
        "loss_percent": middle(lambda result: None if result.loss is None else 100 * result.loss),
        "p50_us": middle(lambda result: result.p50_us),
        "cpu_s_per_gb": middle(lambda result: result.cpu_s_per_gb) if contender.name != DIRECT else None,
    }
