"""Rates: what was carried between two answers, for each carrier, tunnel and the instance, and what it was before."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from forwarder.summary import InstanceStatus
from workers.status import CarrierStatus, SessionStatus, TunnelStatus

PAST = 600
"""Answers that are remembered for the throughput lines: 10 minutes of one a second, more than a terminal is wide."""
LATE_TIMES = 5.0
"""A carrier that seems to have aged more than so many times the time between the answers is another one."""

Key = tuple[str | int, ...]
"""Names a tunnel (1 part), a session of it (2) or a carrier of that (4: and worker, carrier)."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Bits a second from the wire and to the wire; None: not known yet."""

    in_bps: float | None = None
    out_bps: float | None = None


@dataclass(slots=True)
class Past:
    """The rates of the last answers, the latest last; None: there was no answer."""

    ins: deque[float | None] = field(default_factory=lambda: deque(maxlen=PAST))
    outs: deque[float | None] = field(default_factory=lambda: deque(maxlen=PAST))

    def add(self, rates: Rates) -> None:
        self.ins.append(rates.in_bps)
        self.outs.append(rates.out_bps)


UNKNOWN = Rates()


class Meters:
    """Takes every answer, in order."""

    def __init__(self) -> None:
        self.rates: dict[Key, Rates] = {}
        self.total = UNKNOWN
        self.past = Past()
        self.pasts: dict[str, Past] = {}
        self._counts: dict[Key, tuple[int, int]] = {}
        self._ages_s: dict[Key, float] = {}
        self._before: tuple[int, float] | None = None

    def on_answer(self, status: InstanceStatus) -> None:
        """The time between two answers is the instance's own: what delays an answer on its way changes no rate."""
        elapsed_s = self._elapsed_s(status)
        self._before = (status.pid, status.uptime_s)
        carriers = dict(_carriers(status))
        counts = {key: (carrier.bytes_in, carrier.bytes_out) for key, carrier in carriers.items()}
        counts |= {tunnel_key(tunnel): (tunnel.bytes_in, tunnel.bytes_out) for tunnel in status.tunnels}
        elapsed = self._elapsed_of_each(carriers, elapsed_s) if elapsed_s is not None else {}
        self.rates = {
            key: _rates(self._counts.get(key), now, elapsed.get(key, elapsed_s)) for key, now in counts.items()
        }
        for key, carrier in carriers.items():
            if key not in self._counts and elapsed_s and 0 < carrier.age_s <= elapsed_s:
                self.rates[key] = _rates((0, 0), counts[key], elapsed_s)
        self._counts = counts
        self._ages_s = {key: carrier.age_s for key, carrier in carriers.items()}
        self._sum_up(status, known=elapsed_s is not None)

    def on_silence(self) -> None:
        """The instance did not answer: there is no rate, and what it answers next is a new beginning."""
        self._before, self._counts, self._ages_s, self.rates = None, {}, {}, {}
        self.total = UNKNOWN
        for past in (self.past, *self.pasts.values()):
            past.add(UNKNOWN)

    def _elapsed_s(self, status: InstanceStatus) -> float | None:
        """Since the answer before; None if there was none, or another instance gave it."""
        if self._before is None:
            return None
        pid, uptime_s = self._before
        elapsed_s = status.uptime_s - uptime_s
        return elapsed_s if pid == status.pid and elapsed_s > 0 else None

    def _elapsed_of_each(self, carriers: dict[Key, CarrierStatus], elapsed_s: float) -> dict[Key, float]:
        """How much older each carrier has become is the time between its worker's two looks at it, which on a busy
        machine is not the one between the answers; a tunnel's is the mean of its carriers'. Without either: that."""
        elapsed: dict[Key, float] = {}
        of_tunnels: dict[Key, list[float]] = {}
        for key, carrier in carriers.items():
            older_s = carrier.age_s - self._ages_s.get(key, carrier.age_s)
            if 0 < older_s < LATE_TIMES * elapsed_s:
                elapsed[key] = older_s
                of_tunnels.setdefault(key[:1], []).append(older_s)
        return elapsed | {key: sum(times) / len(times) for key, times in of_tunnels.items()}

    def _sum_up(self, status: InstanceStatus, known: bool) -> None:
        """Sessions come from their carriers, the instance from its tunnels."""
        names = [tunnel.name for tunnel in status.tunnels]
        for tunnel in status.tunnels:
            for session in tunnel.sessions:
                parts = [self.rates[carrier_key(tunnel, session, carrier)] for carrier in session.carriers]
                self.rates[session_key(tunnel, session)] = _sum(parts, known)
        self.total = _sum([self.rates[(name,)] for name in names], known)
        self.past.add(self.total)
        self.pasts = {name: self.pasts.get(name) or Past() for name in names}
        for name in names:
            self.pasts[name].add(self.rates[(name,)])


def tunnel_key(tunnel: TunnelStatus) -> Key:
    return (tunnel.name,)


def session_key(tunnel: TunnelStatus, session: SessionStatus) -> Key:
    return (tunnel.name, session.id)


def carrier_key(tunnel: TunnelStatus, session: SessionStatus, carrier: CarrierStatus) -> Key:
    return (tunnel.name, session.id, carrier.worker, carrier.id)


def _carriers(status: InstanceStatus) -> Iterator[tuple[Key, CarrierStatus]]:
    for tunnel in status.tunnels:
        for session in tunnel.sessions:
            for carrier in session.carriers:
                yield carrier_key(tunnel, session, carrier), carrier


def _rates(before: tuple[int, int] | None, now: tuple[int, int], elapsed_s: float | None) -> Rates:
    """A count that fell began anew, with another carrier or another worker."""
    if before is None or elapsed_s is None or now[0] < before[0] or now[1] < before[1]:
        return UNKNOWN
    factor = 8 / elapsed_s
    return Rates((now[0] - before[0]) * factor, (now[1] - before[1]) * factor)


def _sum(parts: list[Rates], known: bool) -> Rates:
    """What is not known counts as nothing, unless nothing is known at all."""
    if not known:
        return UNKNOWN
    return Rates(sum(part.in_bps or 0.0 for part in parts), sum(part.out_bps or 0.0 for part in parts))
