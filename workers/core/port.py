"""The health of one port: whether it may get data, when it is probed, when it is given up and dialled again. Sans-IO.

1. A port is UP once the handshake has succeeded. A PING goes with its data every METER_US: the PONG tells the round
   trip and what was lost. Without traffic it is pinged every `keepalive_us`.
2. Doubts make it SUSPECT: it gets no data and is probed, QUICK_PROBES times every QUICK_US and then every SLOW_US.
   - Late: a PING is unanswered and nothing has come since, or two are. Any PONG ends that.
   - Reset: a RST, FIN or ICMP error came. A PONG to a later PING shows that it was forged; without one it dies.
   - Lossy: `suspend`, by who can compare it with others. It ends after a while, when PONGS_IN_A_ROW came.
3. It is DEAD when nothing was answered for DEAD_US while it was pinged. A client dials it again; a server's port goes.

Both ends run this, each for its own direction of sending. Times are whole microseconds of any monotonic clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from workers.core.deadlines import Watched
from workers.core.loss_meter import LossMeter
from workers.core.path_mtu import BASE, NEVER_US, PathMtu
from workers.core.port_state import Input, State, Step, next_state
from workers.core.rtt import RttEstimator
from workers.core.standing import TRUST_LATE, TRUST_LOSSY, Standing

PING_BYTES = 2 + 8 + 9 + 16
"""A whole PING record without padding."""
METER_US = 200_000
PING_SPACING_US = 500
"""The ports of a worker together send at most one PING with data in this time."""
QUICK_US, QUICK_PROBES, SLOW_US = 150_000, 3, 500_000
LATE_US, LATE_FIRST_US, LATE_MAX_US = 100_000, 500_000, 5_000_000
"""When a PING is late: so long after the round trip at the least, before one was measured, and at the most."""
DEAD_US, DEAD_PINGS = 1_500_000, 3
"""Both: a machine that was paused has had no chance to read the answers."""
DIAL_US = 5_000_000
PONGS_IN_A_ROW = 8
"""A port of 30 % loss brings them with a chance of 6 %, and one of 30 % both ways of 0.3 %."""
LOSSY_US = 250_000
DEAF_US = 10_000_000
"""So long after a forged RST others only cause a PING: whoever forges them must not keep a port suspended."""
TROUBLE_RECORDS, TROUBLE_RATIO = 8, 0.5
"""So much loss while PINGs are answered may be a black hole for the current record size."""
QUANTUM_FIRST = 16 << 10
"""What a port gets in one run before its owner says how much."""


@dataclass(frozen=True, slots=True)
class PortSettings:
    """What all ports of a worker have in common.

    most_bytes: the largest record that the own link lets through. rotate_us: 0 for never. ports: how many there are.
    """

    most_bytes: int
    base_bytes: int = BASE
    keepalive_us: int = 10_000_000
    rotate_us: int = 0
    ports: int = 1


class Port(Watched):
    """One port. `accepted`: it is the server's end. `jitter` gives numbers from 0.5 to 1.

    deadline_us: `on_time` has nothing to do before. `outward`, `inward`: the loss of either direction.
    `tag`, `cost`, `serial`, `quantum_bytes`, `rate_bps`, `rated_bytes` and `rated_us` are kept by `port_choice`.
    """

    __slots__ = (
        "_deaf_until_us",
        "_expires_us",
        "_has_sent",
        "_is_late",
        "_jitter",
        "_keepalive_us",
        "_last_ping_us",
        "_lossy_until_us",
        "_meter_us",
        "_pings",
        "_pongs_in_a_row",
        "_probes",
        "_reset_us",
        "_rotate_us",
        "_was_busy",
        "accepted",
        "cost",
        "forged_resets",
        "highest",
        "index",
        "inward",
        "last_received_us",
        "mtu",
        "outward",
        "quantum_bytes",
        "rate_bps",
        "rated_bytes",
        "rated_us",
        "received_bytes",
        "received_records",
        "rtt",
        "sent_bytes",
        "sent_records",
        "serial",
        "standing",
        "state",
        "tag",
        "up_us",
    )

    def __init__(
        self,
        index: int,
        settings: PortSettings,
        now_us: int,
        jitter: Callable[[], float],
        *,
        accepted: bool = False,
        standing: Standing | None = None,
    ) -> None:
        """A client's port starts DEAD and wants to be dialled at once, a server's starts UP: it has proven itself.
        standing: of the port of this index that this one takes the place of."""
        super().__init__(now_us)
        self.index, self.accepted = index, accepted
        self._jitter, self._rotate_us = jitter, settings.rotate_us
        self._meter_us = max(METER_US, settings.ports * PING_SPACING_US)
        # The client pings first: a PING that comes saves the server its own.
        self._keepalive_us = settings.keepalive_us * 3 // 2 if accepted else settings.keepalive_us
        self.standing = standing or Standing(jitter)
        self.mtu = PathMtu(settings.most_bytes, settings.base_bytes)
        self.sent_records = self.sent_bytes = self.received_bytes = self.forged_resets = 0
        self.tag, self.cost, self.serial, self.rated_us = 0.0, 1.0, 0, now_us
        self.quantum_bytes, self.rate_bps, self.rated_bytes = QUANTUM_FIRST, 0.0, 0
        self._begin(now_us)
        self.state = State.DIALLING if accepted else State.DEAD
        if accepted:
            self.on_established(now_us)

    def _begin(self, now_us: int) -> None:
        """What is new with each connection: keys and counters, and so the meters."""
        self.rtt, self.outward, self.inward = RttEstimator(), LossMeter(), LossMeter()
        self.received_records, self.highest = 0, -1
        self._pings: dict[int, None] = {}
        self._probes = self._pongs_in_a_row = 0
        self._has_sent = self._was_busy = self._is_late = False
        self._reset_us = self._lossy_until_us = self._deaf_until_us = 0
        self.mtu.on_reconnected()
        self.up_us = now_us
        # Ports that were dialled together are not pinged together.
        self.last_received_us = self._last_ping_us = now_us - int(self._keepalive_us * (1 - self._jitter()))
        self._expires_us = now_us + int(self._rotate_us * self._jitter()) if self._rotate_us else NEVER_US

    # Dialling

    def on_dial(self, now_us: int) -> None:
        """A dial has begun. It ends with `on_established`, `on_dial_failed`, or in `on_time` after DIAL_US."""
        self.state = next_state(self.state, Input.DIAL)
        self.set_deadline(now_us + DIAL_US)

    def on_dial_failed(self, now_us: int) -> None:
        """The dial failed."""
        self._lose(now_us, None)

    def hasten(self, dial_us: int) -> None:
        """Want to be dialled at `dial_us` at the latest."""
        if self.state is State.DEAD:
            self.set_deadline(min(self.deadline_us, dial_us))

    def on_established(self, now_us: int, rtt_us: int = 0) -> None:
        """The handshake has succeeded. `rtt_us`: what its last round trip took, 0 if unknown."""
        self.state = next_state(self.state, Input.ESTABLISHED)
        self._begin(now_us)
        self.standing.on_established(now_us)
        if rtt_us:
            self.rtt.on_sample(rtt_us)
        self._arm()

    def _lose(self, now_us: int, age_us: int | None) -> None:
        self.state = next_state(self.state, Input.LOST)
        pause_us = self.standing.on_lost(age_us)
        self.set_deadline(NEVER_US if self.accepted else now_us + pause_us)

    # Data

    def on_sent(self, records: int, size_bytes: int, now_us: int) -> None:
        """Data of so many records left. PINGs and PONGs are not data."""
        self.sent_records += records
        self.sent_bytes += size_bytes
        if not self._has_sent:
            self._has_sent = True
            self.set_deadline(min(self.deadline_us, max(self._last_ping_us + self._meter_us, now_us)))

    def on_received(self, records: int, size_bytes: int, highest: int, now_us: int) -> None:
        """So many records of any kind were opened in one run; `highest`: the greatest of their counters.

        Goes before the PONGs and PINGs of the run are looked at.
        """
        self.received_records += records
        self.received_bytes += size_bytes
        self.highest = max(self.highest, highest)
        self.last_received_us = now_us

    # Probes

    @property
    def late_us(self) -> int:
        """How long after it left a PING is late."""
        rtt = self.rtt
        if not rtt.srtt_us:
            return LATE_FIRST_US
        return min(rtt.srtt_us + max(4 * rtt.rttvar_us, rtt.srtt_us // 2, LATE_US), LATE_MAX_US)

    @property
    def next_ping_us(self) -> int:
        """When a PING without padding is due."""
        last_us = self._last_ping_us
        if not self.is_answering:
            return last_us + (QUICK_US if self._probes < QUICK_PROBES else SLOW_US)
        due_us = max(self.last_received_us, last_us) + self._keepalive_us
        if self._has_sent:
            due_us = min(due_us, last_us + self._meter_us)
        if self._lossy_until_us:
            due_us = min(due_us, last_us + LOSSY_US)
        if self._pings:
            # A second PING tells a loss from a dead port.
            due_us = min(due_us, max(last_us + QUICK_US, next(iter(self._pings)) + self.late_us))
        if self.mtu.is_waiting and last_us < self.mtu.probe_clock:
            due_us = min(due_us, self.mtu.probe_clock + self.late_us)
        return due_us

    @property
    def _is_busy(self) -> bool:
        """Whether data was sent since the last PING or right before it."""
        return self._has_sent or self._was_busy

    def next_ping(self, now_us: int) -> int:
        """The size of the whole PING record to send now; 0: none."""
        if self.state not in (State.UP, State.SUSPECT):
            return 0
        if now_us >= self.next_ping_us:
            return PING_BYTES
        return self.mtu.next_probe(now_us, self._is_busy) if self.is_answering else 0

    def on_ping_sent(self, size: int, now_us: int) -> int:
        """Call right before the PING of `size` is sealed. Returns the clock to put into it."""
        clock = now_us
        if size > PING_BYTES:
            self.mtu.on_probe_sent(size, clock)
        else:
            clock = max(now_us, self._last_ping_us + 1)
            self._pings[clock] = None
            self._last_ping_us = clock
            self._was_busy, self._has_sent = self._has_sent, False
            self._probes += not self.is_answering
        self.sent_records += 1
        self.sent_bytes += size
        self._arm()
        return clock

    def pong(self) -> tuple[int, int]:
        """(records opened so far, highest counter opened): what a PONG says, after `on_received` of the PING's run."""
        return self.received_records, self.highest

    def on_pong(self, clock: int, received: int, highest: int, size: int, now_us: int) -> None:
        """A PONG with these fields came. One that answers no PING of ours is ignored."""
        if self.state not in (State.UP, State.SUSPECT):
            return
        if size > PING_BYTES:
            self.mtu.on_probe_answered(size, clock)
        elif clock in self._pings:
            del self._pings[clock]
            self.rtt.on_sample(max(now_us - clock, 1))
            self._measure(received, highest, clock, now_us)
            self._clear(clock, now_us)
        self._arm()

    def _measure(self, received: int, highest: int, clock: int, now_us: int) -> None:
        overtaken = [older for older in self._pings if older < clock]
        for older in overtaken:
            del self._pings[older]
        self._pongs_in_a_row = 1 if overtaken else self._pongs_in_a_row + 1
        self._probes = 0
        sent, lost = self.outward.on_report(received, highest, now_us)
        self.inward.on_report(self.received_records, self.highest, now_us)
        if self.mtu.on_small_answered(clock):
            self.outward.forgive()
        if lost >= TROUBLE_RECORDS and lost > sent * TROUBLE_RATIO:
            self.mtu.on_trouble()

    # Doubts

    @property
    def is_answering(self) -> bool:
        """Whether nothing but loss is held against the port."""
        return not (self._is_late or self._reset_us)

    def suspend(self, now_us: int) -> None:
        """Its loss is high: no data for a while. PINGs go on."""
        self._doubt()
        self._lossy_until_us = now_us + self.standing.on_suspended(now_us)
        self._pongs_in_a_row = 0
        self._arm()

    def on_reset(self, now_us: int) -> None:
        """A RST or FIN came, or the network said that the port is unreachable: it may be forged."""
        if self.state is State.DIALLING:
            self._lose(now_us, None)
        if self.state not in (State.UP, State.SUSPECT) or self._reset_us:
            return
        if now_us >= self._deaf_until_us:
            self._doubt()
            self._reset_us = now_us
        elif self._pings:
            return
        self._has_sent = True
        self._last_ping_us = min(self._last_ping_us, now_us - self._meter_us)
        self._arm()

    def _doubt(self) -> None:
        self.state = next_state(self.state, Input.DOUBT)
        self._probes = 0

    def _clear(self, clock: int, now_us: int) -> None:
        """A PING that left at `clock` was answered: end the doubts that this ends."""
        trust = 1.0
        if self._is_late:
            self._is_late, trust = False, TRUST_LATE
        if self._reset_us and clock >= self._reset_us:
            self._reset_us = 0
            self._deaf_until_us = now_us + DEAF_US
            self.forged_resets += 1
        if self._lossy_until_us and now_us >= self._lossy_until_us and self._pongs_in_a_row >= PONGS_IN_A_ROW:
            self._lossy_until_us, trust = 0, TRUST_LOSSY
            self.outward.forget()
        if self.state is State.SUSPECT and not (self._is_late or self._reset_us or self._lossy_until_us):
            self.state = next_state(self.state, Input.CLEARED)
            self.standing.on_return(trust, now_us)

    # Time

    def on_time(self, now_us: int) -> Step:
        """Call at `deadline_us` or soon after. DIAL comes again until `on_dial` is called: the owner paces dials."""
        if now_us < self.deadline_us:
            return Step.NONE
        if self.state is State.DIALLING:
            self._lose(now_us, None)
            return Step.DIED
        if self.state in (State.DEAD, State.CLOSED):
            return Step.DIAL if self.state is State.DEAD else Step.NONE
        if self._pings or self._reset_us:
            if now_us >= self._death_us():
                self._lose(now_us, now_us - self.up_us)
                return Step.DIED
            if not self._is_late and self._has_late_pings(now_us):
                self._doubt()
                self._is_late = True
        self._arm()
        return Step.PING if self.next_ping(now_us) else Step.NONE

    def _death_us(self) -> int:
        """When the port is dead unless a PONG comes."""
        death_us = NEVER_US
        if self._reset_us and self._last_ping_us >= self._reset_us:
            death_us = self._reset_us + 2 * self.late_us
        if len(self._pings) >= DEAD_PINGS:
            death_us = min(death_us, next(iter(self._pings)) + max(DEAD_US, 3 * self.late_us))
        return death_us

    def _has_late_pings(self, now_us: int) -> bool:
        late = list(islice((clock for clock in self._pings if now_us - clock >= self.late_us), 2))
        return len(late) == 2 or (len(late) == 1 and self.last_received_us < late[0])

    def _arm(self) -> None:
        """Set the deadline: a PING or a probe is due, one becomes late, or the port dies."""
        due_us = min(self.next_ping_us, self._death_us())
        if self.is_answering:
            due_us = min(due_us, self.mtu.next_us(self._is_busy))
            # Of two the second one's time: once both are late, it does not matter what has come since.
            for clock in list(islice(self._pings, 2))[-1:]:
                due_us = min(due_us, clock + self.late_us)
        self.set_deadline(due_us)

    # The end

    def is_expired(self, now_us: int) -> bool:
        """Whether the port is old enough to be replaced: dial another of its index first, then close this one."""
        return now_us >= self._expires_us

    def on_close_received(self, now_us: int) -> None:
        """The other end has given the port up, and takes another: it is dialled at once, if it does not always fail."""
        if self.state in (State.UP, State.SUSPECT):
            self._lose(now_us, now_us - self.up_us)
            self.deadline_us = now_us if not self.accepted and self.standing.failures <= 1 else self.deadline_us

    def close(self) -> None:
        """Given up for good; the owner sends CLOSE."""
        self.state = next_state(self.state, Input.CLOSE)
        self.set_deadline(NEVER_US)
