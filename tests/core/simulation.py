"""A whole session on a virtual clock: workers at both ends, stripes between them, applications on top; everything from one seed.

A stripe is a pair of pipes, in order and reliable like TCP, with a rate and a latency. It may die at any moment, which loses
everything in flight in both directions and which each end learns of in its own time; it may be black-holed for a while; it
comes back with a new generation. A receiver may drop a frame, as one with a full arena does. Workers may be killed.

`Simulation(seed).run()` raises AssertionError, or whatever the core raises, when an invariant is broken.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.core.application import Application, Plan, random_plans
from workers.core import frame
from workers.core.credit import CreditPool
from workers.core.frame import HEADER_BYTES, Reason
from workers.core.path import Path
from workers.core.retain import SentFrame
from workers.core.session import SessionShare
from workers.core.stream import Stream

BACKLOG_US = 20_000
FROZEN_FRAMES = 16
TICK_US = 250_000
SETTLE_US = 60_000_000
QUIET_US = 15_000_000
MAX_EVENTS = 400_000
MIN_SLOT = 4096
HANDED = 4
BOOTS = (7, 11)


class Loop:
    """The virtual clock."""

    def __init__(self, now_us: int) -> None:
        self.now_us = now_us
        self.events = 0
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, when_us: int, call: Callable[..., None], *args: Any) -> None:
        """Call at that time, not before now."""
        self.events += 1
        heapq.heappush(self._heap, (max(when_us, self.now_us), self.events, call, args))

    def run(self, until_us: int, done: Callable[[], bool]) -> bool:
        """Run until `done`, asked after every event; False if the time came first."""
        heap = self._heap
        while not done():
            if not heap or heap[0][0] > until_us:
                return False
            assert self.events < MAX_EVENTS, "livelock"
            self.now_us, _, call, args = heapq.heappop(heap)
            call(*args)
        return True


class Pipe:
    """One direction of a stripe."""

    def __init__(self, loop: Loop, latency_us: int, us_per_kib: int, arrived: Callable[[bytes], None]) -> None:
        self._loop = loop
        self._latency_us = latency_us
        self._us_per_kib = us_per_kib
        self._arrived = arrived
        self._queue: deque[tuple[int, bytes]] = deque()
        self._free_us = 0
        self.frozen_until_us = 0
        self.dead = False

    @property
    def has_room(self) -> bool:
        """Whether the sender's socket would be writable."""
        if self.frozen_until_us > self._loop.now_us and len(self._queue) >= FROZEN_FRAMES:
            return False
        return self._free_us - self._loop.now_us <= BACKLOG_US

    @property
    def room_us(self) -> int:
        """When there is room again."""
        return max(self._free_us - BACKLOG_US, self.frozen_until_us)

    def send(self, data: bytes) -> None:
        """Take a frame; into the void if the stripe is dead."""
        if self.dead:
            return
        self._free_us = max(self._free_us, self._loop.now_us) + len(data) * self._us_per_kib // 1024 + 1
        self._queue.append((self._free_us + self._latency_us, data))
        if len(self._queue) == 1:
            self._loop.at(self._queue[0][0], self._arrive)

    def _arrive(self) -> None:
        if self.dead:
            return
        if self.frozen_until_us > self._loop.now_us:
            self._loop.at(self.frozen_until_us, self._arrive)
            return
        _, data = self._queue.popleft()
        if self._queue:
            self._loop.at(self._queue[0][0], self._arrive)
        self._arrived(data)


class Stripe:
    """`pipes[end]` leads away from that end; `up[end]`: that end believes in the stripe."""

    def __init__(self, simulation: "Simulation", index: int, generation: int, latency_us: int, us_per_kib: int) -> None:
        self.index = index
        self.generation = generation
        self.up = [True, True]
        self.pipes = [
            Pipe(simulation.loop, latency_us, us_per_kib, lambda data: simulation.receive(frame.SERVER, self, data)),
            Pipe(simulation.loop, latency_us, us_per_kib, lambda data: simulation.receive(frame.CLIENT, self, data)),
        ]

    def die(self) -> None:
        """Lose what is on its way."""
        for pipe in self.pipes:
            pipe.dead = True


