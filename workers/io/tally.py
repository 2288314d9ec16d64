"""Totals of sessions and their carriers, as statistics report them. Only reads what is known: asks no kernel."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from workers.core.port_state import State
from workers.shm.totals import TunnelTotals

if TYPE_CHECKING:
    from workers.io.port_carrier import PortCarrier
    from workers.io.session import Session
    from workers.io.spray_session import SpraySession


def add_session(totals: TunnelTotals, session: "Session") -> None:
    """One worker's part of a session over stripes."""
    share, stripes = session.share, totals.kind("stripe")
    totals.bytes_in += share.bytes_in
    totals.bytes_out += share.bytes_out
    totals.flows_total += share.total_streams + share.refused_streams
    totals.flows_reset += share.reset_streams + share.refused_streams
    totals.flows_refused += share.refused_streams
    totals.flows_open += len(share.streams)
    totals.reinjected_bytes += share.reinjected_bytes
    totals.duplicate_bytes += share.duplicate_bytes
    totals.resumes += session.liveness.resumes
    totals.sessions += 1
    stripes.dialled += session.joined_stripes
    stripes.lost += session.lost_stripes
    for stripe in session.stripes.values():
        info = stripe.info
        if info is None:
            stripes.see(0, 0.0, 0)
        else:
            stripes.see(info.rtt_us, info.loss, info.unacked_bytes)


def add_spray_session(totals: TunnelTotals, session: "SpraySession") -> None:
    """One worker's part of a session over ports, those that it has lost included."""
    totals.add(session.past)
    totals.bytes_in += session.bytes_in
    totals.bytes_out += session.bytes_out
    totals.sessions += 1
    totals.drop("no_port", session.dropped)
    totals.drop("receiver", session.undelivered)
    totals.drop("exchange", session.exchange.dropped)
    totals.drop("too_large", session.too_large)
    for carrier in session.carriers.values():
        _add_records(totals, carrier)
        port = carrier.port
        if port.state in (State.UP, State.SUSPECT):
            totals.kind(carrier.wire.kind).see(port.rtt.srtt_us, port.outward.ratio, carrier.waiting_bytes)
    for carrier in session.ports.replaced:
        _add_records(totals, carrier)


def add_gone(past: TunnelTotals, carrier: "PortCarrier") -> None:
    """A port is gone: what it has counted stays."""
    past.kind(carrier.wire.kind).lost += 1
    _add_records(past, carrier)


def _add_records(totals: TunnelTotals, carrier: "PortCarrier") -> None:
    rejected, replayed = carrier.counts
    totals.records_rejected += rejected
    totals.records_replayed += replayed
    totals.unopened_bytes += carrier.refused_bytes


def add_wires(totals: TunnelTotals, wires: Iterable[Any]) -> None:
    """What the wires of each kind have counted; not every kind has everything to count."""
    for each in wires:
        totals.drop("device", each.lost)
        totals.window_waits += getattr(each, "window_waits", 0)
        totals.handshakes_unseen += getattr(each, "unseen", 0)
        totals.forgotten += getattr(each, "forgotten", 0)
