"""What a worker reports of itself; the supervisor merges these into `forwarder status` (field names are public)."""

import msgspec


class CarrierStatus(msgspec.Struct):
    """One carrier. `state` is one of starting, connecting, up, draining, down; `kind` one of stripe, tcp (fake TCP) and
    udp."""

    id: int
    worker: int
    kind: str
    local: str
    peer: str
    state: str
    rtt_ms: float
    loss: float
    rate_bps: float
    in_flight_bytes: int
    age_s: float
    bytes_in: int
    bytes_out: int


class SessionStatus(msgspec.Struct):
    """One worker's share of a session; merged by `id` within a tunnel: lists join, counts add, carriers_wanted is the
    maximum."""

    id: str
    key_id: str
    peer: str
    carriers_up: int
    carriers_wanted: int
    reinjected_bytes: int
    duplicate_bytes: int
    resumes: int
    carriers: list[CarrierStatus]


class TunnelStatus(msgspec.Struct):
    """One worker's share of a tunnel; merged by `name`. bytes_in and bytes_out count application payload from and to
    the wire. Flows are streams or, in mode spray, conversations, which end by their duration and are never reset."""

    name: str
    mode: str
    state: str
    bytes_in: int
    bytes_out: int
    flows_open: int
    flows_total: int
    flows_reset: int
    sessions: list[SessionStatus]


class WorkerStatus(msgspec.Struct):
    """One worker. `restarts` is filled in by the supervisor."""

    id: int
    serial: int
    pid: int
    state: str
    streams: int
    conversations: int
    carriers: int
    restarts: int
    arena_used_bytes: int
    arena_bytes: int


class WorkerReport(msgspec.Struct):
    """A worker's answer to StatusRequest. `open` counts what must return to its start value when nothing is going on,
    if that was asked for."""

    worker: WorkerStatus
    tunnels: list[TunnelStatus]
    open: dict[str, int]
