"""Answers of an instance that there is none of: tunnels, sessions and carriers, with what they have carried."""

from forwarder.summary import InstanceStatus
from workers.status import CarrierStatus, SessionStatus, TunnelStatus, WorkerStatus


def carrier(number: int, *, worker: int = 0, counts: tuple[int, int] = (0, 0), age_s: float = 60.0,
            state: str = "up", rtt_ms: float = 10.0, loss: float = 0.0) -> CarrierStatus:  # fmt: skip
    return CarrierStatus(
        id=number,
        worker=worker,
        kind="stripe",
        local=f"10.0.0.1:{40000 + number}",
        peer="10.0.0.2:9000",
        state=state,
        rtt_ms=rtt_ms,
        loss=loss,
        rate_bps=10e6,
        in_flight_bytes=100,
        age_s=age_s,
        bytes_in=counts[0],
        bytes_out=counts[1],
    )


def session(id_: str, *carriers: CarrierStatus, key_id: str = "laptop") -> SessionStatus:
    up = sum(each.state == "up" for each in carriers)
    return SessionStatus(id_, key_id, "10.0.0.2:9000", up, len(carriers), 0, 0, 0, list(carriers))


def tunnel(
    name: str, *sessions: SessionStatus, counts: tuple[int, int] = (0, 0), state: str = "up", open_: int = 1
) -> TunnelStatus:
    return TunnelStatus(name, "stripe", state, counts[0], counts[1], open_, 9, 2, list(sessions))


def instance(uptime_s: float, *tunnels: TunnelStatus, pid: int = 4242, restarts: int = 0) -> InstanceStatus:
    worker = WorkerStatus(0, 1, 4243, "up", 0, 0, 0, restarts, 0, 1 << 20)
    return InstanceStatus("client", "1.2.3", pid, uptime_s, [worker], list(tunnels))