class Piece:
    """A received payload. `left` bytes are not yet consumed."""

    __slots__ = ("data", "handed", "left", "length")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.length = self.left = len(data)
        self.handed = False

    @property
    def occupied(self) -> int:
        """The worst-case slot."""
        return max(2 * self.length, MIN_SLOT)


@dataclass
class Flow:
    """The two applications of one stream; the client's opened it."""

    client: Application
    server_plan: Plan
    server: Application | None = None


class Worker:
    """One worker's share and its shell."""

    def __init__(self, simulation: "Simulation", end: int, slot: int, serial: int) -> None:
        self.simulation = simulation
        self.end = end
        self.slot = slot
        self.serial = serial
        self.alive = True
        self.share = SessionShare(
            end, slot, serial, self, CreditPool(simulation.pool_bytes), simulation.window_cap, simulation.max_streams
        )
        self.share.rtt_us = simulation.rtt_us
        self.paths: dict[Stripe, Path] = {}
        self.handed: dict[int, Path] = {}
        self.outstanding: dict[int, int] = {}
        self.slots: dict[int, bytes] = {}
        self.next_slot = 0
        self.applications: list[Application] = []
        self.taken = self.given = self.discarded = 0
        self.occupied = 0
        self.timer_us = 0

    # Shell

    def deliver(self, stream: Stream, piece: Piece, length: int) -> None:
        assert not piece.handed and piece.length == length
        piece.handed = True
        self.given += 1
        stream.endpoint.deliver(piece)

    def end_of_stream(self, stream: Stream) -> None:
        stream.endpoint.end_of_stream()

    def opened(self, stream: Stream) -> None:
        flow = self.simulation.flows[stream.flow]
        assert flow.server is None, "opened twice"
        flow.server = Application(self, stream, flow.server_plan, flow.client.plan.source)
        flow.server.start()

    def reset(self, stream: Stream, reason: int) -> None:
        stream.endpoint.on_reset(reason)

    def release(self, slot: int) -> None:
        del self.slots[slot]

    def discard(self, piece: Piece) -> None:
        assert not piece.handed
        piece.handed = True
        self.discarded += 1
        self.occupied -= piece.occupied

    # Receiving

    def receive(self, header: frame.Header, data: bytes) -> None:
        simulation = self.simulation
        length, piece = 0, None
        if header.kind == frame.DATA:
            length = len(data) - HEADER_BYTES
            piece = Piece(data[HEADER_BYTES:]) if length else None
        if self.share.receive(header, data[HEADER_BYTES:], piece, length, simulation.loop.now_us):
            assert piece is not None
            self.taken += 1
            self.occupied += piece.occupied
            assert self.occupied <= self.share.pool.reserved, "more received than credit reserves"
        for application in simulation.arrivals:
            application.on_turn_end()
        simulation.arrivals.clear()
        self.pump()

    # Sending

    def pump(self) -> None:
        share = self.share
        while share.has_work and self.alive:
            stripe = self._stripe_with_room()
            if stripe is None:
                break
            self._send_one(stripe)
        self._arm_timer()

    def _stripe_with_room(self) -> Stripe | None:
        ready, soonest, waits = [], 0, None
        for stripe, path in self.paths.items():
            if path.stalled:
                continue
            pipe = stripe.pipes[self.end]
            if not pipe.has_room:
                if waits is None or pipe.room_us < soonest:
                    soonest, waits = pipe.room_us, pipe
            elif not self._is_foreign(stripe) or self.outstanding.get(self._owner(stripe), 0) < HANDED:
                ready.append(stripe)
        if ready:
            return ready[0] if len(ready) == 1 else self.simulation.random.choice(ready)
        if waits is not None and self.timer_us != soonest:
            self.simulation.loop.at(soonest + 1, self.pump)
            self.timer_us = soonest
        return None

    def _owner(self, stripe: Stripe) -> int:
        return stripe.index % self.simulation.workers_per_end[self.end]

    def _is_foreign(self, stripe: Stripe) -> bool:
        return self.simulation.mesh_us > 0 and self._owner(stripe) != self.slot

    def _send_one(self, stripe: Stripe) -> None:
        share, now_us = self.share, self.simulation.loop.now_us
        if share.answers:
            stripe.pipes[self.end].send(share.answers.popleft())
            return
        stream = share.ack_to_send()
        if stream is not None:
            data = stream.ack_to_send()
            if self._is_foreign(stripe):
                share.on_ack_sent(stream, self._hand_over(stripe, data, stream.flow, frame.ACK, 0))
            else:
                stripe.pipes[self.end].send(data)
                share.on_ack_sent(stream, self.paths[stripe])
            return
        kept = share.frame_to_resend() or self._next_data()
        if kept is None:
            return
        data = share.frame_bytes(kept) if kept.slot == -1 else self.slots[kept.slot]
        if self._is_foreign(stripe):
            path = self._hand_over(stripe, data, kept.stream.flow, kept.kind, kept.offset)
        else:
            stripe.pipes[self.end].send(data)
            path = self.paths[stripe]
        share.on_sent(kept, path, now_us)

    def _next_data(self) -> SentFrame | None:
        share, simulation = self.share, self.simulation
        stream = share.stream_to_send()
        if stream is None:
            return None
        size = stream.sendable(simulation.random.choice(simulation.frame_sizes))
        if not size:
            share.on_blocked(stream, simulation.loop.now_us)
            return None
        application: Application = stream.endpoint
        payload = application.read(size)
        if not payload:
            if payload is None:
                share.on_drained(stream)
            else:
                share.on_fin(stream)
            return None
        buffer = bytearray(HEADER_BYTES) + payload
        self.next_slot += 1
        kept = share.add_data(stream, len(payload), self.next_slot, memoryview(buffer))
        self.slots[self.next_slot] = bytes(buffer)
        if len(payload) < size and simulation.random.random() < 0.5:
            share.on_drained(stream)
            application.wake()
        return kept

    # The mesh: frames for stripes of other workers of this end

    def _hand_over(self, stripe: Stripe, data: bytes, flow: int, kind: int, offset: int) -> Path:
        owner = self._owner(stripe)
        path = self.handed.get(owner)
        if path is None:
            path = self.handed[owner] = Path(owner, -1, 0)
        self.outstanding[owner] = self.outstanding.get(owner, 0) + 1
        loop = self.simulation.loop
        loop.at(loop.now_us + self.simulation.mesh_us, self._bound, stripe, path, data, flow, kind, offset)
        return path

    def _bound(self, stripe: Stripe, handed: Path, data: bytes, flow: int, kind: int, offset: int) -> None:
        share = self.share
        if handed.lost or not self.alive:
            return
        self.outstanding[handed.worker] -= 1
        path = self.paths.get(stripe)
        if path is not None:
            stripe.pipes[self.end].send(data)
        if kind == frame.ACK:
            stream = share.streams.get(flow)
            if stream is not None and path is not None:
                share.on_ack_sent(stream, path)
            elif stream is not None:
                share.ack_again(stream)
        else:
            kept = share.find_kept(flow, kind, offset)
            if kept is not None and kept.path is handed:
                if path is not None:
                    share.on_bound(kept, path, self.simulation.loop.now_us)
                else:
                    share.send_again(kept)
        self.pump()

    def lose_worker(self, slot: int) -> None:
        """Another worker of this end was killed."""
        path = self.handed.pop(slot, None)
        self.outstanding.pop(slot, None)
        if path is not None:
            self.share.lose_path(path)
        self.pump()

    # Stripes and time

    def add_stripe(self, stripe: Stripe) -> None:
        path = self.paths[stripe] = Path(self._owner(stripe), stripe.index, stripe.generation)
        self.share.add_path(path)
        self.pump()

    def lose_stripe(self, stripe: Stripe) -> None:
        path = self.paths.pop(stripe, None)
        if path is not None:
            self.share.lose_path(path)
            self.pump()

    def _arm_timer(self) -> None:
        due_us = self.share.next_due_us
        if due_us is not None and self.alive:
            self.simulation.loop.at(due_us, self._on_acks_due)

    def _on_acks_due(self) -> None:
        self.share.on_acks_due(self.simulation.loop.now_us)
        self.pump()

    def tick(self) -> None:
        if self.alive:
            self.share.on_time(self.simulation.loop.now_us)
            self.simulation.loop.at(self.simulation.loop.now_us + TICK_US, self.tick)
            self.pump()

    # The end

    @property
    def idle(self) -> bool:
        share = self.share
        return not (share.streams or share.has_work or share.pool.reserved)

    def check_empty(self) -> None:
        """Nothing is left of all that passed."""
        share = self.share
        assert not share.streams and not share.acks and not share.resends and not share.answers and not len(share.turns)
        assert not share._blocked and not share._busy and not share._delayed
        assert share.pool.reserved == 0 and self.occupied == 0
        assert not self.slots and self.taken == self.given + self.discarded
        assert not any(path.stalled for path in self.paths.values())
        assert len(share._finished) <= share.total_streams


