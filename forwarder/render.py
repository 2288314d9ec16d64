"""`forwarder status` for people: the running instance's answer as tables that fit the terminal."""

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from forwarder import columns, figures
from forwarder.columns import Column
from forwarder.summary import InstanceStatus, is_up, measured_bps, noticeable, read_answer, summarise
from workers.status import CarrierStatus, SessionStatus, TunnelStatus, WorkerStatus

FEW_CARRIERS = 12
"""So many are listed without being asked for."""
NOTICED_MAX = 10
NOTICED_A_SESSION = 3
"""At least, where several sessions have some that stand out."""

_PIPE_WIDTH = 200  # where no terminal is near
_ENDLESS = 100_000

_TUNNEL_COLUMNS = (
    Column("tunnel", justify="left", folds=True),
    Column("mode", 70, "left"),
    Column("state", 0, "left"),
    Column("sessions", 90),
    Column("open"),
    Column("total", 60),
    Column("reset", 60),
    Column("in", 46),
    Column("out", 46),
)
_SESSION_COLUMNS = (
    Column("session of", justify="left", folds=True),
    Column("key", 60, "left", folds=True),
    Column("peer", 0, "left", folds=True),
    Column("up/of"),
    Column("rtt p50", 60),
    Column("p95", 72),
    Column("loss", 70),
    Column("rate", 90),
    Column("resent", 110),
    Column("twice", 110),
    Column("resumes", 110),
)
_PORTS_COLUMN = Column("ports up", 130, "left")
_CARRIER_COLUMNS = (
    Column("carrier", justify="left"),
    Column("tunnel", 0, "left", folds=True),
    Column("key", 60, "left", folds=True),
    Column("state", 0, "left"),
    Column("rtt", 46),
    Column("loss", 46),
    Column("rate", 80),
    Column("in flight", 150),
    Column("age", 100),
    Column("in", 62),
    Column("out", 62),
    Column("worker", 140),
    Column("local", 160, "left"),
    Column("peer", 120, "left"),
)
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

Row = tuple[str | Text, ...]
Owned = tuple[str, SessionStatus]
"""A session, and the name of its tunnel."""


class Paper(NamedTuple):
    """What is printed on. `width` decides which columns there are; `folds`: long names must stay within it."""

    console: Console
    width: int
    folds: bool

    def put(self, each: Sequence[Column], rows: Iterable[Row]) -> None:
        """A table, with an empty line before it."""
        self.console.print()
        self.console.print(columns.table(self.width, self.folds, each, rows))


def standard_output() -> Paper:
    """As wide as the terminal or COLUMNS. Through a pipe rows stay whole, for grep, with the columns that the nearest
    terminal has room for. Peers and names are data: "[::1]" must not be read as markup."""
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(markup=False, highlight=False, emoji=False, width=None if fixed else _ENDLESS)
    return Paper(console, console.width if fixed else _near_width(), fixed)


def _near_width() -> int:
    """Of the terminal that `| less` draws on."""
    for fd in (2, 0):
        try:
            return os.get_terminal_size(fd).columns or _PIPE_WIDTH
        except OSError:
            continue
    return _PIPE_WIDTH


def print_status(answer: dict[str, Any], paper: Paper | None = None, every_carrier: bool = False) -> None:
    """Prints the answer; raises msgspec.ValidationError if it is none. Without a terminal there are no colours."""
    status = read_answer(answer)
    paper = paper or standard_output()
    paper.console.print(f"{headline(status)}, up {figures.duration(status.uptime_s)}")
    sessions = [(tunnel.name, session) for tunnel in status.tunnels for session in tunnel.sessions]
    modes = {tunnel.mode for tunnel in status.tunnels}
    paper.put(_TUNNEL_COLUMNS, map(_tunnel_row, status.tunnels))
    if sessions:
        session_columns = (*_SESSION_COLUMNS, _PORTS_COLUMN) if "spray" in modes else _SESSION_COLUMNS
        paper.put(session_columns, (_session_row(*each) for each in sessions))
        _print_carriers(paper, sessions, every_carrier)
    flow_columns = _flow_columns(modes)
    worker_columns = (*_WORKER_COLUMNS[:3], *flow_columns, *_WORKER_COLUMNS[3:])
    paper.put(worker_columns, (_worker_row(worker, flow_columns) for worker in status.workers))


def headline(status: InstanceStatus) -> str:
    """Which instance this is."""
    return f"forwarder {status.version} {status.role}, pid {status.pid}"


