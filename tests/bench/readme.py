"""README's figures: what stands between its two markers comes from `make bench`, and so does the plot beside it."""

from pathlib import Path

from tests.bench.measure import BenchError
from tests.bench.table import Table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PLOT = Path("docs/bench.svg")
BEGIN, END = "<!-- figures: make bench writes this -->", "<!-- end of figures -->"


def fill(readme: Path, machine: str, tables: list[Table], plot: bool) -> None:
    """Replace what stands between the markers. Raises BenchError, OSError."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"no '{BEGIN}' and '{END}' in {readme.name}")
    readme.write_text(f"{before}{BEGIN}\n{figures(machine, tables, plot)}{END}{after}")


def figures(machine: str, tables: list[Table], plot: bool) -> str:
    """The section in Markdown."""
    parts = [f"Measured on {machine}.\n"]
    if plot:
        parts.append(f"![The figures below as a plot]({PLOT})\n")
    return "\n".join([*parts, *(table.markdown("###") for table in tables)])
