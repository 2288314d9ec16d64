"""Columns and cells of what operators read: `status` and `top` name and colour things alike."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from forwarder import figures
from forwarder.summary import LOSS_BAD, LOSS_NOTED

STATE_STYLES = {
    "starting": "yellow",
    "connecting": "yellow",
    "up": "green",
    "degraded": "yellow",
    "draining": "cyan",
    "down": "red",
}

GAP = 2
DROPPED_FROM = 60
"""Columns for terminals as wide as this, or wider, may be left out so that others fit."""


class Column(NamedTuple):
    """A column of a table, and the narrowest terminal that shows it."""

    heading: str
    least_width: int = 0
    justify: Literal["left", "right"] = "right"
    folds: bool = False


def table(width: int, folds: bool, columns: Sequence[Column], rows: Iterable[Sequence[str | Text]]) -> Table:
    """The columns that a terminal of `width` has room for. Nothing is cut: names that are too long are folded or, not
    to be folded, make the table wider."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    lines = list(rows)
    fitting = _fitting(width, columns, lines)
    for index in fitting:
        column = columns[index]
        no_wrap = not (folds and column.folds)
        shown.add_column(column.heading, justify=column.justify, overflow="fold", no_wrap=no_wrap)
    for line in lines:
        shown.add_row(*(line[index] for index in fitting))
    return shown


def _fitting(width: int, columns: Sequence[Column], rows: Sequence[Sequence[str | Text]]) -> list[int]:
    """Those that are for wide terminals go first, rather than that names of a usual length are folded."""
    fitting = [index for index, column in enumerate(columns) if column.least_width <= width]
    needed = {index: _needed(columns[index], index, rows, width) for index in fitting}
    while sum(needed[index] + GAP for index in fitting) > width:
        least_useful = max(reversed(fitting), key=lambda index: columns[index].least_width)
        if columns[least_useful].least_width < DROPPED_FROM:
            break
        fitting.remove(least_useful)
    return fitting


def _needed(column: Column, index: int, rows: Iterable[Sequence[str | Text]], width: int) -> int:
    longest = max((len(row[index]) for row in rows), default=0)
    return max(len(column.heading), min(longest, width // 3) if column.folds else longest)


def state(word: str) -> Text:
    """The state's word in its colour."""
    return Text(word, style=STATE_STYLES.get(word, ""))


def loss(ratio: float | None) -> Text:
    """Loss, in a colour where it is worth a look."""
    style = "" if ratio is None or ratio < LOSS_NOTED else "yellow" if ratio < LOSS_BAD else "red"
    return Text(figures.percent(ratio), style=style)


def up_of_wanted(up: int, wanted: int) -> Text:
    """Carriers up of those wanted, in a colour where some are missing."""
    return Text(figures.share(up, wanted), style="" if up >= wanted else "yellow" if up else "red")
