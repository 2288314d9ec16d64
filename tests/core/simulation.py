"""A whole session on a virtual clock: workers at both ends, stripes between, applications on top; all from one seed.

A stripe may die at any moment, which loses everything in flight in both directions and which each end learns of in its
own time; it may be black-holed for a while; it comes back with a new generation. A receiver may drop a frame, as one
with a full arena does. Workers may be killed.

`Simulation(seed).run()` raises AssertionError, or whatever the core raises, when an invariant is broken.
"""

from dataclasses import dataclass
from random import Random

from tests.core.application import Application, Plan, random_plans
from tests.core.simulated_link import Loop, Stripe
from tests.core.simulated_worker import TICK_US, Worker
from workers.core import frame
from workers.core.frame import Reason

SETTLE_US = 60_000_000
"""When everything has to be over after the last fault."""
QUIET_US = 15_000_000
SHORT_FRAME = 4096
"""Takes at most 40 ms on any stripe here, so no timeout of 300 ms mistakes it for lost."""
BOOTS = (7, 11)


@dataclass
class Flow:
    """The two applications of one stream; the client's opened it."""

    client: Application
    server_plan: Plan
    server: Application | None = None


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
        self.mesh_us = random.choice((0, 30, 2_000, 50_000))
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
        speed = (latency_us, random.choice((100, 1_000, 1_000, 10_000)))
        stripe = Stripe(self.loop, self.receive, index, self.generation, speed)
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
            hedged = any(each.hedged for each in self._all_workers())
            if not self.faults.any and not hedged and max(self.frame_sizes) <= SHORT_FRAME:
                assert worker.share.reinjected_bytes == worker.share.duplicate_bytes == 0, "sent twice for no reason"
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
            assert all(end.complete for end in ends) and len(ends) == 2, f"reset for no reason: {self._describe()}"
        for here, there in ((client, server), (server, client)):
            if here is not None and here.complete:
                assert there is not None, "complete without the other end"
                assert here.received == there.plan.source, "end of stream with bytes missing"
                assert there.delivered == len(here.plan.source), "ended before the other end had everything"
        if not may_break:
            reasons = {end.plan.reason for end in ends if end.plan.breaks}
            assert all(end.reason is None or end.reason in reasons for end in ends), "reset for another reason"
