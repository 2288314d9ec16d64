"""A link that limits nothing: how fast, at what cost, and how far away, beside haproxy and socat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench import ways
from tests.bench.measure import BenchError, Echo, Flow, echo, flow, programs_missing
from tests.bench.table import Column, Row, Table, number
from tests.bench.ways import Way
from tests.netlab import Lab

FEW, MANY = 10, 1000
WORKERS = (1, 2)
HAPROXY = "2 x haproxy"
ECHO_S = 2


@dataclass(frozen=True, slots=True)
class Contender:
    """`row` is its name for the command line. `program` has to be there; `few` is what many stripes are compared to."""

    row: str
    name: str
    way: Way
    program: str = "iperf3"
    few: str = ""


def contenders(congestion: str) -> list[Contender]:
    """In the order of the table."""
    found = [
        Contender("direct", "direct", ways.direct),
        Contender("haproxy", HAPROXY, ways.haproxy, "haproxy"),
        Contender("socat", "2 x socat", ways.socat, "socat"),
    ]
    for workers in WORKERS:
        few = _name(FEW, workers)
        found += [
            Contender(f"{FEW}x{workers}", few, ways.forwarder(FEW, workers, congestion)),
            Contender(f"{MANY}x{workers}", _name(MANY, workers), ways.forwarder(MANY, workers, congestion), few=few),
        ]
    return found


def _name(stripes: int, workers: int) -> str:
    return f"{stripes} stripes, {workers} worker" + "s" * (workers > 1)


def lab() -> Lab:
    """Both ends, joined by a bare wire."""
    return Lab(emulate=False)


def once(lab: Lab, way: Way, *, seconds: int) -> Flow:
    """One iperf3 connection that way. Set the congestion control first (`ways.set_congestion`)."""
    with way(lab) as between:
        return flow(lab, between.target, ways.SERVICE_PORT, seconds=seconds, relays=between.pids)


def once_with_echo(lab: Lab, way: Way, *, seconds: int) -> tuple[Flow, Echo]:
    """The same, after a while of round trips on an idle relay."""
    with way(lab) as between:
        trips = echo(lab, between.target, ways.SERVICE_PORT, seconds=ECHO_S)
        return flow(lab, between.target, ways.SERVICE_PORT, seconds=seconds, relays=between.pids), trips


def table(wanted: Sequence[Contender], congestion: str, rounds: int, seconds: int, say: Callable[[str], None]) -> Table:
    """All contenders, in turn in every round."""
    left_out: list[str] = []
    busiest = 0.0
    present: list[Contender] = []
    for each in wanted:
        if programs_missing(each.program):
            left_out.append(f"Left out: {each.name}, for want of {each.program}.")
        else:
            present.append(each)
    results: list[dict[str, tuple[Flow, Echo]]] = []
    with lab() as link:
        ways.set_congestion(link, congestion)
        for turn in range(rounds):
            results.append({})
            for each in present:
                try:
                    result = results[-1][each.name] = once_with_echo(link, each.way, seconds=seconds)
                except BenchError as error:
                    left_out.append(f"Left out: round {turn + 1}, {each.name}: {error}.")
                    say(left_out[-1])
                else:
                    say(f"round {turn + 1}: {each.name}: {result[0].bits_per_s / 1e9:.2f} Gbit/s")
                    busiest = max(busiest, result[0].others_cores)
    conditions = (
        f"One iperf3 connection, and round trips of 64 bytes; {congestion} on every connection; {seconds} s, median of "
        f"{rounds} rounds, ratios within a round. CPU (seconds per 1e9 bytes) and memory (PSS, the most seen) are of "
        f"all relay processes of both ends. Only forwarder encrypts."
    )
    return Table(
        "speed", "A link that limits nothing", conditions, _columns(), _rows(present, results), left_out, busiest
    )


def _columns() -> list[Column]:
    return [
        Column("through", "through"),
        Column("gbit_s", "Gbit/s", number(2)),
        Column("to_haproxy", "to haproxy", number(2)),
        Column("to_few", f"to {FEW} stripes", number(2)),
        Column("cpu_s_per_gb", "CPU s/GB", number(2)),
        Column("cpu_to_haproxy", "to haproxy", number(2)),
        Column("memory_mib", "MiB", number(0)),
        Column("p50_us", "p50 µs", number(0)),
        Column("p99_us", "p99 µs", number(0)),
    ]


def _rows(present: list[Contender], results: list[dict[str, tuple[Flow, Echo]]]) -> list[Row]:
    def middle(value: Callable[[Flow, Echo], float], name: str, reference: str = "") -> float | None:
        found = []
        for each in results:
            if name in each and (not reference or reference in each):
                divisor = value(*each[reference]) if reference else 1.0
                if divisor:
                    found.append(value(*each[name]) / divisor)
        return median(found) if found else None

    def rate(flow: Flow, _: Echo) -> float:
        return flow.bits_per_s / 1e9

    def cost(flow: Flow, _: Echo) -> float:
        return flow.cpu_s_per_gb

    rows: list[Row] = []
    for each in present:
        relay = each.way is not ways.direct
        rows.append(
            {
                "through": each.name,
                "gbit_s": middle(rate, each.name),
                "to_haproxy": middle(rate, each.name, HAPROXY),
                "to_few": middle(rate, each.name, each.few) if each.few else None,
                "cpu_s_per_gb": middle(cost, each.name) if relay else None,
                "cpu_to_haproxy": middle(cost, each.name, HAPROXY) if relay else None,
                "memory_mib": middle(lambda flow, _: flow.memory_bytes / 2**20, each.name) if relay else None,
                "p50_us": middle(lambda _, trips: trips.p50_us, each.name),
                "p99_us": middle(lambda _, trips: trips.p99_us, each.name),
            }
        )
    return rows
