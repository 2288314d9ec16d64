"""What a page of statistics says: totals since the start of what reports them, and what is there at the moment.

Encoded as msgpack arrays, fields by their place. A field is added at the end of its struct, with a default; anything
else is a new FORMAT. Counters only grow, and start at 0 with their worker; the rest is what is there now.
"""

from typing import Any

import msgspec

FORMAT = 1
LAG_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Upper bounds of the lag's histogram; behind the last one there is one more bucket."""


class CarrierTotals(msgspec.Struct, array_like=True):
    """The carriers of one kind ("stripe", "tcp" or "udp") of a tunnel.

    Counters: dialled (begun at a client, accepted at a server), failed (dials), lost (of those that were up). Now: up,
    wanted (a client's), in_flight_bytes; over those with a round-trip time their number, the sum, the least and the
    greatest; over those that are up the sum and the greatest of their loss (0 to 1).
    """

    kind: str
    dialled: int = 0
    failed: int = 0
    lost: int = 0
    up: int = 0
    wanted: int = 0
    in_flight_bytes: int = 0
    timed: int = 0
    rtt_us: int = 0
    rtt_min_us: int = 0
    rtt_max_us: int = 0
    loss: float = 0.0
    loss_max: float = 0.0

    COUNTERS = ("dialled", "failed", "lost")
    SUMS = (*COUNTERS, "up", "wanted", "in_flight_bytes", "timed", "rtt_us", "loss")

    def see(self, rtt_us: int, loss: float, in_flight_bytes: int) -> None:
        """Take in the meters of a carrier that is up; rtt_us 0: not measured yet."""
        self.up += 1
        self.in_flight_bytes += in_flight_bytes
        self.loss += loss
        self.loss_max = max(self.loss_max, loss)
        if rtt_us:
            self.timed += 1
            self.rtt_us += rtt_us
            self.rtt_min_us = min(self.rtt_min_us or rtt_us, rtt_us)
            self.rtt_max_us = max(self.rtt_max_us, rtt_us)

    def add(self, other: "CarrierTotals") -> None:
        """Take in what another reports of the same kind."""
        _add(self, other, self.SUMS)
        if other.rtt_min_us:
            self.rtt_min_us = min(self.rtt_min_us or other.rtt_min_us, other.rtt_min_us)
        self.rtt_max_us = max(self.rtt_max_us, other.rtt_max_us)
        self.loss_max = max(self.loss_max, other.loss_max)


class TunnelTotals(msgspec.Struct, array_like=True):
    """A tunnel. bytes_in and bytes_out: application payload from the wire and to the wire.

    Counters: flows: opened, of them reset; refused (no room for them), evicted (closed for newer ones). resumes:
    sessions that went on after all their stripes had gone. handshakes_refused, and unseen (whose begin the capture
    missed); records that were rejected (forged or damaged) or replayed, bytes in which no record opened; moved: ports
    whose client has a new address; forgotten: strangers; window_waits: runs that had to wait for the other end's
    window. dropped: datagrams by reason. Now: sessions (several workers have the same ones: the most that one has),
    flows_open, strangers.
    """

    name: str
    mode: str
    bytes_in: int = 0
    bytes_out: int = 0
    flows_total: int = 0
    flows_reset: int = 0
    flows_refused: int = 0
    flows_evicted: int = 0
    reinjected_bytes: int = 0
    duplicate_bytes: int = 0
    resumes: int = 0
    handshakes_refused: int = 0
    handshakes_unseen: int = 0
    records_rejected: int = 0
    records_replayed: int = 0
    unopened_bytes: int = 0
    moved: int = 0
    forgotten: int = 0
    window_waits: int = 0
    sessions: int = 0
    flows_open: int = 0
    strangers: int = 0
    dropped: dict[str, int] = {}
    carriers: list[CarrierTotals] = []

    NOW = ("sessions", "flows_open", "strangers")

    def kind(self, kind: str) -> CarrierTotals:
        """The carriers of that kind, new if need be."""
        for each in self.carriers:
            if each.kind == kind:
                return each
        self.carriers.append(CarrierTotals(kind))
        return self.carriers[-1]

    def drop(self, reason: str, count: int) -> None:
        """Count datagrams that were lost here."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def add(self, other: "TunnelTotals") -> None:
        """Take in what another reports of the same tunnel."""
        sessions = max(self.sessions, other.sessions)
        _add(self, other, _TUNNEL_NUMBERS)
        self.sessions = sessions
        for reason, count in other.dropped.items():
            self.drop(reason, count)
        for each in other.carriers:
            self.kind(each.kind).add(each)

    def past(self) -> "TunnelTotals":
        """The counters alone, as they stay when who reported them is gone."""
        past = TunnelTotals(self.name, self.mode)
        past.add(self)
        for name in self.NOW:
            setattr(past, name, 0)
        past.carriers = [
            CarrierTotals(each.kind, *(getattr(each, name) for name in each.COUNTERS)) for each in self.carriers
        ]
        return past


_TUNNEL_NUMBERS = tuple(
    name for name in TunnelTotals.__struct_fields__ if name not in {"name", "mode", "dropped", "carriers"}
)


class WorkerTotals(msgspec.Struct, array_like=True):
    """A worker: who it is, its process, and its share of every tunnel.

    at_s: monotonic time of this report; every_s: when the next one follows. lags: how often the event loop came late to
    a timer, by LAG_BOUNDS_S, and the sum. shared_bytes: the part of resident_bytes that other processes may map too.
    fragments: incomplete datagrams that were dropped, by reason.
    """

    format: int
    slot: int
    serial: int
    pid: int
    state: str
    at_s: float
    every_s: float
    cpu_s: float
    resident_bytes: int
    shared_bytes: int
    arena_used_bytes: int
    arena_bytes: int
    lags: list[int]
    lag_sum_s: float
    dropped_descriptors: int
    dropped_frames: int
    fragments: dict[str, int]
    tunnels: list[TunnelTotals]


class Seat(msgspec.Struct, array_like=True, frozen=True):
    """A worker's place as the supervisor sees it; `state` is a state word of `forwarder status`."""

    slot: int
    state: str
    restarts: int


class InstanceTotals(msgspec.Struct, array_like=True):
    """The instance as the supervisor sees it.

    at_s, started_s: monotonic times of this report and of the start. tunnels: name and mode of each that is configured
    and has a name of its own in the pages.
    """

    format: int
    role: str
    version: str
    pid: int
    state: str
    at_s: float
    started_s: float
    seats: list[Seat]
    tunnels: list[tuple[str, str]]


class PastTotals(msgspec.Struct, array_like=True):
    """What workers that are gone have counted. folded: slot -> serial of the last one of that slot in here."""

    format: int
    folded: dict[int, int]
    tunnels: list[TunnelTotals]


def add_by_name(tunnels: dict[str, TunnelTotals], share: TunnelTotals) -> None:
    """Take in a share of a tunnel."""
    whole = tunnels.get(share.name)
    if whole is None:
        whole = tunnels[share.name] = TunnelTotals(share.name, share.mode)
    whole.add(share)


def _add(whole: Any, share: Any, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(whole, name, getattr(whole, name) + getattr(share, name))
