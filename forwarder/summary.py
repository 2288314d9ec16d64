"""What an instance answers to `status`, and what a session's carriers come to when there are too many to list."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from forwarder.errors import WrongUsage
from workers.status import CarrierStatus, SessionStatus, TunnelStatus, WorkerStatus

LOSS_NOTED = 0.01
LOSS_BAD = 0.05
SLOW_TIMES = 2.0
SLOW_MS = 20.0
FOUNDED_BYTES = 100_000
"""What a carrier must have sent before its rate is more than a guess from its first few segments."""


class InstanceStatus(msgspec.Struct):
    """The answer to `status`; keys beyond these are ignored, so that another version's answer can be shown."""

    role: str
    version: str
    pid: int
    uptime_s: float
    workers: list[WorkerStatus]
    tunnels: list[TunnelStatus]


@dataclass(frozen=True, slots=True)
class Summary:
    """Carriers taken together. The figures are of those that are up, None if there is none; `measured_bps` is what
    they are measured to carry together, None if none is measured."""

    rtt_ms: float | None
    rtt_high_ms: float | None
    loss: float | None
    measured_bps: float | None


def read_answer(answer: dict[str, Any]) -> InstanceStatus:
    """Raises msgspec.ValidationError if it is none."""
    return msgspec.convert(answer, InstanceStatus)


def keep_tunnel(answer: dict[str, Any], name: str) -> dict[str, Any]:
    """The answer with this tunnel alone. Raises WrongUsage if there is none of that name."""
    tunnels = answer.get("tunnels", [])
    kept = [tunnel for tunnel in tunnels if tunnel["name"] == name]
    if not kept:
        raise WrongUsage(f"--tunnel: expected one of {', '.join(each['name'] for each in tunnels)}, found {name}")
    return answer | {"tunnels": kept}


def summarise(carriers: Iterable[CarrierStatus]) -> Summary:
    """The median and the 95th percentile of the round trip, the mean loss, the sum of what they carry."""
    up = [carrier for carrier in carriers if is_up(carrier)]
    if not up:
        return Summary(None, None, None, None)
    trips = sorted(carrier.rtt_ms for carrier in up)
    loss = sum(carrier.loss for carrier in up) / len(up)
    measured = [bps for carrier in up if (bps := measured_bps(carrier)) is not None]
    return Summary(_rank(trips, 50), _rank(trips, 95), loss, sum(measured) if measured else None)


def is_up(carrier: CarrierStatus) -> bool:
    """Whether it counts as up: one that is degraded still carries something."""
    return carrier.state in ("up", "degraded")


def measured_bps(carrier: CarrierStatus) -> float | None:
    """What the carrier was last measured to send, None if it has not sent enough for that, or not for long."""
    return carrier.rate_bps if carrier.rate_bps >= 1 and carrier.bytes_out >= FOUNDED_BYTES else None


def _rank(values: Sequence[float], percentile: int) -> float:
    """Nearest rank; `values` are sorted, and not empty."""
    return values[-(-len(values) * percentile // 100) - 1]


def noticeable(session: SessionStatus) -> list[CarrierStatus]:
    """Carriers that an operator should look at, the worst first: not up, losing, or much slower than the others."""
    usual_ms = summarise(session.carriers).rtt_ms or 0.0
    noted = [carrier for carrier in session.carriers if _is_noticeable(carrier, usual_ms)]
    return sorted(noted, key=lambda carrier: (carrier.state == "up", -carrier.loss, -carrier.rtt_ms))


def _is_noticeable(carrier: CarrierStatus, usual_ms: float) -> bool:
    slow = carrier.rtt_ms > max(SLOW_TIMES * usual_ms, usual_ms + SLOW_MS)
    return carrier.state != "up" or carrier.loss >= LOSS_NOTED or slow
