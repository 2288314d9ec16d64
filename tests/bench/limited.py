"""A link that limits each connection: what stripes reach of what as many bare connections do."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median

from tests.bench import ways
from tests.bench.measure import Flow, flow
from tests.bench.section import Section
from tests.bench.table import Column, Row, Table
from tests.netlab import Connection, Lab, Link

COUNTS: tuple[int | None, ...] = (1, 10, 40, 100, None)
"""Stripes; None: as many as the tunnel finds best."""
WORKERS = (1, 2)
CONGESTION = "cubic"
LINK = Link(delay_ms=25, rate_bps=500e6)
PER_CONNECTION = Connection(rate_bps=10e6)
WARM_UP_S = 6
"""Slow start and the growth of the window are over by then, with 100 connections too."""
AUTO_WARM_UP_S = 30
"""The pool has found its size by then."""
LATE_MS = 5.0
"""Packets may be so late (99 of 100): little beside the round trip, and a hundred connections start in bursts."""

_DIRECT = 0
"""Workers: no tunnel."""

Round = dict[tuple[int | None, int], Flow]
"""By count and workers."""


def lab() -> Lab:
    """Both ends, joined by that link."""
    return Lab(LINK, connections=[PER_CONNECTION])


def once(
    lab: Lab,
    count: int | None,
    workers: int,
    *,
    seconds: int,
    warm_up_s: int = WARM_UP_S,
    congestion: str = CONGESTION,
) -> Flow:
    """One iperf3 connection through `count` stripes, or without workers `count` connections. Raises RunVoid."""
    way = ways.forwarder(count, workers, congestion) if workers else ways.direct
    with way(lab) as between:
        lab.clear_report()
        result = flow(
            lab,
            between.target,
            ways.SERVICE_PORT,
            seconds=seconds,
            warm_up_s=warm_up_s,
            connections=1 if workers else count or 1,
            congestion=congestion,
            relays=between.pids,
        )
        lab.check(p99_ms=LATE_MS)
        if between.pair is not None:
            result = replace(result, stripes=between.pair.carriers_up())
    return result


def duration_s(counts: Sequence[int | None], rounds: int, seconds: int) -> float:
    """About how long the table takes."""
    one = sum(
        len(WORKERS) * (seconds + AUTO_WARM_UP_S + 5)
        if count is None
        else (1 + len(WORKERS)) * (seconds + WARM_UP_S + 4)
        for count in counts
    )
    return rounds * one


def table(counts: Sequence[int | None], section: Section) -> Table:
    """All counts, in turn in every round."""
    results: list[Round] = []
    with lab() as link:
        for turn in range(section.rounds):
            results.append({})
            for count in counts:
                for workers in WORKERS if count is None else (_DIRECT, *WORKERS):
                    name = f"{count or 'auto'} stripes, {workers} workers" if workers else f"iperf3 -P {count}"
                    warm_up_s = AUTO_WARM_UP_S if count is None else WARM_UP_S
                    measure = partial(once, link, count, workers, seconds=section.seconds, warm_up_s=warm_up_s)
                    result = section.measure(turn, name, measure, show)
                    if result is not None:
                        results[-1][count, workers] = result
                        section.others_cores = max(section.others_cores, result.others_cores)
    return _tabulate(counts, results, section)


def show(result: Flow) -> str:
    """For the eye of whoever waits."""
    return f"{result.bits_per_s / 1e6:.1f} Mbit/s"


def _tabulate(counts: Sequence[int | None], results: list[Round], section: Section) -> Table:
    columns = [Column("stripes", "stripes"), Column("iperf3", "iperf3 -P Mbit/s", 1)]
    for workers in WORKERS:
        columns += [
            Column(f"speed_{workers}", f"{workers_text(workers)} Mbit/s", 1),
            Column(f"ratio_{workers}", "to iperf3", 3),
            Column(f"cpu_{workers}", "CPU s/GB", 2),
        ]
    conditions = (
        f"Payload of one connection through the tunnel, beside iperf3 with as many connections (beside `auto`, the "
        f"best of those). 10 Mbit/s a connection, 500 Mbit/s the link, 50 ms round trip, {CONGESTION}; "
        f"{section.seconds} s of steady state, {section.median}; workers are at each end, CPU is of "
        f"both ends."
    )
    rows = [_row(count, results) for count in counts]
    title = "A link that limits each connection"
    return Table("limited", title, conditions, columns, rows, section.left_out, section.others_cores)


def _row(count: int | None, results: list[Round]) -> Row:
    row: dict[str, float | str | None] = {"stripes": "auto" if count is None else str(count)}
    bare = [_bare(each, count) for each in results]
    if found := [rate for rate in bare if rate]:
        row["iperf3"] = median(found) / 1e6
    for workers in WORKERS:
        flows = [each[count, workers] for each in results if (count, workers) in each]
        if flows:
            row[f"speed_{workers}"] = median(each.bits_per_s / 1e6 for each in flows)
            row[f"cpu_{workers}"] = median(each.cpu_s_per_gb for each in flows)
            row[f"stripes_{workers}"] = median(each.stripes for each in flows)
        pairs = zip(results, bare, strict=True)
        ratios = [each[count, workers].bits_per_s / rate for each, rate in pairs if rate and (count, workers) in each]
        if ratios:
            row[f"ratio_{workers}"] = median(ratios)
    if count is None and (ends := [f"{row[key]:.0f}" for key in map("stripes_{}".format, WORKERS) if key in row]):
        row["stripes"] = f"auto ({', '.join(ends)})"
    return row


def _bare(results: Round, count: int | None) -> float:
    """Bits per second of as many connections, or of the best number of them; 0: not measured."""
    rates = [flow.bits_per_s for (each, workers), flow in results.items() if not workers and count in (each, None)]
    return max(rates, default=0.0)


def workers_text(count: int) -> str:
    """With the right number."""
    return f"{count} worker" + "s" * (count > 1)
