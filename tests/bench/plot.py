"""The figures as small multiples in one SVG, the same bytes for the same figures. Needs the extra `bench`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = True

from tests.bench import limited, loss
from tests.bench.table import Table

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "forwarder",
    "svg.fonttype": "none",  # text stays text: small, and readable to programs
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
_OTHERS, _DIRECT = "#8a8f98", "#c9ccd1"
_OURS = {1: "#3b82c4", 2: "#0f4c81", 4: "#5aa469", 8: "#2f6b3c"}
_PANEL_IN = (4.6, 3.6)


def draw(tables: Sequence[Table], path: Path) -> bool:
    """Write what there are panels for; False if nothing is. Only if AVAILABLE. Raises OSError."""
    panels = _panels({table.name: table for table in tables})
    if not panels:
        return False
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (_PANEL_IN[0] * columns, _PANEL_IN[1] * rows)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for panel, place in zip(panels, axes.flat, strict=False):
            panel(place)
        for place in axes.flat[len(panels) :]:
            place.set_axis_off()
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return True


def _panels(tables: dict[str, Table]) -> list[Callable[[Any], None]]:
    panels: list[Callable[[Any], None]] = []
    if "limited" in tables:
        panels.append(partial(_limited, table=tables["limited"]))
    if "loss" in tables:
        panels.append(partial(_loss, table=tables["loss"]))
    if "speed" in tables:
        shown = (("gbit_s", "No limit on the link: Gbit/s", 1), ("cpu_s_per_gb", "The same: CPU seconds per GB", 2))
        panels += [partial(_bars, table=tables["speed"], key=key, title=title, digits=n) for key, title, n in shown]
    return panels


def _limited(axes: Any, table: Table) -> None:
    """Each against the number of stripes; `auto` has no number, it is a level."""
    axes.set_title("10 Mbit/s a connection: Mbit/s by stripes")
    counted = [row for row in table.rows if row["stripes"].isdigit()]
    lines = [("iperf3", "iperf3 -P", _OTHERS, "o")]
    lines += [(f"speed_{n}", f"forwarder, {limited.workers_text(n)}", _OURS[n], "s^"[n - 1]) for n in limited.WORKERS]
    for key, label, colour, marker in lines:
        points = [(int(row["stripes"]), row[key]) for row in counted if row.get(key)]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4)
    for row in table.rows:
        for workers in limited.WORKERS:
            if row not in counted and row.get(f"speed_{workers}"):
                label = f'somaxconn = "auto", {limited.workers_text(workers)}'
                axes.axhline(row[f"speed_{workers}"], label=label, color=_OURS[workers], linestyle=":")
    _logarithmic(axes, [int(row["stripes"]) for row in counted])
    axes.legend()


def _loss(axes: Any, table: Table) -> None:
    """A single connection is drawn as a level."""
    axes.set_title("2 % loss, 100 ms: Mbit/s by stripes")
    workers = loss.WORKERS[0]
    for name, colour in zip(loss.ALGORITHMS, (_OURS[1], _OURS[4]), strict=True):
        rows = [row for row in table.rows if row["congestion"] == name]
        points = [(row["stripes"], row[key]) for row in rows if (key := f"speed_{workers}") in row]
        if points:
            label = f"{name}, {limited.workers_text(workers)}"
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker="o", markersize=4)
        if rows and "plain" in rows[0]:
            axes.axhline(rows[0]["plain"], label=f"{name}, one connection", color=colour, linestyle=":")
    _logarithmic(axes, list(loss.COUNTS))
    axes.legend()


def _logarithmic(axes: Any, ticks: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("stripes")


def _bars(axes: Any, table: Table, key: str, title: str, digits: int) -> None:
    axes.set_title(title)
    rows = [row for row in table.rows if row.get(key) is not None][::-1]
    bars = axes.barh([row["through"] for row in rows], [row[key] for row in rows], color=[_colour(row) for row in rows])
    axes.bar_label(bars, fmt=f"%.{digits}f", padding=3, fontsize=8)
    axes.margins(x=0.12)


def _colour(row: Any) -> str:
    name = row["through"]
    if "worker" not in name:
        return _DIRECT if name == "direct" else _OTHERS
    return _OURS[int(name.split(",")[1].split()[0])]
