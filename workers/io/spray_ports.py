"""The ports of one spray session at one worker: those that it sends on, and those whose place others have taken.

What was sent on a port before another of its index came up is still on its way, and the other end may not have heard
yet: the old port receives for GRACE_US more, and only then says that it is given up.
"""

from collections.abc import Iterator

from workers.core.deadlines import Deadlines
from workers.core.port import Port
from workers.core.port_choice import PortChoice
from workers.core.port_state import State
from workers.io.port_carrier import PortCarrier
from workers.io.tally import add_gone
from workers.shm.totals import TunnelTotals

GRACE_US = 3_000_000
PIECE_US = 100_000
"""How old the size of pieces may be: of 1,000 ports each is asked for its own."""


class SprayPorts:
    """`carriers`: in use, by index. `choice`: which of them takes the next run."""

    __slots__ = ("_by_port", "_deadlines", "_past", "_piece_max", "_piece_until_us", "_replaced", "carriers", "choice")

    def __init__(self, now_us: int, past: TunnelTotals) -> None:
        """past: what ports that are gone have counted."""
        self.carriers: dict[int, PortCarrier] = {}
        self.choice = PortChoice(now_us)
        self._by_port: dict[Port, PortCarrier] = {}
        self._deadlines: Deadlines[Port] = Deadlines()
        self._replaced: dict[int, tuple[int, PortCarrier]] = {}
        self._past = past
        self._piece_max = self._piece_until_us = 0

    def add(self, carrier: PortCarrier, now_us: int) -> None:
        """A port has come up, perhaps in place of another of its index."""
        old = self.carriers.get(carrier.index)
        if old is not None and old is not carrier:
            self._take_out(old)
            self._end_replaced(carrier.index, now_us)
            self._replaced[carrier.index] = now_us + GRACE_US, old
        carrier.port.mtu.on_too_large(carrier.wire.most_bytes)
        self.carriers[carrier.index] = carrier
        self._by_port[carrier.port] = carrier
        self._deadlines.watch(carrier.port)
        self.choice.add(carrier.port, now_us)
        self._piece_until_us = now_us

    def remove(self, carrier: PortCarrier, now_us: int) -> None:
        """The port is gone, or has to go."""
        self._take_out(carrier)
        replaced = self._replaced.get(carrier.index)
        if replaced is not None and replaced[1] is carrier:
            del self._replaced[carrier.index]
        add_gone(self._past, carrier)
        carrier.close(now_us)
        self._piece_until_us = now_us

    def _take_out(self, carrier: PortCarrier) -> None:
        """Send nothing on it any more."""
        if self.carriers.get(carrier.index) is carrier:
            del self.carriers[carrier.index]
        if self._by_port.get(carrier.port) is carrier:
            del self._by_port[carrier.port]
            self._deadlines.forget(carrier.port)
            self.choice.remove(carrier.port)

    def _end_replaced(self, index: int, now_us: int) -> None:
        replaced = self._replaced.get(index)
        if replaced is not None:
            self.remove(replaced[1], now_us)
            replaced[1].port.close()

    @property
    def up(self) -> int:
        """How many are fit for data."""
        return sum(port.state is State.UP for port in self.choice.ports)

    def next(self) -> PortCarrier | None:
        """The one for the next run."""
        port = self.choice.next()
        return None if port is None else self._by_port.get(port)

    def piece_max(self, now_us: int) -> int:
        """The largest inner that every port takes."""
        if now_us >= self._piece_until_us:
            self._piece_until_us = now_us + PIECE_US
            self._piece_max = min((carrier.piece_max for carrier in self.carriers.values()), default=0)
        return self._piece_max

    @property
    def replaced(self) -> Iterator[PortCarrier]:
        """Those that only receive."""
        return (carrier for _, carrier in self._replaced.values())

    def on_time(self, now_us: int) -> None:
        """See to the ports whose deadline has come, and end those whose place was taken long enough ago."""
        for port in self._deadlines.due(now_us):
            carrier = self._by_port.get(port)
            if carrier is not None:
                carrier.on_time(now_us)
        while self._replaced:
            index, (until_us, _) = next(iter(self._replaced.items()))
            if until_us > now_us:
                break
            self._end_replaced(index, now_us)

    def close(self, now_us: int) -> None:
        """Give all up."""
        for carrier in [*self.carriers.values(), *self.replaced]:
            self.remove(carrier, now_us)
