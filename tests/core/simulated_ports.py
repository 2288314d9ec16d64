"""Two ends with some ports between them, on a virtual clock and from a seed: `port` and `port_choice` together."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush

from workers.core.port import PING_BYTES, Port, PortSettings
from workers.core.port_choice import PortChoice
from workers.core.port_state import State, Step
from workers.core.standing import Standing

MS, SECOND = 1000, 1_000_000
TICK_US = 10 * MS
DATAGRAM = 1200
CLIENT, SERVER = 0, 1


@dataclass
class Wire:
    """What the network does to one port. `loss`: towards the client, towards the server. `mtu`: of a whole record."""

    delay_us: int = 20 * MS
    loss: tuple[float, float] = (0.0, 0.0)
    is_blocked: Callable[[int, int], bool] = lambda now_us, towards: False
    reset_every_us: int = 0
    mtu: int = 1472


class Connection:
    """One handshake's worth of a port. `ports`: of the client and of the server, `counters`: the next of each."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.ports: list[Port | None] = [None, None]
        self.counters = [0, 0]
        self.is_cut = False


class Simulation:
    """`datagrams`: how many each end sends every `run_us`. `sent` and `lost`: how many, by port, since `mark`."""

    def __init__(self, wires: list[Wire], seed: int, datagrams: tuple[int, int] = (4, 4), run_us: int = MS) -> None:
        self.datagram = DATAGRAM
        self.wires, self.datagrams, self.run_us = wires, datagrams, run_us
        self.random = random.Random(seed)
        self.now_us = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._event = 0
        self.settings = PortSettings(1472, ports=len(wires))
        self.choices = [PortChoice(0), PortChoice(0)]
        self.connections: dict[int, Connection] = {}
        self._accepted: dict[Port, Connection] = {}
        self._standings: dict[int, Standing] = {}
        self.dials: Counter[int] = Counter()
        self.mark()
        self.ports = [Port(index, self.settings, 0, self.jitter) for index in range(len(wires))]
        for end in (CLIENT, SERVER):
            self._every(TICK_US, partial(self._tick, end))
            if datagrams[end]:
                self._every(run_us, partial(self._send_runs, end))
        for index, wire in enumerate(wires):
            if wire.reset_every_us:
                self._every(wire.reset_every_us, partial(self.reset, index))

    def mark(self) -> None:
        """Count anew what is sent from now on."""
        self.mark_us = self.now_us
        self.sent: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self.lost: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self.waited = 0

    def jitter(self) -> float:
        return self.random.uniform(0.5, 1)

    def after(self, delay_us: int, action: Callable[[], None]) -> None:
        self._event += 1
        heappush(self._events, (self.now_us + delay_us, self._event, action))

    def _every(self, period_us: int, action: Callable[[], None]) -> None:
        def act() -> None:
            action()
            self.after(period_us, act)

        self.after(period_us, act)

    def run(self, seconds: float) -> None:
        end_us = self.now_us + int(seconds * SECOND)
        while self._events[0][0] <= end_us:
            self.now_us, _, action = heappop(self._events)
            action()
        self.now_us = end_us

    # The ends

    def _port(self, end: int, connection: Connection) -> Port | None:
        port = connection.ports[end]
        is_gone = end == CLIENT and self.connections.get(connection.index) is not connection
        return None if is_gone else port

    def _tick(self, end: int) -> None:
        choice = self.choices[end]
        ports = self.ports if end == CLIENT else list(choice.ports)
        for port in ports:
            if self.now_us < port.deadline_us:
                continue
            step = port.on_time(self.now_us)
            if step is Step.DIAL:
                self._dial(port)
            elif step is Step.PING:
                self._ping(end, port)
            elif step is Step.DIED and end == SERVER:
                choice.remove(port)
        if self.now_us >= choice.next_us:
            choice.on_time(self.now_us)

    def _ping(self, end: int, port: Port) -> None:
        connection = self._connection(end, port)
        while size := port.next_ping(self.now_us):
            clock = port.on_ping_sent(size, self.now_us)
            self._send(end, connection, 1, size, partial(self._pong, 1 - end, connection, clock, size))

    def _connection(self, end: int, port: Port) -> Connection:
        return self.connections[port.index] if end == CLIENT else self._accepted[port]

    def _pong(self, end: int, connection: Connection, clock: int, size: int) -> None:
        port = self._port(end, connection)
        if port is None:
            return
        received, highest = port.pong()

        def take() -> None:
            asker = self._port(1 - end, connection)
            if asker is not None:
                asker.on_pong(clock, received, highest, size, self.now_us)

        self._send(end, connection, 1, PING_BYTES + 18, take)

    def _send_runs(self, end: int) -> None:
        choice, left = self.choices[end], self.datagrams[end]
        while left:
            port = choice.next()
            if port is None:
                self.waited += left
                return
            count = max(min(left, port.quantum_bytes // DATAGRAM), 1)
            choice.on_sent(port, count, count * DATAGRAM, self.now_us)
            self.sent[end][port.index] += count
            size = min(self.datagram, port.mtu.size)
            came = self._send(end, self._connection(end, port), count, size, None)
            self.lost[end][port.index] += count - came
            left -= count

    def _send(self, end: int, connection: Connection, count: int, size: int, action: Callable[[], None] | None) -> int:
        """Put records on the wire; `action` once they have come. How many will have come if the port still lives."""
        wire, towards = self.wires[connection.index], 1 - end
        counter = connection.counters[end]
        connection.counters[end] += count
        came = [c for c in range(counter, counter + count) if self.random.random() >= wire.loss[towards]]
        if not came or size > wire.mtu or connection.is_cut or wire.is_blocked(self.now_us, towards):
            return 0
        sent_us, mark_us = self.now_us, self.mark_us

        def arrive() -> None:
            if towards == SERVER and connection.ports[SERVER] is None and not connection.is_cut:
                self._accept(connection)
            port = self._port(towards, connection)
            if connection.is_cut or port is None or port.state in (State.DEAD, State.CLOSED):
                if action is None and mark_us == self.mark_us <= sent_us:
                    self.lost[end][connection.index] += len(came)
                return
            port.on_received(len(came), len(came) * size, came[-1], self.now_us)
            if action is not None:
                action()

        self.after(wire.delay_us + self.random.randrange(1 + wire.delay_us // 20), arrive)
        return len(came)

    # Connections

    def _dial(self, port: Port) -> None:
        self.dials[port.index] += 1
        port.on_dial(self.now_us)
        connection = self.connections[port.index] = Connection(port.index)
        self._handshake(port, connection)

    def _handshake(self, port: Port, connection: Connection) -> None:
        """Messages 1 and 2, again after 500 ms if either was lost."""
        if self.connections[port.index] is not connection or port.state is not State.DIALLING:
            return
        wire, there_us = self.wires[port.index], self.now_us
        back_us = there_us + wire.delay_us
        is_lost = any(
            wire.is_blocked(at_us, towards) or self.random.random() < wire.loss[towards]
            for at_us, towards in ((there_us, SERVER), (back_us, CLIENT))
        )
        if is_lost:
            self.after(500 * MS, lambda: self._handshake(port, connection))
        else:
            self.after(2 * wire.delay_us, lambda: self._establish(port, connection))

    def _establish(self, port: Port, connection: Connection) -> None:
        if self.connections[port.index] is not connection or port.state is not State.DIALLING or connection.is_cut:
            return
        connection.ports[CLIENT] = port
        port.on_established(self.now_us, 2 * self.wires[port.index].delay_us)
        self.choices[CLIENT].add(port, self.now_us)
        self._ping(CLIENT, port)

    def _accept(self, connection: Connection) -> None:
        """The first record of a connection has opened at the server: its port replaces any other of that index."""
        choice, index = self.choices[SERVER], connection.index
        for port in list(choice.ports):
            if port.index == index:
                port.close()
                choice.remove(port)
        port = connection.ports[SERVER] = Port(
            index, self.settings, self.now_us, self.jitter, accepted=True, standing=self._standings.get(index)
        )
        self._standings[index] = port.standing
        self._accepted[port] = connection
        choice.add(port, self.now_us)

    def reset(self, index: int, *, is_forged: bool = False) -> None:
        """Both ends see a RST; unless it is forged, nothing passes any more."""
        connection = self.connections.get(index)
        if connection is None:
            return
        connection.is_cut = connection.is_cut or not is_forged
        for port in connection.ports:
            if port is not None:
                port.on_reset(self.now_us)

    # What came of it

    def loss(self, end: int) -> float:
        """The share of the datagrams sent by `end` since the mark that were lost."""
        return self.lost[end].total() / max(self.sent[end].total(), 1)

    def up(self, end: int) -> list[int]:
        return sorted(port.index for port in self.choices[end].ports if port.state is State.UP)
