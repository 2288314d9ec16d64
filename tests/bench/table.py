"""A table of figures: for the eye, as Markdown, as JSON."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from tests.bench.measure import BUSY_CORES

Row = Mapping[str, Any]
"""By column key; a key that is missing or None is an empty cell."""


@dataclass(frozen=True, slots=True)
class Column:
    """`show` makes text of a value."""

    key: str
    heading: str
    show: Callable[[Any], str] = str


@dataclass(slots=True)
class Table:
    """`conditions`: what one has to know to compare. `others_cores`: what other programs used at worst."""

    name: str
    title: str
    conditions: str
    columns: list[Column]
    rows: list[Row]
    left_out: list[str]
    others_cores: float

    @property
    def notes(self) -> list[str]:
        """What limits the worth of the figures."""
        busy = [f"Other programs used up to {self.others_cores:.1f} cores meanwhile: the machine was not free."]
        return self.left_out + (busy if self.others_cores > BUSY_CORES else [])

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [
            ["" if row.get(column.key) is None else column.show(row[column.key]) for column in self.columns]
            for row in self.rows
        ]

    def print(self, console: Console) -> None:
        """To a terminal, or as plain text."""
        shown = RichTable(box=box.SIMPLE_HEAD if console.is_terminal else None, padding=(0, 2, 0, 0))
        for number, column in enumerate(self.columns):
            shown.add_column(column.heading, justify="right" if number else "left", no_wrap=True)
        for row in self.cells():
            shown.add_row(*row)
        console.print(f"\n{self.title}\n{self.conditions}\n", markup=False, highlight=False)
        console.print(shown)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)

    def markdown(self) -> str:
        """A section."""
        headings = [column.heading for column in self.columns]
        lines = [f"## {self.title}", "", self.conditions, ""]
        lines += _line(headings), _line(["---", *["---:"] * (len(headings) - 1)])
        lines += [_line(row) for row in self.cells()]
        lines += [f"\n{note}" for note in self.notes]
        return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(tables: list[Table], *, markdown: Path | None, as_json: Path | None) -> None:
    """Into files, if asked. Raises OSError."""
    if markdown is not None:
        markdown.write_text("\n".join(table.markdown() for table in tables))
    if as_json is not None:
        content = {
            table.name: {
                "conditions": table.conditions,
                "rows": table.rows,
                "left_out": table.left_out,
                "others_cores": table.others_cores,
            }
            for table in tables
        }
        as_json.write_text(json.dumps(content, indent=2) + "\n")


def number(digits: int) -> Callable[[float], str]:
    """With so many decimal places."""
    return lambda value: f"{value:.{digits}f}"
