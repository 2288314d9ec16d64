"""The tree: one row a tunnel, below it its sessions and their carriers where they are expanded, each level in order."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from forwarder.summary import InstanceStatus, is_up, measured_bps, summarise
from forwarder.top.meters import UNKNOWN, Key, Meters, Past, Rates, carrier_key, session_key, tunnel_key
from workers.status import CarrierStatus, SessionStatus, TunnelStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line; None: this kind of row has no such figure, or it is not known. `carriers` is how many are up and
    wanted, `flows` how many are open."""

    key: Key
    name: str
    state: str
    rates: Rates
    depth: int = 0
    expandable: bool = False
    carriers: tuple[int, int] | None = None
    rtt_ms: float | None = None
    rtt_high_ms: float | None = None
    loss: float | None = None
    measured_bps: float | None = None
    in_flight_bytes: int | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None
    flows: int | None = None
    resets: int | None = None
    age_s: float | None = None
    worker: int | None = None
    peer: str = ""
    past: Past | None = None


class Order(NamedTuple):
    """`falling`: the greatest first. The value is read from a row, all rows' compare; None comes last, either way."""

    value: Callable[[Row], Any]
    falling: bool

    def sorted(self, rows: Iterable[Row]) -> list[Row]:
        """Rows of one level. Equal ones stay in the order of their names."""
        rows = sorted(rows, key=lambda row: natural_order(row.name))
        known = [row for row in rows if self.value(row) is not None]
        unknown = [row for row in rows if self.value(row) is None]
        return sorted(known, key=self.value, reverse=self.falling) + unknown


def tree(status: InstanceStatus, meters: Meters, expanded: set[Key], order: Order) -> list[Row]:
    """What is to be seen, from the first line to the last."""
    tunnels = {tunnel_key(tunnel): tunnel for tunnel in status.tunnels}
    rows: list[Row] = []
    for row in order.sorted(_tunnel_row(tunnel, meters) for tunnel in status.tunnels):
        rows.append(row)
        if row.key in expanded:
            rows.extend(_session_rows(tunnels[row.key], meters, expanded, order))
    return rows


def every_key(status: InstanceStatus) -> Iterator[Key]:
    """All that can be expanded."""
    for tunnel in status.tunnels:
        yield tunnel_key(tunnel)
        for session in tunnel.sessions:
            yield session_key(tunnel, session)


def _session_rows(tunnel: TunnelStatus, meters: Meters, expanded: set[Key], order: Order) -> Iterator[Row]:
    sessions = {session_key(tunnel, session): session for session in tunnel.sessions}
    for row in order.sorted(_session_row(tunnel, session, meters) for session in tunnel.sessions):
        yield row
        if row.key in expanded:
            session = sessions[row.key]
            yield from order.sorted(_carrier_row(tunnel, session, carrier, meters) for carrier in session.carriers)


def _tunnel_row(tunnel: TunnelStatus, meters: Meters) -> Row:
    sessions = tunnel.sessions
    summary = summarise(carrier for session in sessions for carrier in session.carriers)
    up = sum(session.carriers_up for session in sessions)
    return Row(
        key=tunnel_key(tunnel),
        name=f"{tunnel.name} {tunnel.mode}",
        state=tunnel.state,
        rates=meters.rates.get(tunnel_key(tunnel), UNKNOWN),
        expandable=bool(sessions),
        carriers=(up, sum(session.carriers_wanted for session in sessions)),
        rtt_ms=summary.rtt_ms,
        rtt_high_ms=summary.rtt_high_ms,
        loss=summary.loss,
        measured_bps=summary.measured_bps,
        bytes_in=tunnel.bytes_in,
        bytes_out=tunnel.bytes_out,
        flows=tunnel.flows_open,
        resets=tunnel.flows_reset,
        past=meters.pasts.get(tunnel.name),
    )


def _session_row(tunnel: TunnelStatus, session: SessionStatus, meters: Meters) -> Row:
    """A session has no state of its own: it has its carriers, some of them, or none."""
    summary = summarise(session.carriers)
    up, wanted = session.carriers_up, session.carriers_wanted
    return Row(
        key=session_key(tunnel, session),
        depth=1,
        name=f"{session.key_id or session.id} {session.peer}".rstrip(),
        state="up" if up and up >= wanted else "degraded" if up else "down",
        rates=meters.rates.get(session_key(tunnel, session), UNKNOWN),
        expandable=bool(session.carriers),
        carriers=(up, wanted),
        rtt_ms=summary.rtt_ms,
        rtt_high_ms=summary.rtt_high_ms,
        loss=summary.loss,
        measured_bps=summary.measured_bps,
        in_flight_bytes=sum(carrier.in_flight_bytes for carrier in session.carriers),
        bytes_in=sum(carrier.bytes_in for carrier in session.carriers),
        bytes_out=sum(carrier.bytes_out for carrier in session.carriers),
        peer=session.peer,
    )


def _carrier_row(tunnel: TunnelStatus, session: SessionStatus, carrier: CarrierStatus, meters: Meters) -> Row:
    up = is_up(carrier)
    return Row(
        key=carrier_key(tunnel, session, carrier),
        depth=2,
        name=f"{carrier.kind} {carrier.id}",
        state=carrier.state,
        rates=meters.rates.get(carrier_key(tunnel, session, carrier), UNKNOWN),
        rtt_ms=carrier.rtt_ms if up else None,
        loss=carrier.loss if up else None,
        measured_bps=measured_bps(carrier),
        in_flight_bytes=carrier.in_flight_bytes,
        bytes_in=carrier.bytes_in,
        bytes_out=carrier.bytes_out,
        age_s=carrier.age_s,
        worker=carrier.worker,
        peer=f"{carrier.local} - {carrier.peer}",
    )


def natural_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """A key to sort names by: `stripe 10` comes after `stripe 9`."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in name.split())
