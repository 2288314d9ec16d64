"""Room for small frames where bulk fills the network: the pacing of the stripes that carry it, in one worker.

1. The other workers learn what is sent here, small frames or bulk (TRAFFIC): it may take the same path.
2. While there is both, somewhere, and small frames here, some stripes that these take are asked (PING): how long the
   answer takes shows whether bulk's queue is theirs, too. Where each connection has a queue of its own, there is
   nothing to gain. (The kernel's round trip of a stripe with little to send is of little use: delayed ACKs are in it,
   10 to 25 ms.)
3. While there is both, and bulk here, what each stripe delivers is measured.
4. `workers.core.shaping` finds the limit for all of them, and each gets its part as SO_MAX_PACING_RATE. Stripes kept
   for small frames get none.
"""

import logging
from itertools import islice

from workers.core.shaping import INTERVAL_US, NEWEST, Queues, Shaper
from workers.io.exchange import Exchange
from workers.io.lineup import FAR_US, TOGETHER_US, Lineup, is_stalled
from workers.io.liveness import ping
from workers.io.stripe import Stripe

PROBED = 3
"""Stripes asked in an interval: the soonest answer counts. Beside 500 Mbit/s an event loop is 6 to 30 ms late in one to
three of a hundred turns."""
LEAST_SHARE = 0.25
"""Of the mean: a stripe gets so much of the limit whatever it delivered, to be able to deliver more."""
LEAST_BPS = 2 * 1448 * 8 * 10
"""And no less than two segments in 100 ms: a longer wait in the kernel would outlive the limit."""
HOLD_US = 5_000_000
"""A limit outlives the last small frame by so much: people and programs ask in bursts."""

log = logging.getLogger("forwarder.session")


class Delivery:
    """What one stripe delivers: `acked_bytes` in all, and bits a second."""

    __slots__ = ("acked_bytes", "latest_bps", "smoothed_bps")

    def __init__(self, acked_bytes: int) -> None:
        self.acked_bytes = acked_bytes
        self.latest_bps = self.smoothed_bps = 0.0

    def measure(self, acked_bytes: int, elapsed_us: int) -> None:
        """So many bytes in all were acknowledged by now, `elapsed_us` after the measurement before."""
        self.latest_bps = (acked_bytes - self.acked_bytes) * 8e6 / elapsed_us
        self.acked_bytes = acked_bytes
        weight = NEWEST if self.smoothed_bps else 1.0
        self.smoothed_bps += weight * (self.latest_bps - self.smoothed_bps)


class Shaping:
    """`stripes` are this worker's, by index; they belong to the session."""

    def __init__(self, tunnel_name: str, stripes: dict[int, Stripe], exchange: Exchange, lineup: Lineup) -> None:
        self._tunnel_name = tunnel_name
        self._stripes = stripes
        self._exchange = exchange
        self._lineup = lineup
        self._shaper = Shaper()
        self._measured_us = 0
        self._deliveries: dict[Stripe, Delivery] = {}
        self._asked: list[Stripe] = []
        self._small_us: int | None = None

    def on_pong(self, stripe: Stripe, trip_us: int) -> None:
        """A PING was answered after so long."""
        if stripe in self._asked and stripe.least_rtt_us:
            queue_us = max(trip_us - stripe.least_rtt_us, 0)
            self._small_us = queue_us if self._small_us is None else min(self._small_us, queue_us)

    def on_time(self, now_us: int) -> None:
        """Every 100 ms, after the stripes' meters were read."""
        elapsed_us = now_us - self._measured_us
        if elapsed_us < INTERVAL_US:
            return
        self._measured_us = now_us
        lately_us = now_us - TOGETHER_US
        is_light, is_heavy = self._lineup.light_us > lately_us, self._lineup.heavy_us > lately_us
        small_us, self._small_us = self._small_us, None
        self._asked.clear()
        if is_light or is_heavy:
            self._exchange.tell_traffic(is_light, is_heavy, small_us)
        if is_light and (is_heavy or self._exchange.heavy_us > lately_us):
            self._ask(is_heavy, now_us)
        former_bps = self._shaper.limit_bps
        since_us = now_us - HOLD_US if former_bps else lately_us
        if is_heavy and max(self._lineup.light_us, self._exchange.light_us) > since_us:
            self._measure(elapsed_us)
            is_told = not is_light and self._exchange.light_us > lately_us
            self._limit(now_us, self._exchange.small_us if is_told else small_us)
        else:
            self._deliveries.clear()
            self._shaper.release()
        if former_bps and not self._shaper.limit_bps:
            for stripe in list(self._stripes.values()):
                stripe.limit(0)
        if bool(former_bps) != bool(self._shaper.limit_bps):
            log.debug("bulk limit tunnel=%s bps=%.0f", self._tunnel_name, self._shaper.limit_bps)

    def _ask(self, is_heavy: bool, now_us: int) -> None:
        likely = self._lineup.express if is_heavy else self._stripes.values()
        self._asked.extend(islice((each for each in likely if not is_stalled(each)), PROBED))
        for stripe in self._asked:
            if not stripe.pinged_us:
                ping(stripe, now_us)

    def _measure(self, elapsed_us: int) -> None:
        former, self._deliveries = self._deliveries, {}
        for stripe in self._stripes.values():
            if stripe.info is not None:
                delivery = self._deliveries[stripe] = former.get(stripe) or Delivery(stripe.info.acked_bytes)
                if stripe in former:
                    delivery.measure(stripe.info.acked_bytes, elapsed_us)

    def _limit(self, now_us: int, small_us: int | None) -> None:
        express = self._lineup.express
        bulk = {
            stripe: delivery
            for stripe, delivery in self._deliveries.items()
            if stripe not in express and not is_stalled(stripe)
        }
        smoothed_bps = sum(each.smoothed_bps for each in bulk.values())
        queues = _queues(bulk, smoothed_bps, small_us) if smoothed_bps else None
        if queues is None or queues.shortest_us < FAR_US:  # nearer, a busy processor looks like a queue
            self._shaper.release()
            return
        latest_bps = sum(each.latest_bps for each in bulk.values())
        self._shaper.on_interval(now_us, smoothed_bps, latest_bps, queues)
        if self._shaper.limit_bps:
            least_bps = LEAST_SHARE * smoothed_bps / len(bulk)
            parts = {stripe: max(delivery.smoothed_bps, least_bps) for stripe, delivery in bulk.items()}
            whole_bps = sum(parts.values())
            for stripe, part_bps in parts.items():
                stripe.limit(max(self._shaper.limit_bps * part_bps / whole_bps, LEAST_BPS))
            for stripe in list(express):
                stripe.limit(0)


def _queues(bulk: dict[Stripe, Delivery], smoothed_bps: float, small_us: int | None) -> Queues:
    """Bulk's are averages by what the stripes deliver, together `smoothed_bps`."""
    trip_us = sum(each.smoothed_bps * stripe.rtt_us for stripe, each in bulk.items()) / smoothed_bps
    shortest_us = sum(each.smoothed_bps * stripe.least_rtt_us for stripe, each in bulk.items()) / smoothed_bps
    return Queues(trip_us - shortest_us, small_us, shortest_us)
