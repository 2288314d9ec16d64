"""A table of figures: for the eye, as Markdown, as JSON and back."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from tests.bench.measure import BUSY_CORES, BenchError

Row = Mapping[str, Any]
"""By column key; a key that is missing or None is an empty cell."""


@dataclass(frozen=True, slots=True)
class Column:
    """Numbers have so many decimal `digits`; None: text."""

    key: str
    heading: str
    digits: int | None = None

    def show(self, value: Any) -> str:
        if value is None:
            return ""
        return str(value) if self.digits is None else f"{value:.{self.digits}f}"


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
        return [[column.show(row.get(column.key)) for column in self.columns] for row in self.rows]

    def print(self, console: Console) -> None:
        """To a terminal, or as plain text."""
        shown = RichTable(box=box.SIMPLE_HEAD if console.is_terminal else None, padding=(0, 2, 0, 0))
        for column in self.columns:
            shown.add_column(column.heading, justify="left" if column.digits is None else "right", no_wrap=True)
        for row in self.cells():
            shown.add_row(*row)
        console.print(f"\n{self.title}\n{self.conditions}\n", markup=False, highlight=False)
        console.print(shown)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)

    def markdown(self, heading: str = "##") -> str:
        """A section."""
        lines = [f"{heading} {self.title}", "", self.conditions, ""]
        lines += [_line(column.heading for column in self.columns)]
        lines += [_line("---" if column.digits is None else "---:" for column in self.columns)]
        lines += [_line(row) for row in self.cells()]
        lines += [f"\n{note}" for note in self.notes]
        return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_markdown(path: Path, machine: str, tables: list[Table]) -> None:
    """Raises OSError."""
    path.write_text("\n".join([f"Measured on {machine}.\n", *(table.markdown() for table in tables)]))


def write_json(path: Path, machine: str, tables: list[Table]) -> None:
    """Everything, for `read_json`. Raises OSError."""
    content = {"machine": machine, "tables": [asdict(table) for table in tables]}
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path, machine: str) -> list[Table]:
    """What `write_json` wrote on this machine. Raises BenchError."""
    try:
        content = json.loads(path.read_text())
        if content["machine"] != machine:
            raise BenchError(f"{path} is of another machine: {content['machine']}")
        tables = [Table(**table) for table in content["tables"]]
        for table in tables:
            table.columns = [Column(**column) for column in asdict(table)["columns"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: {error}") from error
    return tables
