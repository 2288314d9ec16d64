"""What statistics say, in Prometheus' words: every metric, its name, its labels and its help in one place.

Tunnels are summed over the workers, those that are gone included, so the number of series does not grow with the
number of cores. Counters of a worker begin at 0 with each process in its slot, which is a reset as Prometheus knows it.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from forwarder.observer import Snapshot
from workers.shm.totals import LAG_BOUNDS_S, CarrierTotals, TunnelTotals, WorkerTotals

P = "forwarder_"

# name, help, field of TunnelTotals
TUNNEL_COUNTERS = (
    ("received_bytes", "Application payload from the wire.", "bytes_in"),
    ("sent_bytes", "Application payload to the wire.", "bytes_out"),
    ("flows", "Streams or conversations that were opened.", "flows_total"),
    ("flows_reset", "Streams that ended by a reset.", "flows_reset"),
    ("flows_refused", "Streams or conversations for which there was no room.", "flows_refused"),
    ("flows_evicted", "Conversations that were closed for newer ones.", "flows_evicted"),
    ("reinjected_bytes", "Payload that was sent again on another carrier.", "reinjected_bytes"),
    ("duplicate_bytes", "Payload that came more than once.", "duplicate_bytes"),
    ("resumes", "Sessions that went on after their last stripe had gone.", "resumes"),
    ("handshakes_refused", "Handshakes of strangers that failed at this server.", "handshakes_refused"),
    ("handshakes_unseen", "Fake TCP connections whose begin was not captured.", "handshakes_unseen"),
    ("unopened_bytes", "Bytes on ports in which no record opened.", "unopened_bytes"),
    ("ports_moved", "Ports whose client went on from another address.", "moved"),
    ("strangers_forgotten", "Addresses of strangers that were forgotten for newer ones.", "forgotten"),
    ("window_waits", "Runs on fake TCP that waited for the window of the other end.", "window_waits"),
)
TUNNEL_GAUGES = (
    ("sessions", "Sessions that this end has.", "sessions"),
    ("flows_open", "Streams or conversations that are open.", "flows_open"),
    ("strangers", "Connections and ports that have not proven a key yet.", "strangers"),
)
CARRIER_COUNTERS = (
    ("carriers_dialled", "Carriers that were dialled, or at a server accepted.", "dialled"),
    ("carriers_failed", "Dials that failed.", "failed"),
    ("carriers_lost", "Carriers that had been up and are gone, those that were replaced included.", "lost"),
)
CARRIER_GAUGES: tuple[tuple[str, str, Callable[[CarrierTotals], float]], ...] = (
    ("carriers_up", "Carriers that are up.", lambda each: each.up),
    (
        "in_flight_bytes",
        "Sent and not acknowledged (stripes), or waiting for the wire (ports).",
        lambda each: each.in_flight_bytes,
    ),
    (
        "carrier_rtt_seconds",
        "Round-trip time, the mean over the carriers.",
        lambda each: each.rtt_us / max(each.timed, 1) / 1e6,
    ),
    ("carrier_rtt_min_seconds", "The least round-trip time of a carrier.", lambda each: each.rtt_min_us / 1e6),
    ("carrier_rtt_max_seconds", "The greatest round-trip time of a carrier.", lambda each: each.rtt_max_us / 1e6),
    (
        "carrier_loss_ratio",
        "Share that was lost, or sent again, the mean over the carriers.",
        lambda each: each.loss / max(each.up, 1),
    ),
    ("carrier_loss_max_ratio", "The greatest such share of a carrier.", lambda each: each.loss_max),
)
WORKER_COUNTERS: tuple[tuple[str, str, Callable[[WorkerTotals], float]], ...] = (
    ("worker_cpu_seconds", "CPU time of the process.", lambda each: each.cpu_s),
    (
        "worker_dropped_descriptors",
        "What other workers said that made no sense.",
        lambda each: each.dropped_descriptors,
    ),
    (
        "worker_dropped_frames",
        "Frames for which there was no memory; they come again.",
        lambda each: each.dropped_frames,
    ),
)
WORKER_GAUGES: tuple[tuple[str, str, Callable[[WorkerTotals], float]], ...] = (
    ("worker_resident_bytes", "Resident memory of the process.", lambda each: each.resident_bytes),
    ("worker_shared_bytes", "The part of it that other processes may share.", lambda each: each.shared_bytes),
    ("worker_arena_used_bytes", "Payload memory in use.", lambda each: each.arena_used_bytes),
    ("worker_arena_bytes", "Payload memory that may be in use.", lambda each: each.arena_bytes),
)


class Statistics(Collector):
    """`look` gives the snapshot that a scrape reports."""

    def __init__(self, look: Callable[[], Snapshot]) -> None:
        self._look = look
        self._supervisor = 0
        self._processes = (
            ProcessCollector(namespace="forwarder_supervisor", pid=lambda: self._supervisor, registry=None),
            ProcessCollector(namespace="forwarder_metrics", registry=None),
        )

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        seen = self._look()
        yield from _instance(seen)
        yield from _workers(seen)
        yield from _tunnels(seen.tunnels)
        yield from _carriers(seen.tunnels)
        if seen.instance is not None:
            self._supervisor = seen.instance.pid
            for process in self._processes:
                yield from process.collect()


def _instance(seen: Snapshot) -> Iterator[Metric]:
    instance = seen.instance
    if instance is None:
        return
    about = {"version": instance.version, "role": instance.role}
    yield InfoMetricFamily(P + "build", "What runs here.", value=about)
    yield GaugeMetricFamily(P + "ready", "Whether every worker is up.", value=not seen.missing())
    yield GaugeMetricFamily(P + "workers_wanted", "Workers that there should be.", value=len(instance.seats))
    up = GaugeMetricFamily(P + "worker_up", "Whether the worker serves.", labels=["worker"])
    restarts = CounterMetricFamily(
        P + "worker_restarts", "Processes after the first one in that place.", labels=["worker"]
    )
    for seat in instance.seats:
        up.add_metric([str(seat.slot)], seat.state == "up")
        restarts.add_metric([str(seat.slot)], seat.restarts)
    yield from (up, restarts)


def _workers(seen: Snapshot) -> Iterator[Metric]:
    for name, text, value in WORKER_COUNTERS:
        counter = CounterMetricFamily(P + name, text, labels=["worker"])
        for each in seen.workers:
            counter.add_metric([str(each.slot)], value(each))
        yield counter
    for name, text, value in WORKER_GAUGES:
        gauge = GaugeMetricFamily(P + name, text, labels=["worker"])
        for each in seen.workers:
            gauge.add_metric([str(each.slot)], value(each))
        yield gauge
    text = "Incomplete datagrams that were given up, by reason."
    fragments = CounterMetricFamily(P + "worker_fragments_dropped", text, labels=["worker", "reason"])
    lag = HistogramMetricFamily(P + "worker_loop_lag_seconds", "How late the event loop is.", labels=["worker"])
    bounds = [*map(str, LAG_BOUNDS_S), "+Inf"]
    for each in seen.workers:
        for reason, count in each.fragments.items():
            fragments.add_metric([str(each.slot), reason], count)
        buckets = list(zip(bounds, accumulate(each.lags), strict=True))
        lag.add_metric([str(each.slot)], buckets, each.lag_sum_s)
    yield from (fragments, lag)


def _tunnels(tunnels: Iterable[TunnelTotals]) -> Iterator[Metric]:
    for name, text, field in TUNNEL_COUNTERS:
        counter = CounterMetricFamily(P + name, text, labels=["tunnel"])
        for each in tunnels:
            counter.add_metric([each.name], getattr(each, field))
        yield counter
    for name, text, field in TUNNEL_GAUGES:
        gauge = GaugeMetricFamily(P + name, text, labels=["tunnel"])
        for each in tunnels:
            gauge.add_metric([each.name], getattr(each, field))
        yield gauge
    records = CounterMetricFamily(P + "records_rejected", "Records not taken, by reason.", labels=["tunnel", "reason"])
    text = "Datagrams that were lost in this process or host, by reason."
    dropped = CounterMetricFamily(P + "datagrams_dropped", text, labels=["tunnel", "reason"])
    for each in tunnels:
        if each.mode == "spray":
            records.add_metric([each.name, "forged"], each.records_rejected)
            records.add_metric([each.name, "replayed"], each.records_replayed)
        for reason, count in each.dropped.items():
            dropped.add_metric([each.name, reason], count)
    yield from (records, dropped)


def _carriers(tunnels: Iterable[TunnelTotals]) -> Iterator[Metric]:
    labels = ["tunnel", "kind"]
    for name, text, field in CARRIER_COUNTERS:
        counter = CounterMetricFamily(P + name, text, labels=labels)
        for tunnel in tunnels:
            for each in tunnel.carriers:
                counter.add_metric([tunnel.name, each.kind], getattr(each, field))
        yield counter
    for name, text, value in CARRIER_GAUGES:
        gauge = GaugeMetricFamily(P + name, text, labels=labels)
        for tunnel in tunnels:
            for each in tunnel.carriers:
                if each.timed or not name.startswith("carrier_rtt"):
                    gauge.add_metric([tunnel.name, each.kind], value(each))
        yield gauge
    wanted = GaugeMetricFamily(P + "carriers_wanted", "Carriers that a client should have.", labels=labels)
    for tunnel in tunnels:
        for each in tunnel.carriers:
            if each.wanted:
                wanted.add_metric([tunnel.name, each.kind], each.wanted)
    yield wanted
