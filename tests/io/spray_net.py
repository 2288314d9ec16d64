"""What spray tunnels of a test run on: a loop whose timers follow the test's clock, and wires that it opens, blocks and
loses."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.io.small_loop import SmallLoop, Watcher
from workers.core.cuts import ROOM, Records
from workers.io.wire import DialOwner, WireOwner

if TYPE_CHECKING:
    from tests.io.spray_world import World


class Timed(Watcher):
    """A timer, or a watcher whose callback takes arguments."""

    due_us: int | None = None

    def __init__(self, loop: "TimedLoop", fd: int, events: int, repeat_us: int = 0) -> None:
        super().__init__(loop, fd, events)
        self.world, self.repeat_us = loop.world, repeat_us

    def start(self, callback: Callable[..., None], *arguments: Any) -> None:
        self.callback = lambda: callback(*arguments)

    def again(self, callback: Callable[..., None]) -> None:
        self.callback = callback
        self.due_us = self.world.now_us + self.repeat_us

    def stop(self) -> None:
        self.callback = self.due_us = None


class TimedLoop(SmallLoop):
    """Timers follow the world's clock."""

    def __init__(self, world: "World") -> None:
        super().__init__()
        self.world = world
        self.timers: list[Timed] = []

    def io(self, fd: int, events: int) -> Watcher:
        self.watchers.append(Timed(self, fd, events))
        return self.watchers[-1]

    def timer(self, after: float, repeat: float) -> Timed:
        timer = Timed(self, -1, 0, int(repeat * 1e6))
        self.timers.append(timer)
        timer.close = lambda: self.timers.remove(timer)  # type: ignore[method-assign]
        return timer

    def run_timers(self) -> None:
        for timer in list(self.timers):
            if timer.callback is not None and timer.due_us is not None and timer.due_us <= self.world.now_us:
                timer.due_us += timer.repeat_us
                timer.callback()


class FakeWire:
    """One end of a wire. `room`: bytes that it takes before it blocks, None for any; `sent`: all that it took."""

    run_max_bytes = 1 << 16
    rtt_us = 0

    def __init__(self, net: "Net", kind: Any, local: str, peer: str, most_bytes: int = 1472) -> None:
        self.net, self.kind, self.local, self.peer, self.most_bytes = net, kind, local, peer, most_bytes
        self.owner: WireOwner | None = None
        self.room: int | None = None
        self.carrier = -1
        self.sent: list[bytes] = []
        self.calls: list[str] = []
        self.closed = self.is_client = False

    def send_run(self, view: memoryview, size: int, now_us: int) -> int:
        assert not self.closed
        total = len(view)
        taken = total if self.room is None else min(total, self.room // size * size)
        if self.room is not None:
            self.room -= taken
        if taken:
            self._send(bytes(view[:taken]), size if taken > size else 0)
        return taken

    def send_one(self, record: bytes | memoryview, now_us: int) -> bool:
        assert not self.closed
        self._send(bytes(record), 0)
        return True

    def _send(self, payload: bytes, hint: int) -> None:
        self.sent.append(payload)
        if not self.net.loses(self, payload):
            self.net.queue.append((self, payload, hint))

    def on_opened(self, now_us: int) -> None:
        self.calls.append("opened")

    def on_proven(self) -> None:
        self.calls.append("proven")

    def keep(self) -> None:
        self.calls.append("keep")

    def close(self) -> None:
        self.closed = True

    def unblock(self, room: int | None = None) -> None:
        """There is room again."""
        self.room = room
        assert self.owner is not None
        self.owner.on_writable(self)


class Net:
    """What is on its way. A client's wire reaches the server's wire of its address; `loses` drops."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.queue: deque[tuple[FakeWire, bytes, int]] = deque()
        self.loses: Callable[[FakeWire, bytes], bool] = lambda wire, payload: False
        self.servers: dict[str, FakeWire] = {}
        self.clients: dict[str, FakeWire] = {}

    def connect(self, carrier: int, local: str) -> FakeWire:
        """A client's wire from address `local` to a port of the server."""
        kind = self.world.server_tunnel.carriers[carrier][0]
        wire = self.clients[local] = FakeWire(self, kind, local, f"server:{carrier}")
        wire.carrier, wire.is_client = carrier, True
        return wire

    def server_wire(self, wire: FakeWire) -> FakeWire:
        """The server's end; one that is closed is a stranger's again."""
        found = self.servers.get(wire.local)
        if found is None or found.closed:
            found = self.servers[wire.local] = FakeWire(self, wire.kind, wire.peer, wire.local)
            found.carrier = wire.carrier
        return found

    def deliver(self, wire: FakeWire, payload: bytes, hint: int = 0) -> None:
        """Payload reaches the other end of `wire`."""
        there = self.server_wire(wire) if wire.is_client else self.clients[wire.peer]
        if there.closed:
            return
        records, end = Records(bytearray(ROOM) + payload), ROOM + len(payload)
        if there.owner is not None:
            there.owner.on_payload(there, records, ROOM, end, hint, self.world.now_us)
        elif not there.is_client:
            door = self.world.server_of(there.carrier).end.door
            door.on_stranger(there, there.carrier, records, ROOM, end, self.world.now_us)

    def turn(self) -> bool:
        busy = bool(self.queue)
        for _ in range(len(self.queue)):
            self.deliver(*self.queue.popleft())
        return busy


class FakeDiallers:
    """Wires come in the next turn, or `refusal` does, for those in `refused` if it is set."""

    def __init__(self, world: "World", loop: TimedLoop) -> None:
        self.world, self.loop = world, loop
        self.dialled: list[tuple[int, tuple[str, int], str | None]] = []
        self.refusal = ""
        self.refused: set[int] | None = None
        self.lost = 0
        self.most_bytes: dict[int, int] = {}
        self.wires: list[FakeWire] = []
        self._waiting: set[int] = set()

    def dial(self, carrier: int, address: tuple[str, int], source: str | None, owner: DialOwner) -> None:
        assert carrier not in self._waiting
        self.dialled.append((carrier, address, source))
        self._waiting.add(carrier)
        self.loop.run_callback(self._made, carrier, owner)

    def _made(self, carrier: int, owner: DialOwner) -> None:
        if carrier not in self._waiting:
            return
        self._waiting.remove(carrier)
        if self.refusal and (self.refused is None or carrier in self.refused):
            owner.on_no_wire(carrier, self.refusal)
            return
        wire = self.world.net.connect(carrier, f"client:{len(self.world.net.clients)}")
        wire.most_bytes = self.most_bytes.get(carrier, wire.most_bytes)
        self.wires.append(wire)
        owner.on_wire(carrier, wire)

    def cancel(self, carrier: int) -> None:
        self._waiting.discard(carrier)

    def close(self) -> None:
        self._waiting.clear()
