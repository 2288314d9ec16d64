"""A link that limits nothing: how fast, at what cost, and how far away, beside haproxy and socat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from tests.bench import ways
from tests.bench.limited import workers_text
from tests.bench.measure import WARM_UP_S, Flow, flow, programs_missing
from tests.bench.section import Section
from tests.bench.table import Column, Row, Table
from tests.bench.trips import LOAD_S, Trips, trips
from tests.bench.ways import Way
from tests.netlab import Lab

COUNTS = (1, 10, 100, 1000)
FEW = 10
"""What more stripes are compared to."""
WORKERS = (1, 2)
MANY_WORKERS = (4, 8)
"""With FEW stripes: that it does not get worse, on few cores."""
HAPROXY = "2 x haproxy"
IDLE_S, LOADED_S = 2, 4


@dataclass(frozen=True, slots=True)
class Contender:
    """`row` is its name for the command line. `program` has to be there; `few` is what its stripes are compared to."""

    row: str
    name: str
    way: Way
    program: str = "iperf3"
    few: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """One contender in one round."""

    flow: Flow
    trips: Trips


Round = dict[str, Result]
"""By the contender's name."""


def contenders(congestion: str) -> list[Contender]:
    """In the order of the table."""
    found = [
        Contender("direct", "direct", ways.direct),
        Contender("haproxy", HAPROXY, ways.haproxy, "haproxy"),
        Contender("socat", "2 x socat", ways.socat, "socat"),
    ]
    shapes = [(count, workers) for workers in WORKERS for count in COUNTS]
    for count, workers in [*shapes, *((FEW, workers) for workers in MANY_WORKERS)]:
        few = _name(FEW, workers) if count != FEW else _name(FEW, WORKERS[0]) if workers in MANY_WORKERS else ""
        way = ways.forwarder(count, workers, congestion)
        found.append(Contender(f"{count}x{workers}", _name(count, workers), way, few=few))
    return found


def _name(stripes: int, workers: int) -> str:
    return f"{stripes} stripe{'s' * (stripes > 1)}, {workers_text(workers)}"


def lab() -> Lab:
    """Both ends, joined by a bare wire."""
    return Lab(emulate=False)


def once(lab: Lab, way: Way, *, seconds: int) -> Flow:
    """One iperf3 connection that way. Set the congestion control first (`ways.set_congestion`)."""
    with way(lab) as between:
        return flow(lab, between.target, ways.SERVICE_PORT, seconds=seconds, relays=between.pids)


def once_with_trips(lab: Lab, contender: Contender, *, seconds: int) -> Result:
    """The same, after round trips."""
    with contender.way(lab) as between:
        found = trips(lab, between, idle_s=IDLE_S, loaded_s=LOADED_S)
        return Result(flow(lab, between.target, ways.SERVICE_PORT, seconds=seconds, relays=between.pids), found)


def duration_s(wanted: Sequence[Contender], rounds: int, seconds: int) -> float:
    """About how long the tables take."""
    return rounds * len(wanted) * (WARM_UP_S + seconds + 4 + IDLE_S + LOAD_S + LOADED_S + 2)


def tables(wanted: Sequence[Contender], congestion: str, section: Section) -> list[Table]:
    """All contenders, in turn in every round: speed, and round trips."""
    for each in wanted:
        if programs_missing(each.program):
            section.without(each.name, f"no {each.program} here")
    present = [each for each in wanted if not programs_missing(each.program)]
    results: list[Round] = []
    with lab() as link:
        ways.set_congestion(link, congestion)
        for turn in range(section.rounds):
            results.append({})
            for each in present:
                measure = partial(once_with_trips, link, each, seconds=section.seconds)
                result = section.measure(turn, each.name, measure, _show)
                if result is not None:
                    results[-1][each.name] = result
                    section.others_cores = max(section.others_cores, result.flow.others_cores)
    return _tabulate(present, results, congestion, section)


def _show(result: Result) -> str:
    idle, loaded = result.trips
    return (
        f"{result.flow.bits_per_s / 1e9:.2f} Gbit/s, {result.flow.cpu_s_per_gb:.2f} CPU s/GB, "
        f"p50 {idle.p50_us:.0f} µs, p99 beside bulk {loaded.p99_us:.0f} µs"
    )


