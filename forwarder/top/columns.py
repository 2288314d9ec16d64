"""The columns of `top`: what each shows of a row, how wide it is, and how rows are put in its order."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rich.text import Text

from forwarder import figures
from forwarder.columns import loss, state, up_of_wanted
from forwarder.top.rows import Order, Row, natural_order

_SEVERITY = {word: rank for rank, word in enumerate(("down", "starting", "connecting", "draining", "degraded", "up"))}


class Shown(NamedTuple):
    """A column, and the narrowest terminal that shows it. `value` is what rows are sorted by, the greatest first if
    `falling`. A `width` of 0 is what the others leave."""

    heading: str
    width: int
    value: Callable[[Row], Any]
    cell: Callable[[Row], str | Text]
    least_width: int = 0
    falling: bool = True
    left: bool = False

    def order(self, reverse: bool) -> Order:
        """Of the rows, by this column."""
        return Order(self.value, self.falling != reverse)


def _missing(row: Row) -> float | None:
    return None if row.carriers is None else row.carriers[1] - row.carriers[0]


def _carriers(row: Row) -> str | Text:
    return "" if row.carriers is None else up_of_wanted(*row.carriers)


def _amount(count_bytes: int | None) -> str:
    return "" if count_bytes is None else figures.amount(count_bytes)


def _count(count: int | None) -> str:
    return "" if count is None else str(count)


def _unless_none(row: Row, value: float | None, text: str) -> str:
    """Sessions and tunnels have a 95th percentile, and a dash for it; a carrier has one round trip."""
    return text if value is not None or row.expandable else ""


SHOWN = (
    Shown("", 0, lambda row: natural_order(row.name), lambda row: row.name, falling=False, left=True),
    Shown("state", 10, lambda row: _SEVERITY.get(row.state), lambda row: state(row.state), falling=False, left=True),
    Shown("up/of", 9, _missing, _carriers),
    Shown("rtt", 7, lambda row: row.rtt_ms, lambda row: figures.trip(row.rtt_ms)),
    Shown(
        "p95",
        7,
        lambda row: row.rtt_high_ms,
        lambda row: _unless_none(row, row.rtt_high_ms, figures.trip(row.rtt_high_ms)),
        110,
    ),
    Shown("loss", 6, lambda row: row.loss, lambda row: loss(row.loss)),
    Shown("in", 11, lambda row: row.rates.in_bps, lambda row: figures.rate(row.rates.in_bps)),
    Shown("out", 11, lambda row: row.rates.out_bps, lambda row: figures.rate(row.rates.out_bps)),
    Shown("rate", 11, lambda row: row.measured_bps, lambda row: figures.rate(row.measured_bps), 120),
    Shown("in flight", 9, lambda row: row.in_flight_bytes, lambda row: _amount(row.in_flight_bytes), 230),
    Shown("bytes in", 9, lambda row: row.bytes_in, lambda row: _amount(row.bytes_in), 100),
    Shown("bytes out", 9, lambda row: row.bytes_out, lambda row: _amount(row.bytes_out), 110),
    Shown("flows", 6, lambda row: row.flows, lambda row: _count(row.flows), 130),
    Shown("resets", 6, lambda row: row.resets, lambda row: _count(row.resets), 140),
    Shown(
        "age",
        11,
        lambda row: row.age_s,
        lambda row: "" if row.age_s is None else figures.duration(row.age_s),
        150,
    ),
    Shown("worker", 6, lambda row: row.worker, lambda row: _count(row.worker), 160),
    Shown("local - peer", 0, lambda row: row.peer, lambda row: row.peer, 190, falling=False, left=True),
)
"""The first one is the tree's; the last one shows the throughput of tunnels, which have no peer."""

NAME_WIDTH = 30
"""Of the first column, where the last one is shown, too."""


def widths(width: int) -> list[tuple[int, int]]:
    """The columns that fit, as pairs of number and width, with a space between any two."""
    numbers = [number for number, column in enumerate(SHOWN) if column.least_width <= width]
    free = width - sum(SHOWN[number].width for number in numbers) - (len(numbers) - 1)
    last = len(SHOWN) - 1 in numbers
    name = min(NAME_WIDTH, free) if last else free
    flexible = {0: max(name, 1), len(SHOWN) - 1: max(free - name, 1)}
    return [(number, flexible.get(number, SHOWN[number].width)) for number in numbers]
