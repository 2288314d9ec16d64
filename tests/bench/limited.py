"""A link that limits each connection: what stripes reach of what as many bare connections do."""

from collections.abc import Callable, Sequence
from statistics import median

from tests.bench import ways
from tests.bench.measure import BenchError, Flow, flow
from tests.bench.table import Column, Row, Table, number
from tests.netlab import Connection, Lab, Link, RunVoid

COUNTS = (1, 10, 40, 100)
WORKERS = (1, 2)
CONGESTION = "cubic"
LINK = Link(delay_ms=25, rate_bps=500e6)
PER_CONNECTION = Connection(rate_bps=10e6)
WARM_UP_S = 6
"""Slow start and the growth of the window are over by then, with 100 connections too."""
ATTEMPTS = 3
LATE_MS = 5.0
"""Packets may be so late (99 of 100): little beside the round trip, and a hundred connections start in bursts."""

_DIRECT = 0
"""Workers: no tunnel."""

Round = dict[tuple[int, int], Flow]
"""By count and workers."""


def lab() -> Lab:
    """Both ends, joined by that link."""
    return Lab(LINK, connections=[PER_CONNECTION])


def once(lab: Lab, count: int, workers: int, *, seconds: int, warm_up_s: int = WARM_UP_S) -> Flow:
    """One iperf3 connection through `count` stripes, or without workers `count` connections. Raises RunVoid."""
    way = ways.forwarder(count, workers, CONGESTION) if workers else ways.direct
    with way(lab) as between:
        lab.clear_report()
        result = flow(
            lab,
            between.target,
            ways.SERVICE_PORT,
            seconds=seconds,
            warm_up_s=warm_up_s,
            connections=1 if workers else count,
            congestion=CONGESTION,
            relays=between.pids,
        )
        lab.check(p99_ms=LATE_MS)
    return result


def table(counts: Sequence[int], rounds: int, seconds: int, say: Callable[[str], None]) -> Table:
    """All counts, in turn in every round."""
    results: list[Round] = []
    left_out: list[str] = []
    busiest = 0.0
    with lab() as link:
        for turn in range(rounds):
            results.append({})
            for count in counts:
                for workers in (_DIRECT, *WORKERS):
                    name = f"{count} stripes, {workers} workers" if workers else f"iperf3 -P {count}"
                    try:
                        result = results[-1][count, workers] = _unless_void(link, count, workers, seconds)
                    except (RunVoid, BenchError) as why:
                        left_out.append(f"Left out: round {turn + 1}, {name}: {why}.")
                        say(left_out[-1])
                    else:
                        say(f"round {turn + 1}: {name}: {result.bits_per_s / 1e6:.1f} Mbit/s")
                        busiest = max(busiest, result.others_cores)
    return _tabulate(counts, results, seconds, left_out, busiest)


def _unless_void(link: Lab, count: int, workers: int, seconds: int) -> Flow:
    """Measured ATTEMPTS times at most. Raises RunVoid."""
    for _ in range(ATTEMPTS - 1):
        try:
            return once(link, count, workers, seconds=seconds)
        except RunVoid:
            continue
    return once(link, count, workers, seconds=seconds)


def _tabulate(
    counts: Sequence[int], results: list[Round], seconds: int, left_out: list[str], others_cores: float
) -> Table:
    columns = [Column("stripes", "stripes"), Column("iperf3", "iperf3 -P Mbit/s", number(1))]
    for workers in WORKERS:
        columns += [
            Column(f"speed_{workers}", f"{_workers(workers)} Mbit/s", number(1)),
            Column(f"ratio_{workers}", "to iperf3", number(3)),
            Column(f"cpu_{workers}", "CPU s/GB", number(2)),
        ]
    rows: list[Row] = []
    for count in counts:
        row: dict[str, float] = {"stripes": count}
        bare = [each[count, _DIRECT].bits_per_s / 1e6 for each in results if (count, _DIRECT) in each]
        if bare:
            row["iperf3"] = median(bare)
        for workers in WORKERS:
            flows = [each[count, workers] for each in results if (count, workers) in each]
            both = [each for each in results if {(count, workers), (count, _DIRECT)} <= each.keys()]
            if flows:
                row[f"speed_{workers}"] = median(each.bits_per_s / 1e6 for each in flows)
                row[f"cpu_{workers}"] = median(each.cpu_s_per_gb for each in flows)
            if both:
                ratios = (each[count, workers].bits_per_s / each[count, _DIRECT].bits_per_s for each in both)
                row[f"ratio_{workers}"] = median(ratios)
        rows.append(row)
    conditions = (
        f"Payload of one connection through the tunnel, beside iperf3 with as many connections. 10 Mbit/s a "
        f"connection, 500 Mbit/s the link, 50 ms round trip, {CONGESTION}; {seconds} s of steady state, median of "
        f"{len(results)} rounds; workers are at each end, CPU is of both ends."
    )
    return Table("limited", "A link that limits each connection", conditions, columns, rows, left_out, others_cores)


def _workers(count: int) -> str:
    return f"{count} worker" + "s" * (count > 1)
