"""A link that loses packets: what stripes make of it beside a single connection."""

from collections.abc import Sequence
from functools import partial
from statistics import median

from tests.bench import limited
from tests.bench.measure import Flow
from tests.bench.section import Section
from tests.bench.table import Column, Row, Table
from tests.netlab import Lab, Link

ALGORITHMS = ("cubic", "bbr")
COUNTS = (1, 10, 40)
WORKERS = limited.WORKERS
LINK = Link(delay_ms=50, loss=0.02, rate_bps=500e6)
WARM_UP_S = 5
SECONDS = 15
PLAIN = (1, 0)
"""One connection, no tunnel."""

Round = dict[tuple[str, int, int], Flow]
"""By algorithm, count and workers."""


def lab() -> Lab:
    """Both ends, joined by that link."""
    return Lab(LINK)


def duration_s(algorithms: Sequence[str], rounds: int, seconds: int) -> float:
    """About how long the table takes."""
    return rounds * len(algorithms) * (1 + len(COUNTS) * len(WORKERS)) * (seconds + WARM_UP_S + 4)


def table(algorithms: Sequence[str], available: Sequence[str], section: Section) -> Table:
    """All of these, in turn in every round."""
    results: list[Round] = []
    for each in algorithms:
        if each not in available:
            section.without(each, "this kernel does not have it (modprobe tcp_" + each + ")")
    present = [each for each in algorithms if each in available]
    with lab() as link:
        for turn in range(section.rounds):
            results.append({})
            for algorithm in present:
                for count, workers in (PLAIN, *((count, workers) for count in COUNTS for workers in WORKERS)):
                    name = f"{algorithm}, {count} stripes, {workers} workers" if workers else f"{algorithm}, plain"
                    measure = partial(
                        limited.once,
                        link,
                        count,
                        workers,
                        seconds=section.seconds,
                        warm_up_s=WARM_UP_S,
                        congestion=algorithm,
                    )
                    result = section.measure(turn, name, measure, limited.show)
                    if result is not None:
                        results[-1][algorithm, count, workers] = result
                        section.others_cores = max(section.others_cores, result.others_cores)
    return _tabulate(present, results, section)


def _tabulate(algorithms: Sequence[str], results: list[Round], section: Section) -> Table:
    columns = [
        Column("congestion", "congestion"),
        Column("stripes", "stripes", 0),
        Column("plain", "plain Mbit/s", 1),
    ]
    for workers in WORKERS:
        heading = f"{limited.workers_text(workers)} Mbit/s"
        columns += [Column(f"speed_{workers}", heading, 1), Column(f"ratio_{workers}", "times plain", 1)]
    conditions = (
        f"Payload of one connection through the tunnel, beside a plain TCP connection. 2 % of the packets lost in each "
        f"direction, 100 ms round trip, 500 Mbit/s the link; {section.seconds} s of steady state, {section.median}."
    )
    rows = [_row(each, count, results) for each in algorithms for count in COUNTS]
    title = "A link that loses packets"
    return Table("loss", title, conditions, columns, rows, section.left_out, section.others_cores)


def _row(algorithm: str, count: int, results: list[Round]) -> Row:
    row: dict[str, float | str] = {"congestion": algorithm, "stripes": count}
    plain = [each.get((algorithm, *PLAIN)) for each in results]
    if found := [flow.bits_per_s for flow in plain if flow]:
        row["plain"] = median(found) / 1e6
    for workers in WORKERS:
        flows = [each.get((algorithm, count, workers)) for each in results]
        if speeds := [flow.bits_per_s for flow in flows if flow]:
            row[f"speed_{workers}"] = median(speeds) / 1e6
        pairs = zip(flows, plain, strict=True)
        if ratios := [flow.bits_per_s / base.bits_per_s for flow, base in pairs if flow and base]:
            row[f"ratio_{workers}"] = median(ratios)
    return row
