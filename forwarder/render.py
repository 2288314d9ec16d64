"""`forwarder status` for people: the running instance's answer as tables that fit the terminal."""

from collections.abc import Iterable
from typing import Any

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
    # Peers and names are data: "[::1]" must not be read as markup.
    console = console or Console(markup=False, highlight=False, emoji=False)
    console.print(f"forwarder {status.version} {status.role}, pid {status.pid}, up {duration(status.uptime_s)}")
    console.print(_tunnels(status.tunnels))
    if any(tunnel.sessions for tunnel in status.tunnels):
        console.print(_sessions(status.tunnels))
    console.print(_workers(status.workers))


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    """Text columns, then columns of numbers. Too narrow a terminal wraps cells and cuts nothing."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _tunnels(tunnels: Iterable[TunnelStatus]) -> Table:
    table = _table("Tunnels", ("name", "mode", "state"), ("open", "total", "reset", "in", "out"))
    for tunnel in tunnels:
        flows = (tunnel.flows_open, tunnel.flows_total, tunnel.flows_reset)
        amounts = (amount(tunnel.bytes_in), amount(tunnel.bytes_out))
        table.add_row(Text(tunnel.name), tunnel.mode, _state(tunnel.state), *map(str, flows), *amounts)
    return table


def _sessions(tunnels: Iterable[TunnelStatus]) -> Table:
    table = _table("Sessions", ("tunnel", "key", "peer"), ("up", "of", "rtt", "resent", "twice", "resumes"))
    for tunnel in tunnels:
        for session in tunnel.sessions:
            table.add_row(
                Text(tunnel.name),
                Text(session.key_id),
                Text(session.peer),
                str(session.carriers_up),
                str(session.carriers_wanted),
                _rtt(session),
                amount(session.reinjected_bytes),
                amount(session.duplicate_bytes),
                str(session.resumes),
            )
    return table


def _workers(workers: Iterable[WorkerStatus]) -> Table:
    table = _table("Workers", ("id", "state"), ("pid", "streams", "carriers", "restarts", "memory", "of"))
    for worker in workers:
        numbers = (worker.pid, worker.streams, worker.carriers, worker.restarts)
        memory = (amount(worker.arena_used_bytes), amount(worker.arena_bytes))
        table.add_row(str(worker.id), _state(worker.state), *map(str, numbers), *memory)
    return table


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
