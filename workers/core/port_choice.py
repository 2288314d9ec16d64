"""Which port takes the next run of datagrams. Sans-IO.

1. Each run goes to one port: to the one that is furthest behind its share (start-time fair queueing, Goyal 1996: a
   port's tag is what it got, divided by its weight). The tags stand in a heap, so a run costs O(log n).
2. Every TICK_US the ports are weighed: by their trust, their loss and their round trip, each against the median, so
   equal ports get equal shares and a loss that all have in common changes nothing.
3. A port that loses more than LOSS and LOSS_FACTOR times the median is suspended. If no port is UP, those in doubt get
   the data, lossy ones first: a lone lossy port is better than none.
4. A run is cut to what the port moves in QUANTUM_US, so that no queue on its way grows by more.
5. Of more than WINDOW ports, so many at a time take part, the others by turns, TICK_US long each: their keys and
   sockets stay in the processor's cache, and only those that carry data are measured.
"""

from collections.abc import Iterable
from heapq import heapify, heappop, heappush, heapreplace, nsmallest

from workers.core.port import QUANTUM_MIN, Port
from workers.core.port_state import State

TICK_US = 100_000
QUANTUM_US = 2_000
QUANTUM_MAX = 64 << 10
LOSS, LOSS_FACTOR = 0.02, 4
WINDOW = 32
"""With 1,000 ports in turn for each run, a gigabyte cost more than twice the CPU of one over 10."""
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

    __slots__ = ("_blocked", "_heap", "_next_serial", "_rated_us", "_tag", "_wanted", "_window", "next_us", "ports")

    def __init__(self, now_us: int) -> None:
        """`next_us`: when `on_time` is due."""
        self.ports: list[Port] = []
        self.next_us = now_us + TICK_US
        self._rated_us = now_us
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

    @property
    def common_loss(self) -> float:
        """What the ports that get data lose alike: whatever limits each of them, more ports would help."""
        return _median_loss([port for port in self.ports if port.state is State.UP])

    # Ports come and go

    def add(self, port: Port, now_us: int) -> None:
        """The port has come up, for the first time or again. It gets data from the next tick on."""
        if port not in self.ports:
            port.serial = self._next_serial
            self._next_serial += 1
            self.ports.append(port)
            port.rated_bytes = port.sent_bytes
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
        if len(able) > WINDOW:
            able = self._turn([port for port in able if port not in self._blocked])
        self._window = able
        self._heap = [self._entry(port) for port in able if port not in self._blocked]
        heapify(self._heap)

    def _turn(self, able: list[Port]) -> list[Port]:
        """The ports at hand as far as they are able; for the others, those whose last turn is longest ago."""
        held = set(self._window)
        window = [port for port in able if port in held][:WINDOW]
        others = (port for port in able if port not in held)
        for port in nsmallest(WINDOW - len(window), others, key=lambda each: each.serial):
            port.serial = self._next_serial
            self._next_serial += 1
            window.append(port)
        return window

    # Time

    def on_time(self, now_us: int) -> None:
        """Call at `next_us`: measure rates, suspend lossy ports, weigh the others."""
        elapsed_us = max(now_us - self._rated_us, 1)
        self._rated_us = now_us
        for port in self.ports:
            _rate(port, elapsed_us)
        self._suspend(now_us)
        self._weigh(now_us)
        self._blocked = {port for port in self._blocked if port.state in (State.UP, State.SUSPECT)}
        self._window = []
        self._fill()
        self.next_us = now_us + TICK_US

    def _suspend(self, now_us: int) -> None:
        able = [port for port in self.ports if port.state is State.UP]
        limit = max(LOSS, LOSS_FACTOR * _median_loss(able))
        lossy = [port for port in able if port.outward.credible > limit]
        if len(lossy) < len(able):
            for port in lossy:
                port.suspend(now_us)

    def _weigh(self, now_us: int) -> None:
        able = [port for port in self.ports if port.state is State.UP] or self.ports
        free_loss = max(FREE_LOSS, 1.5 * _median_loss(able))
        measured = [float(port.rtt.srtt_us) for port in able if port.rtt.srtt_us]
        free_rtt_us = 1.5 * _median(measured) + FREE_RTT_US if measured else 0.0
        for port in self.ports:
            weight = port.standing.trust(now_us)
            loss, rtt_us = port.outward.credible, port.rtt.srtt_us
            if loss > free_loss:
                weight *= (free_loss / loss) ** 2
            if rtt_us > free_rtt_us > 0:
                weight *= (free_rtt_us / rtt_us) ** 2
            port.cost = 1 / max(weight, WEIGHT_MIN)


def _rate(port: Port, elapsed_us: int) -> None:
    """What the port was sent lately, and from that, how much of a run it takes."""
    rate_bps = (port.sent_bytes - port.rated_bytes) * 8e6 / elapsed_us
    port.rated_bytes = port.sent_bytes
    port.rate_bps = max(rate_bps, port.rate_bps + (rate_bps - port.rate_bps) / (1 << RATE_SHIFT))
    port.quantum_bytes = min(max(int(port.rate_bps / 8e6 * QUANTUM_US), QUANTUM_MIN), QUANTUM_MAX)


def _median_loss(ports: Iterable[Port]) -> float:
    """The loss that the ports have in common."""
    return _median([port.outward.ratio for port in ports if port.outward.sent >= MEDIAN_RECORDS])


def _median(values: list[float]) -> float:
    """The lower of the two in the middle: of two ports, the better one counts. 0 of none."""
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0
