"""Round-trip time estimation and retransmission timeout (RFC 6298, in whole microseconds)."""

MIN_RTO_US = 300_000
"""On top of two round trips: TCP's own timeout (200 ms and one round trip) gets the first chance to mend a loss."""
MAX_RTO_US = 10_000_000
INITIAL_RTO_US = 1_000_000


class RttEstimator:
    """Smoothed round-trip time. `srtt_us` is 0 before the first sample."""

    __slots__ = ("rttvar_us", "srtt_us")

    def __init__(self) -> None:
        self.srtt_us = 0
        self.rttvar_us = 0

    def on_sample(self, rtt_us: int) -> None:
        """Take a measured round trip of `rtt_us` > 0 (RFC 6298, 2.2 and 2.3)."""
        if not self.srtt_us:
            self.srtt_us = rtt_us
            self.rttvar_us = rtt_us // 2
            return
        self.rttvar_us += (abs(self.srtt_us - rtt_us) - self.rttvar_us) >> 2
        self.srtt_us += (rtt_us - self.srtt_us) >> 3

    @property
    def rto_us(self) -> int:
        """How long a frame may stay unanswered before it counts as stalled."""
        if not self.srtt_us:
            return INITIAL_RTO_US
        return min(max(self.srtt_us + 4 * self.rttvar_us, 2 * self.srtt_us + MIN_RTO_US), MAX_RTO_US)
