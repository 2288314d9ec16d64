"""Which port takes the next run of datagrams. Sans-IO.

1. Each run goes to one port: to the one that is furthest behind its share (start-time fair queueing, Goyal 1996: a
   port's tag is what it got, divided by its weight). The tags stand in a heap, so a run costs O(log n).
2. Every TICK_US the ports are weighed: by their trust, their loss and their round trip, each against the median, so
   equal ports get equal shares and a loss that all have in common changes nothing.
3. A port that loses more than LOSS and LOSS_FACTOR times the median is suspended. If no port is UP, those in doubt get
   the data, lossy ones first: a lone lossy port is better than none.
4. A run goes whole, for what it costs is mostly by the run. Once the ports have lost some, whatever polices them may
   not take so much at once: for NARROW_US it is cut to what the port moves in QUANTUM_US.
5. Of more than MANY ports, WINDOW at a time take part, the others by turns, TURN_US long each: their keys and sockets
   stay in the processor's cache, runs stay long, and only those that carry data are measured. Where the ports lose
   alike, whatever limits each of them, more take part: twice as many every turn, until all do. All others are weighed
   every WHOLE_US only.
"""

from collections.abc import Iterable
from heapq import heapify, heappop, heappush, heapreplace, nsmallest

from workers.core.port import Port
from workers.core.port_state import State

TICK_US = 100_000
QUANTUM_US = 2_000
QUANTUM_MAX = 64 << 10
LOSS, LOSS_FACTOR = 0.02, 4
QUANTUM_MIN = 16 << 10
"""A dozen datagrams. What a port gets in one run at the least. Runs of 64 KiB cost a third less CPU than such."""
MANY, WINDOW, TURN_US, WHOLE_US = 32, 10, 400_000, 1_000_000
"""With 1,000 ports in turn for each run, a gigabyte cost more than twice the CPU of one over 10."""
NARROW_US = 10_000_000
"""So long after a loss that ports had in common, runs go whole again, and fewer ports take part: half every turn."""
MEDIAN_RECORDS = 50
"""A port that was measured on fewer says nothing about the loss that all have in common."""
FREE_LOSS, FREE_RTT_US = 0.005, 10_000
"""Above 1.5 times the median, or so little, loss and round trip make a port's weight fall with their square."""
WEIGHT_MIN = 1 / 1024
RATE_SHIFT = 3
"""The rate of a port rises at once and falls by an eighth of the difference every tick."""

Entry = tuple[float, int, Port]