def _tabulate(present: list[Contender], results: list[Round], congestion: str, section: Section) -> list[Table]:
    speed = (
        f"One iperf3 connection; {congestion} on every connection; {section.seconds} s, {section.median}"
        f", ratios within a round. CPU (seconds per 1e9 bytes) and memory (PSS, the most seen) are of all relay "
        f"processes of both ends. Workers are at each end; those of 4 and 8 are compared to 1. Only forwarder encrypts."
    )
    trip = (
        f"64 bytes there and back, one after the other; idle, and while another connection through the same relay "
        f"sends what it can. {section.median.capitalize()}, {IDLE_S} s and {LOADED_S} s each; ratios within a round."
    )
    return [
        Table(
            "speed",
            "A link that limits nothing",
            speed,
            _speed_columns(),
            [_speed_row(each, results) for each in present],
            section.left_out,
            section.others_cores,
        ),
        Table(
            "trips",
            "Round trip",
            trip,
            _trip_columns(),
            [_trip_row(each, results) for each in present],
            [],
            section.others_cores,
        ),
    ]


def _speed_columns() -> list[Column]:
    return [
        Column("through", "through"),
        Column("gbit_s", "Gbit/s", 2),
        Column("to_haproxy", "to haproxy", 2),
        Column("to_few", f"to {FEW} stripes", 2),
        Column("cpu_s_per_gb", "CPU s/GB", 2),
        Column("cpu_to_haproxy", "to haproxy", 2),
        Column("cpu_to_few", f"to {FEW} stripes", 2),
        Column("memory_mib", "MiB", 0),
    ]


def _trip_columns() -> list[Column]:
    return [
        Column("through", "through"),
        Column("idle_p50_us", "idle p50 µs", 0),
        Column("idle_to_haproxy", "to haproxy", 2),
        Column("idle_p99_us", "p99 µs", 0),
        Column("loaded_p50_us", "beside bulk p50 µs", 0),
        Column("loaded_p99_us", "p99 µs", 0),
        Column("loaded_to_haproxy", "to haproxy", 2),
    ]


Value = Callable[[Result], float]


def _middle(results: list[Round], name: str, value: Value, reference: str = "") -> float | None:
    """The median over rounds, of the ratio to the reference in the same round if there is one."""
    found = []
    for each in results:
        if name in each and (not reference or reference in each):
            base = value(each[reference]) if reference else 1.0
            if base:
                found.append(value(each[name]) / base)
    return median(found) if found else None


def _speed_row(contender: Contender, results: list[Round]) -> Row:
    def rate(result: Result) -> float:
        return result.flow.bits_per_s / 1e9

    def cost(result: Result) -> float:
        return result.flow.cpu_s_per_gb

    middle = partial(_middle, results, contender.name)
    relay = contender.way is not ways.direct
    return {
        "through": contender.name,
        "gbit_s": middle(rate),
        "to_haproxy": middle(rate, HAPROXY),
        "to_few": middle(rate, contender.few) if contender.few else None,
        "cpu_s_per_gb": middle(cost) if relay else None,
        "cpu_to_haproxy": middle(cost, HAPROXY) if relay else None,
        "cpu_to_few": middle(cost, contender.few) if contender.few else None,
        "memory_mib": middle(lambda result: result.flow.memory_bytes / 2**20) if relay else None,
    }


def _trip_row(contender: Contender, results: list[Round]) -> Row:
    middle = partial(_middle, results, contender.name)
    return {
        "through": contender.name,
        "idle_p50_us": middle(lambda result: result.trips.idle.p50_us),
        "idle_to_haproxy": middle(lambda result: result.trips.idle.p50_us, HAPROXY),
        "idle_p99_us": middle(lambda result: result.trips.idle.p99_us),
        "loaded_p50_us": middle(lambda result: result.trips.loaded.p50_us),
        "loaded_p99_us": middle(lambda result: result.trips.loaded.p99_us),
        "loaded_to_haproxy": middle(lambda result: result.trips.loaded.p99_us, HAPROXY),
    }
