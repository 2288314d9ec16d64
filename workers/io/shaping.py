"""Room for small frames where bulk fills the network: the pacing of the stripes that carry it, in one worker.

1. The other workers learn what is sent here, small frames or bulk (TRAFFIC): it may take the same path.
2. While there is both, somewhere, and small frames here, some stripes that these take are asked (PING): how long the
   answer takes shows whether bulk's queue is theirs, too. Where each connection has a queue of its own, there is
   nothing to gain. (The kernel's round trip of a stripe with little to send is of little use: delayed ACKs are in it,
   10 to 25 ms.)
3. While there is bulk here, what each stripe delivers is measured.
4. While there is both, `workers.core.shaping` finds the limit for all stripes with bulk, and each gets its part as
   SO_MAX_PACING_RATE.
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
MEASURED = 3
"""So many measurements in a row come before a limit: TCP starts slowly."""
LIGHT_INTERVALS = 2
"""In so many there have to be small frames, with no longer pause than TOGETHER_US: a transfer's first bytes count as
small, too."""
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
        self._measured_us = self._measured = self._light_intervals = 0
        self._deliveries: dict[Stripe, Delivery] = {}
        self._asked: list[Stripe] = []
        self._small_us: int | None = None
        self._held_until_us = 0

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
        asks, is_heavy = self._lineup.light_us > lately_us, self._lineup.heavy_us > lately_us
        self._light_intervals += self._lineup.light_us > now_us - elapsed_us
        self._light_intervals *= asks
        is_light = self._light_intervals >= LIGHT_INTERVALS
        small_us, self._small_us = self._small_us, None
        if is_light or is_heavy:
            self._exchange.tell_traffic(is_light, is_heavy, small_us)
        self._asked.clear()
        if asks and (is_heavy or self._exchange.heavy_us > lately_us):
            self._ask(is_heavy, now_us)
        self._measure(is_heavy, elapsed_us)
        is_told = self._exchange.light_us > lately_us
        self._limit(now_us, is_light or is_told, self._exchange.small_us if is_told and not is_light else small_us)

    def _ask(self, is_heavy: bool, now_us: int) -> None:
        likely = self._lineup.express if is_heavy else self._stripes.values()
        self._asked.extend(islice((each for each in likely if not is_stalled(each)), PROBED))
        for stripe in self._asked:
            if not stripe.pinged_us:
                ping(stripe, now_us)

    def _measure(self, is_heavy: bool, elapsed_us: int) -> None:
        """Nearer stripes do not count: a busy processor looks like a queue there."""
        former, self._deliveries = self._deliveries, {}
        self._measured = self._measured + 1 if former and is_heavy else 0
        for stripe in self._stripes.values() if is_heavy else ():
            if stripe.info is not None and stripe.least_rtt_us >= FAR_US:
                delivery = self._deliveries[stripe] = former.get(stripe) or Delivery(stripe.info.acked_bytes)
                if stripe in former:
                    delivery.measure(stripe.info.acked_bytes, elapsed_us)

    def _limit(self, now_us: int, is_light: bool, small_us: int | None) -> None:
        """Stripes kept for small frames had bulk until now: what they delivered is of the path, too."""
        known = {stripe: delivery for stripe, delivery in self._deliveries.items() if not is_stalled(stripe)}
        bulk = {stripe: delivery for stripe, delivery in known.items() if stripe not in self._lineup.express}
        shaper, former_bps = self._shaper, self._shaper.limit_bps
        if is_light:
            self._held_until_us = now_us + HOLD_US
        bulk_bps = sum(each.smoothed_bps for each in bulk.values())
        if not bulk_bps or not (is_light or (former_bps and now_us < self._held_until_us)):
            shaper.release()
        elif self._measured >= MEASURED:
            smoothed_bps = sum(each.smoothed_bps for each in known.values())
            latest_bps = sum(each.latest_bps for each in known.values())
            shaper.on_interval(now_us, smoothed_bps, latest_bps, _queues(bulk, bulk_bps, small_us))
        if shaper.limit_bps:
            self._share_out(bulk, bulk_bps)
        elif former_bps:
            for stripe in self._stripes.values():
                stripe.limit(0)
        if bool(former_bps) != bool(shaper.limit_bps):
            log.debug("bulk limit tunnel=%s bps=%.0f", self._tunnel_name, shaper.limit_bps)

    def _share_out(self, bulk: dict[Stripe, Delivery], bulk_bps: float) -> None:
        least_bps = LEAST_SHARE * bulk_bps / len(bulk)
        parts = {stripe: max(delivery.smoothed_bps, least_bps) for stripe, delivery in bulk.items()}
        whole_bps = sum(parts.values())
        for stripe, part_bps in parts.items():
            stripe.limit(max(self._shaper.limit_bps * part_bps / whole_bps, LEAST_BPS))
        for stripe in self._lineup.express:
            stripe.limit(0)


def _queues(bulk: dict[Stripe, Delivery], bulk_bps: float, small_us: int | None) -> Queues:
    """Bulk's are averages by what the stripes deliver, together `bulk_bps`."""
    trip_us = sum(each.smoothed_bps * stripe.rtt_us for stripe, each in bulk.items()) / bulk_bps
    shortest_us = sum(each.smoothed_bps * stripe.least_rtt_us for stripe, each in bulk.items()) / bulk_bps
    return Queues(trip_us - shortest_us, small_us, shortest_us)