def _tunnel_row(tunnel: TunnelStatus) -> Row:
    flows = (str(tunnel.flows_open), str(tunnel.flows_total), str(tunnel.flows_reset))
    amounts = (figures.amount(tunnel.bytes_in), figures.amount(tunnel.bytes_out))
    return (tunnel.name, tunnel.mode, columns.state(tunnel.state), str(len(tunnel.sessions)), *flows, *amounts)


def _session_row(tunnel: str, session: SessionStatus) -> Row:
    summary = summarise(session.carriers)
    paths = (
        figures.trip(summary.rtt_ms),
        figures.trip(summary.rtt_high_ms),
        columns.loss(summary.loss),
        figures.rate(summary.measured_bps),
    )
    amounts = (figures.amount(session.reinjected_bytes), figures.amount(session.duplicate_bytes))
    identity = (tunnel, session.key_id, session.peer)
    up = columns.up_of_wanted(session.carriers_up, session.carriers_wanted)
    return (*identity, up, *paths, *amounts, str(session.resumes), _ports_up(session))


def _ports_up(session: SessionStatus) -> str:
    """The ports that are up, by kind: `7 tcp, 6 udp`."""
    up = [carrier.kind for carrier in session.carriers if is_up(carrier)]
    return ", ".join(f"{up.count(kind)} {kind}" for kind in ("tcp", "udp") if kind in up) or figures.UNKNOWN


def _print_carriers(paper: Paper, sessions: Sequence[Owned], every: bool) -> None:
    """All of them if they are few or asked for; else those that stand out, and how many do."""
    count = sum(len(session.carriers) for _, session in sessions)
    if every or count <= FEW_CARRIERS:
        if count:
            paper.put(_carrier_columns(sessions), _carrier_rows(sessions))
        return
    noted = [(tunnel, session, carriers) for tunnel, session in sessions if (carriers := noticeable(session))]
    total = sum(len(carriers) for _, _, carriers in noted)
    if noted:
        most = max(NOTICED_A_SESSION, NOTICED_MAX // len(noted))
        worst = [_carrier_row(name, session, each) for name, session, carriers in noted for each in carriers[:most]]
        paper.put(_carrier_columns(sessions), worst[:NOTICED_MAX])
    paper.console.print()
    said = f"{total} stand out by loss, round trip or state" if total else "none stands out"
    paper.console.print(f"{count} carriers, {said}; --carriers lists all")


def _carrier_columns(sessions: Sequence[Owned]) -> Sequence[Column]:
    """Where all have the same key there is none to tell them apart by, and more room for what differs."""
    if len({session.key_id for _, session in sessions}) > 1:
        return _CARRIER_COLUMNS
    return [column._replace(least_width=160) if column.heading == "key" else column for column in _CARRIER_COLUMNS]


def _carrier_rows(sessions: Sequence[Owned]) -> Iterator[Row]:
    for tunnel, session in sessions:
        for carrier in sorted(session.carriers, key=lambda carrier: (carrier.kind, carrier.id)):
            yield _carrier_row(tunnel, session, carrier)


def _carrier_row(tunnel: str, session: SessionStatus, carrier: CarrierStatus) -> Row:
    identity = (f"{carrier.kind} {carrier.id}", tunnel, session.key_id)
    known = is_up(carrier)
    path = (figures.trip(carrier.rtt_ms if known else None), columns.loss(carrier.loss if known else None))
    rate = figures.rate(measured_bps(carrier))
    life = (figures.amount(carrier.in_flight_bytes), figures.duration(carrier.age_s))
    amounts = (figures.amount(carrier.bytes_in), figures.amount(carrier.bytes_out))
    place = (str(carrier.worker), carrier.local, carrier.peer)
    return (*identity, columns.state(carrier.state), *path, rate, *life, *amounts, *place)


def _flow_columns(modes: Collection[str]) -> Sequence[Column]:
    """Flows of a mode that no tunnel has get no column."""
    only = next(iter(modes)) if len(modes) == 1 else ""
    return _FLOW_COLUMNS.get(only, _ALL_FLOW_COLUMNS)


def _worker_row(worker: WorkerStatus, flow_columns: Sequence[Column]) -> Row:
    flows = (str(getattr(worker, column.heading)) for column in flow_columns)
    counts = (str(worker.carriers), str(worker.restarts))
    memory = f"{figures.memory(worker.arena_used_bytes)} of {figures.memory(worker.arena_bytes)}"
    return (str(worker.id), columns.state(worker.state), str(worker.pid), *flows, *counts, memory)
