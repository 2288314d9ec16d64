"""`forwarder status` for people: the running instance's answer as tables that fit the terminal."""

import os
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from workers.status import SessionStatus, TunnelStatus, WorkerStatus

_STYLES = {
    "starting": "yellow",
    "connecting": "yellow",
    "up": "green",
    "degraded": "yellow",
    "draining": "cyan",
    "down": "red",
}

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_PIPE_WIDTH = 200  # without a terminal: one line a row


class Column(NamedTuple):
    """A column and the narrowest terminal that shows it."""

    heading: str
    least_width: int = 0
    justify: Literal["left", "right"] = "right"
    folds: bool = False


_TUNNEL_COLUMNS = (
    Column("tunnel", justify="left", folds=True),
    Column("mode", 70, "left"),
    Column("state", 0, "left"),
    Column("open"),
    Column("total", 60),
    Column("reset", 60),
    Column("in", 46),
    Column("out", 46),
)
_SESSION_COLUMNS = (
    Column("session", justify="left", folds=True),
    Column("key", 60, "left", folds=True),
    Column("peer", 0, "left", folds=True),
    Column("up/of"),
    Column("rtt", 60),
    Column("resent", 80),
    Column("twice", 90),
    Column("resumes", 90),
)
_PORTS_COLUMN = Column("ports up", 100, "left")
_WORKER_COLUMNS = (
    Column("worker", justify="left"),
    Column("state", 0, "left"),
    Column("pid"),
    Column("carriers", 50),
    Column("restarts", 60),
    Column("memory", 80),
)
_FLOW_COLUMNS = {"stripe": (Column("streams"),), "spray": (Column("conversations"),)}
_ALL_FLOW_COLUMNS = (Column("streams"), Column("conversations", 90))


class InstanceStatus(msgspec.Struct):
    """The answer to `status`; keys beyond these are ignored, so that another version's answer can be shown."""

    role: str
    version: str
    pid: int
    uptime_s: float
    workers: list[WorkerStatus]
    tunnels: list[TunnelStatus]


def print_status(answer: dict[str, Any], console: Console | None = None) -> None:
    """Prints the answer; raises msgspec.ValidationError if it is not one. Without a terminal there are no colours."""
    status = msgspec.convert(answer, InstanceStatus)
    console = console or _console()
    console.print(f"forwarder {status.version} {status.role}, pid {status.pid}, up {duration(status.uptime_s)}")
    sessions = [(tunnel.name, session) for tunnel in status.tunnels for session in tunnel.sessions]
    modes = {tunnel.mode for tunnel in status.tunnels}
    console.print()
    console.print(_table(console.width, _TUNNEL_COLUMNS, map(_tunnel_row, status.tunnels)))
    if sessions:
        columns = (*_SESSION_COLUMNS, _PORTS_COLUMN) if "spray" in modes else _SESSION_COLUMNS
        console.print()
        console.print(_table(console.width, columns, (_session_row(*each) for each in sessions)))
    console.print()
    console.print(_worker_table(console.width, status.workers, modes))


def _console() -> Console:
    """Standard output. Peers and names are data: "[::1]" must not be read as markup."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(markup=False, highlight=False, emoji=False, width=None if narrow else _PIPE_WIDTH)


def _table(width: int, columns: Sequence[Column], rows: Iterable[Sequence[str | Text]]) -> Table:
    """The columns that a terminal of `width` has room for. Names that are too long are folded, nothing is cut."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    fitting = [index for index, column in enumerate(columns) if column.least_width <= width]
    for index in fitting:
        column = columns[index]
        table.add_column(column.heading, justify=column.justify, overflow="fold", no_wrap=not column.folds)
    for row in rows:
        table.add_row(*(row[index] for index in fitting))
    return table


def _tunnel_row(tunnel: TunnelStatus) -> tuple[str | Text, ...]:
    flows = (str(tunnel.flows_open), str(tunnel.flows_total), str(tunnel.flows_reset))
    amounts = (amount(tunnel.bytes_in), amount(tunnel.bytes_out))
    return (tunnel.name, tunnel.mode, _state(tunnel.state), *flows, *amounts)


def _session_row(tunnel: str, session: SessionStatus) -> tuple[str, ...]:
    carriers = f"{session.carriers_up}/{session.carriers_wanted}"
    amounts = (amount(session.reinjected_bytes), amount(session.duplicate_bytes))
    identity = (tunnel, session.key_id, session.peer)
    return (*identity, carriers, _rtt(session), *amounts, str(session.resumes), _ports_up(session))


def _ports_up(session: SessionStatus) -> str:
    """The ports that are up, by kind: `7 tcp, 6 udp`."""
    up = [carrier.kind for carrier in session.carriers if carrier.state == "up"]
    return ", ".join(f"{up.count(kind)} {kind}" for kind in ("tcp", "udp") if kind in up) or "-"


def _worker_table(width: int, workers: Sequence[WorkerStatus], modes: Collection[str]) -> Table:
    """Flows of a mode that no tunnel has get no column."""
    only = next(iter(modes)) if len(modes) == 1 else ""
    flow_columns = _FLOW_COLUMNS.get(only, _ALL_FLOW_COLUMNS)
    columns = (*_WORKER_COLUMNS[:3], *flow_columns, *_WORKER_COLUMNS[3:])
    return _table(width, columns, (_worker_row(worker, flow_columns) for worker in workers))


def _worker_row(worker: WorkerStatus, flow_columns: Sequence[Column]) -> tuple[str | Text, ...]:
    flows = (str(getattr(worker, column.heading)) for column in flow_columns)
    counts = (str(worker.carriers), str(worker.restarts))
    memory = f"{amount(worker.arena_used_bytes)} of {amount(worker.arena_bytes)}"
    return (str(worker.id), _state(worker.state), str(worker.pid), *flows, *counts, memory)


def _state(word: str) -> Text:
    return Text(word, style=_STYLES.get(word, ""))


def _rtt(session: SessionStatus) -> str:
    """The least and the greatest round-trip time of the carriers that are up."""
    times = [carrier.rtt_ms for carrier in session.carriers if carrier.state == "up"]
    if not times:
        return "-"
    low, high = f"{min(times):.3g}", f"{max(times):.3g}"
    return f"{low} ms" if low == high else f"{low}-{high} ms"


def amount(count_bytes: int) -> str:
    """Bytes to three figures: `999 B`, `1.5 MiB`."""
    if count_bytes < 1024:
        return f"{count_bytes} B"
    power = 1
    while power < len(_UNITS) - 1 and count_bytes >= 1023.5 * 1024**power:
        power += 1
    value = count_bytes / 1024**power
    return f"{value:.0f} {_UNITS[power]}" if value >= 100 else f"{value:.3g} {_UNITS[power]}"


def duration(time_s: float) -> str:
    """Seconds to the two largest units: `4 d 7 h`, `12 s`."""
    left = int(time_s)
    parts: list[str] = []
    for unit, size_s in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size_s)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