@dataclass
class Faults:
    """What happens to a run, until `until_us`."""

    until_us: int
    drop: float = 0.0
    deaths: int = 0
    freezes: int = 0
    blackouts: int = 0
    kills: int = 0

    @property
    def any(self) -> bool:
        return bool(self.drop or self.deaths or self.freezes or self.blackouts or self.kills)


class Simulation:
    """One run. The seed decides everything."""

    def __init__(self, seed: int) -> None:
        random = self.random = Random(seed)
        self.seed = seed
        start_us = random.choice((0, 1_000_000_000_000))
        self.start_us = start_us
        self.loop = Loop(start_us)
        self.workers_per_end = (random.choice((1, 1, 2, 3)), random.choice((1, 1, 2, 3)))
        self.frame_sizes = random.choice(((64, 512), (1000,), (4096, 1000), (16384, 4096), (1, 700, 40_000)))
        self.window_cap = random.choice((16 << 10, 40_000, 256 << 10))
        self.pool_bytes = random.choice((1 << 30, 1 << 30, 1 << 30, 400 << 10))
        self.max_streams = random.choice((65536, 65536, 65536, 3))
        self.mesh_us = random.choice((0, 30, 2_000))
        self.rtt_us = random.choice((1_000, 50_000))
        self.faults = self._random_faults()
        self.flows: dict[int, Flow] = {}
        self.arrivals: list[Application] = []
        self.to_open = 0
        self.known: list[dict[int, int]] = [{}, {}]
        self.serial = random.choice((1, 253, 0xFFFFFFFE, 0x7FFFFFFE))
        self.stripes: dict[int, Stripe] = {}
        self.workers: list[dict[int, Worker]] = [{}, {}]
        for end in (frame.CLIENT, frame.SERVER):
            for slot in range(self.workers_per_end[end]):
                self._start_worker(end, slot)
        self.generation = 0
        for index in range(random.choice((1, 2, 3, 6))):
            self.loop.at(start_us + random.choice((0, 0, 0, 400_000)), self._add_stripe, index)
        self._plan_flows()
        self._plan_faults()

    def _random_faults(self) -> Faults:
        random = self.random
        faults = Faults(self.start_us + random.randrange(1, 6) * 1_000_000)
        if random.random() < 0.8:
            faults.drop = random.choice((0.0, 0.0, 0.01, 0.1))
            faults.deaths = random.choice((0, 1, 3, 10))
            faults.freezes = random.choice((0, 0, 1, 3))
            faults.blackouts = random.choice((0, 0, 0, 1))
            faults.kills = random.choice((0, 0, 0, 0, 1, 2))
        return faults

    def _some_time(self) -> int:
        return self.random.randrange(self.start_us, self.faults.until_us)

    # Applications

    def _plan_flows(self) -> None:
        random = self.random
        self.to_open = random.choice((1, 1, 2, 4, 8))
        for _ in range(self.to_open):
            plans = random_plans(random, self.faults.until_us - self.start_us)
            when_us = self.start_us if random.random() < 0.5 else self._some_time()
            self.loop.at(when_us, self._open, *plans)

    def _open(self, plan: Plan, server_plan: Plan) -> None:
        random = self.random
        known = self.known[frame.CLIENT]
        workers = list(self.workers[frame.CLIENT].values())
        if not known or not workers:
            self.loop.at(self.loop.now_us + 50_000, self._open, plan, server_plan)
            return
        self.to_open -= 1
        worker = random.choice(workers)
        slot = random.choice(list(known))
        stream = worker.share.open_stream((slot, known[slot], BOOTS[frame.SERVER]), self.loop.now_us)
        if stream is None:
            assert self.pool_bytes < 1 << 30 or self.max_streams < 65536
            return
        assert stream.flow not in self.flows, "a flow id was used twice"
        application = Application(worker, stream, plan, server_plan.source)
        self.flows[stream.flow] = Flow(application, server_plan)
        application.start()
        worker.pump()

    # Faults

    def _plan_faults(self) -> None:
        faults, at = self.faults, self.loop.at
        for _ in range(faults.deaths):
            at(self._some_time(), self._kill_stripe)
        for _ in range(faults.freezes):
            at(self._some_time(), self._freeze, self.random.randrange(100_000, 6_000_000))
        for _ in range(faults.blackouts):
            at(self._some_time(), self._black_out)
        for _ in range(faults.kills):
            at(self._some_time(), self._kill_worker)

    def _add_stripe(self, index: int) -> None:
        random = self.random
        former = self.stripes.get(index)
        if former is not None:
            former.die()
            for end in (frame.CLIENT, frame.SERVER):
                self._learn(end, former)
        if not self._owner_of(frame.CLIENT, index) or not self._owner_of(frame.SERVER, index):
            self.loop.at(self.loop.now_us + 200_000, self._add_stripe, index)
            return
        self.generation += 1
        latency_us = random.choice((100, 2_000, 30_000, 100_000))
        stripe = Stripe(self, index, self.generation, latency_us, random.choice((100, 1_000, 1_000, 10_000)))
        self.stripes[index] = stripe
        for end in (frame.CLIENT, frame.SERVER):
            self.known[end] = {worker.slot: worker.serial for worker in self.workers[1 - end].values()}
            for worker in list(self.workers[end].values()):
                worker.share.on_roster(self.known[end], BOOTS[1 - end])
                worker.add_stripe(stripe)

    def _owner_of(self, end: int, index: int) -> Worker | None:
        return self.workers[end].get(index % self.workers_per_end[end])

    def _kill_stripe(self) -> None:
        self._end_stripe(self.random.choice(list(self.stripes.values())) if self.stripes else None)

    def _black_out(self) -> None:
        for stripe in list(self.stripes.values()):
            self._end_stripe(stripe)

    def _end_stripe(self, stripe: Stripe | None) -> None:
        """It dies now; each end learns of it in its own time, and it comes back later."""
        if stripe is None or stripe.pipes[0].dead:
            return
        random, now_us = self.random, self.loop.now_us
        stripe.die()
        for end in (frame.CLIENT, frame.SERVER):
            self.loop.at(now_us + random.choice((0, 20_000, 1_500_000)), self._learn, end, stripe)
        self.loop.at(now_us + random.choice((1_000, 500_000, 3_000_000)), self._add_stripe, stripe.index)

    def _learn(self, end: int, stripe: Stripe) -> None:
        if stripe.up[end]:
            stripe.up[end] = False
            for worker in list(self.workers[end].values()):
                worker.lose_stripe(stripe)

    def _freeze(self, duration_us: int) -> None:
        for stripe in self.stripes.values():
            if self.random.random() < 0.6:
                for pipe in stripe.pipes:
                    pipe.frozen_until_us = max(pipe.frozen_until_us, self.loop.now_us + duration_us)

    def _start_worker(self, end: int, slot: int) -> None:
        self.serial = (self.serial + 1) & 0xFFFFFFFF or 1
        worker = self.workers[end][slot] = Worker(self, end, slot, self.serial)
        self.loop.at(self.loop.now_us + self.random.randrange(TICK_US), worker.tick)
        for stripe in self.stripes.values():
            if stripe.up[end] and stripe.index % self.workers_per_end[end] != slot:
                worker.add_stripe(stripe)

    def _kill_worker(self) -> None:
        random, now_us = self.random, self.loop.now_us
        end = random.choice((frame.CLIENT, frame.SERVER))
        if not self.workers[end]:
            return
        worker = random.choice(list(self.workers[end].values()))
        del self.workers[end][worker.slot]
        worker.alive = False
        for application in worker.applications:
            application.on_killed()
        for stripe in list(self.stripes.values()):
            if stripe.index % self.workers_per_end[end] == worker.slot:
                self._end_stripe(stripe)
        for other in list(self.workers[end].values()):
            other.lose_worker(worker.slot)
        self.loop.at(now_us + random.choice((10_000, 800_000)), self._start_worker, end, worker.slot)
        self.loop.at(now_us + random.choice((5_000, 2_000_000)), self._tell_gone, 1 - end, worker.slot, worker.serial)

    def _tell_gone(self, end: int, slot: int, serial: int) -> None:
        for worker in list(self.workers[end].values()):
            worker.share.on_peer_gone(slot, serial)
            worker.pump()

    # What arrives

    def receive(self, end: int, stripe: Stripe, data: bytes) -> None:
        """`data` came out of `stripe` at `end`."""
        if not stripe.up[end]:
            return
        header = frame.unpack(data)
        worker = self.workers[end].get(frame.flow_slot(header.flow, end))
        if self.faults.drop and self.loop.now_us < self.faults.until_us and self.random.random() < self.faults.drop:
            return
        if worker is not None:
            worker.receive(header, data)
        elif header.kind != frame.RESET:
            stripe.pipes[end].send(frame.pack(frame.RESET, 0, 0, header.flow, Reason.WORKER_GONE))

    # The run

    def run(self) -> None:
        """Run to the end and check that it is one."""
        settled = self.loop.run(self.faults.until_us + SETTLE_US, self._is_settled)
        assert settled, f"stalled: {self._describe()}"
        self.loop.run(self.loop.now_us + QUIET_US, lambda: False)
        for worker in self._all_workers():
            worker.check_empty()
            if not self.faults.any:
                assert not worker.share.reinjected_bytes and not worker.share.duplicate_bytes, "sent twice for no reason"
        for flow in self.flows.values():
            self._check_flow(flow)

    def _is_settled(self) -> bool:
        if self.to_open or self.loop.now_us < self.faults.until_us:
            return False
        return all(worker.idle for worker in self._all_workers()) and all(
            flow.client.over and (flow.server is None or flow.server.over) for flow in self.flows.values()
        )

    def _all_workers(self) -> list[Worker]:
        return [worker for workers in self.workers for worker in workers.values()]

    def _describe(self) -> str:
        lines = [f"{self.to_open} to open"]
        for worker in self._all_workers():
            lines.append(f"{worker.end}/{worker.slot} idle={worker.idle} reserved={worker.share.pool.reserved}")
            for stream in worker.share.streams.values():
                lines.append(
                    f"  {stream.flow:x} {stream.state.value} sent={stream.sent.acknowledged}/{stream.sent.next_offset}"
                    f" credit={stream.credit} received={stream.received.next_offset} total={stream.fin_total}"
                )
        for number, flow in self.flows.items():
            lines.append(f"{number:x} client {flow.client} server {flow.server}")
        return "\n".join(lines)

    def _check_flow(self, flow: Flow) -> None:
        client, server = flow.client, flow.server
        ends = (client, server) if server is not None else (client,)
        may_break = self.faults.kills or self.pool_bytes < 1 << 30 or self.max_streams < 65536
        intended = client.plan.breaks or flow.server_plan.breaks
        if not may_break and not intended:
            assert server is not None and client.complete and server.complete, f"reset for no reason: {self._describe()}"
        for here, there in ((client, server), (server, client)):
            if here is not None and here.complete:
                assert there is not None, "complete without the other end"
                assert here.received == there.plan.source, "end of stream with bytes missing"
                assert there.delivered == len(here.plan.source), "ended before the other end had everything"
        if not may_break:
            reasons = {end.plan.reason for end in ends if end.plan.breaks}
            assert all(end.reason is None or end.reason in reasons for end in ends), "reset for another reason"