class PortChoice:
    """The ports of one session at one worker that data can be sent on."""

    __slots__ = (
        "_blocked",
        "_free_rtt_us",
        "_heap",
        "_lost_us",
        "_most",
        "_next_serial",
        "_rated_us",
        "_tag",
        "_turn_us",
        "_wanted",
        "_whole_us",
        "_window",
        "common_loss",
        "next_us",
        "ports",
    )

    def __init__(self, now_us: int) -> None:
        """`next_us`: when `on_time` is due. `common_loss`: what the ports that get data lose alike."""
        self.ports: list[Port] = []
        self.next_us = now_us + TICK_US
        self.common_loss = self._free_rtt_us = 0.0
        self._most, self._lost_us = WINDOW, now_us - NARROW_US
        self._rated_us = self._turn_us = self._whole_us = now_us
        self._heap: list[Entry] = []
        self._blocked: set[Port] = set()
        self._wanted = State.UP
        self._window: list[Port] = []
        self._tag = 0.0
        self._next_serial = 0

    @property
    def in_doubt(self) -> bool:
        """Whether none of the ports is UP, so that data goes to those that may be dead, if to any."""
        return self._wanted is not State.UP

    # The way of a run

    def next(self) -> Port | None:
        """The port for the next run, which should not exceed its `quantum_bytes`; None: the run waits.

        Either `on_sent` or `on_blocked` follows.
        """
        heap = self._heap
        if not heap:
            return None
        port = heap[0][2]
        if port.state is self._wanted:
            return port
        self._fill()
        return self._heap[0][2] if self._heap else None

    def on_sent(self, port: Port, records: int, size_bytes: int, now_us: int) -> None:
        """A run left on `port`."""
        port.on_sent(records, size_bytes, now_us)
        heap = self._heap
        if heap and heap[0][2] is port:
            self._tag = heap[0][0]
            port.tag = self._tag + size_bytes * port.cost
            heapreplace(heap, (port.tag, port.serial, port))
        else:
            port.tag += size_bytes * port.cost

    def on_blocked(self, port: Port) -> None:
        """The port takes nothing now: its socket would block, or its window is full. The run is for the next one."""
        self._blocked.add(port)
        if self._heap and self._heap[0][2] is port:
            heappop(self._heap)
            if self._heap:
                return
        self._fill()

    def on_writable(self, port: Port) -> None:
        """The port takes data again."""
        if port in self._blocked:
            self._blocked.discard(port)
            if port.state is not self._wanted:
                return
            if port in self._window:
                heappush(self._heap, self._entry(port))
            elif not self._heap:
                self._fill()

    # Ports come and go

    def add(self, port: Port, now_us: int) -> None:
        """The port has come up, for the first time or again. It gets data from the next tick on."""
        if port not in self.ports:
            port.serial = self._next_serial
            self._next_serial += 1
            self.ports.append(port)
            port.rated_bytes, port.rated_us = port.sent_bytes, now_us
        port.cost = 1 / port.standing.trust(now_us)
        self._blocked.discard(port)
        if not self._heap or self._wanted is not State.UP:
            self._fill()

    def remove(self, port: Port) -> None:
        """The port is gone for good."""
        if port in self.ports:
            self.ports.remove(port)
            self._blocked.discard(port)
            self._fill()

    def _entry(self, port: Port) -> Entry:
        # Time without data is not made up for, and what a low weight cost is forgotten when it rises.
        port.tag = min(max(port.tag, self._tag), self._tag + QUANTUM_MAX * port.cost)
        return port.tag, port.serial, port

    def _fill(self) -> None:
        """All ports that may get data, into the heap: the UP ones, or where there is none, those in doubt."""
        able = [port for port in self.ports if port.state is State.UP]
        self._wanted = State.UP if able else State.SUSPECT
        if not able:
            doubtful = [port for port in self.ports if port.state is State.SUSPECT]
            able = [port for port in doubtful if port.is_answering] or doubtful
        if len(able) > max(self._most, MANY):
            able = self._turn([port for port in able if port not in self._blocked])
        self._window = able
        self._order()

    def _order(self) -> None:
        self._heap = [self._entry(port) for port in self._window if port not in self._blocked]
        heapify(self._heap)

    def _turn(self, able: list[Port]) -> list[Port]:
        """The ports at hand as far as they are able; for the others, those whose last turn is longest ago."""
        held = set(self._window)
        window = [port for port in able if port in held][: self._most]
        wanted = self._most - len(window)
        if wanted:
            for port in nsmallest(wanted, (each for each in able if each not in held), key=lambda each: each.serial):
                port.serial = self._next_serial
                self._next_serial += 1
                port.rated_us = self._rated_us  # nothing was sent meanwhile
                window.append(port)
        return window

    # Time

    def on_time(self, now_us: int) -> None:
        """Call at `next_us`: measure rates, suspend lossy ports, weigh the others."""
        is_whole = len(self.ports) <= MANY or now_us >= self._whole_us
        ports = self.ports if is_whole else self._window
        self._rated_us = now_us
        for port in ports:
            _rate(port, now_us)
        able = [port for port in ports if port.state is State.UP]
        if is_whole:
            self._whole_us = now_us + WHOLE_US
            self.common_loss = _median_loss(able)
        self._suspend(able, now_us)
        if is_whole:
            self._compare([port for port in able if port.state is State.UP] or ports, now_us)
        self._weigh(ports, now_us)
        self._blocked = {port for port in self._blocked if port.state in (State.UP, State.SUSPECT)}
        if now_us >= self._turn_us:
            self._turn_us = now_us + TURN_US
            self._window = []
            self._widen(now_us)
        if is_whole or not self._window or any(port.state is not State.UP for port in self._window):
            self._fill()
        else:
            self._order()
        self.next_us = now_us + TICK_US

    def _suspend(self, able: list[Port], now_us: int) -> None:
        limit = max(LOSS, LOSS_FACTOR * self.common_loss)
        lossy = [port for port in able if port.outward.credible > limit]
        if len(lossy) < len(able):
            for port in lossy:
                port.suspend(now_us)

    def _compare(self, able: list[Port], now_us: int) -> None:
        """What is common among the ports that get data, lossy ones aside."""
        self.common_loss = _median_loss(able)
        if self.common_loss > FREE_LOSS:
            self._lost_us = now_us
        measured = [float(port.rtt.srtt_us) for port in able if port.rtt.srtt_us]
        self._free_rtt_us = 1.5 * _median(measured) + FREE_RTT_US if measured else 0.0

    def _weigh(self, ports: list[Port], now_us: int) -> None:
        free_loss, free_rtt_us = max(FREE_LOSS, 1.5 * self.common_loss), self._free_rtt_us
        is_free = now_us - self._lost_us >= NARROW_US
        for port in ports:
            weight = port.standing.trust(now_us)
            loss, rtt_us = port.outward.credible, port.rtt.srtt_us
            if loss > free_loss:
                weight *= (free_loss / loss) ** 2
            if rtt_us > free_rtt_us > 0:
                weight *= (free_rtt_us / rtt_us) ** 2
            port.cost = 1 / max(weight, WEIGHT_MIN)
            moved_bytes = QUANTUM_MAX if is_free and loss <= FREE_LOSS else int(port.rate_bps / 8e6 * QUANTUM_US)
            port.quantum_bytes = min(max(moved_bytes, QUANTUM_MIN), QUANTUM_MAX)

    def _widen(self, now_us: int) -> None:
        """Let more ports take part at a time, or fewer."""
        if self.common_loss > FREE_LOSS:
            self._most = min(self._most * 2, max(len(self.ports), WINDOW))
        elif now_us - self._lost_us >= NARROW_US:
            self._most = max(self._most // 2, WINDOW)


def _rate(port: Port, now_us: int) -> None:
    """What the port was sent lately."""
    rate_bps = (port.sent_bytes - port.rated_bytes) * 8e6 / max(now_us - port.rated_us, 1)
    port.rated_bytes, port.rated_us = port.sent_bytes, now_us
    port.rate_bps = max(rate_bps, port.rate_bps + (rate_bps - port.rate_bps) / (1 << RATE_SHIFT))


def _median_loss(ports: Iterable[Port]) -> float:
    """The loss that the ports have in common."""
    return _median([port.outward.ratio for port in ports if port.outward.sent >= MEDIAN_RECORDS])


def _median(values: list[float]) -> float:
    """The lower of the two in the middle: of two ports, the better one counts. 0 of none."""
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0
