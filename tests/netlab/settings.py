"""What a link does to packets. Rates count Ethernet frames without preamble and FCS: 1514 bytes a full segment of
1448 bytes payload, so a TCP connection reaches at most 0.956 of the rate."""

from collections.abc import Iterator
from dataclasses import dataclass

Pair = float | tuple[float, float]
Direction = str
"""`up` (client to server), `down` or `both`."""

WAYS: dict[Direction, tuple[int, ...]] = {"up": (0,), "down": (1,), "both": (0, 1)}
_FULL_FRAME = 1514


@dataclass(frozen=True, slots=True)
class Link:
    """One direction, shared by all connections. Probabilities 0..1; chance never hits ARP and neighbour discovery."""

    delay_ms: float = 0.0
    loss: float = 0.0
    reorder: float = 0.0
    """Probability that a packet is held back by `reorder_ms`, so that later ones overtake it."""
    reorder_ms: float = 5.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    """Probability that one byte of the TCP or UDP part is changed: the receiver's checksum must fail."""
    rate_bps: float = 0.0
    """0: unlimited."""
    queue_ms: float = 50.0
    """How much may wait for the rate, as time at that rate; or `queue_bytes`, unless 0."""
    queue_bytes: int = 0

    def commands(self, way: int) -> Iterator[str]:
        queue = self.queue_bytes or self.rate_bps / 8e3 * self.queue_ms
        yield (
            f"link {way} delay={self.delay_ms * 1e6} reorder_delay={self.reorder_ms * 1e6} loss={self.loss} "
            f"reorder={self.reorder} duplicate={self.duplicate} corrupt={self.corrupt} rate={self.rate_bps} "
            f"queue={queue}"
        )


@dataclass(frozen=True, slots=True)
class Connection:
    """The limits of each connection that this rule takes. A pair is (up, down), one value is for both.

    A rule with a `port` takes connections with that port at either end, the other rules take the others. Several rules
    for the same connections are dealt out in turn, in order of first appearance, starting again after the last.
    """

    rate_bps: Pair = 0.0
    police: bool = False
    """Drop above the rate (a token bucket of `burst_ms` at the rate, at least two frames), rather than queue."""
    queue_ms: Pair = 100.0
    burst_ms: Pair = 20.0
    delay_ms: Pair | None = None
    """Instead of the link's."""
    loss: Pair | None = None
    """Instead of the link's."""
    port: int = 0

    def commands(self, target: str) -> Iterator[str]:
        """`target`: `rule N` or `flow N`."""
        for way in (0, 1):
            rate = _of(self.rate_bps, way)
            burst = max(rate / 8e3 * _of(self.burst_ms, way), 2 * _FULL_FRAME)
            delay = -1 if self.delay_ms is None else _of(self.delay_ms, way) * 1e6
            loss = -1 if self.loss is None else _of(self.loss, way)
            yield (
                f"limit {target} {way} rate={rate} police={int(self.police)} burst={burst} "
                f"queue={rate / 8e3 * _of(self.queue_ms, way)} delay={delay} loss={loss}"
            )


def _of(value: Pair, way: int) -> float:
    return value[way] if isinstance(value, tuple) else value
