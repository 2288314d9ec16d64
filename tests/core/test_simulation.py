"""Thousands of runs of a whole session pair. A failure names its seed: `Simulation(seed).run()` repeats it.

FORWARDER_SIMULATION_SEEDS sets how many seeds are run, FORWARDER_SIMULATION_FIRST where they begin.
"""

import os
from collections import Counter

import pytest

from tests.core.simulation import Simulation
from workers.core import frame
from workers.core.session import SessionShare

SEEDS = int(os.environ.get("FORWARDER_SIMULATION_SEEDS", "2000"))
FIRST = int(os.environ.get("FORWARDER_SIMULATION_FIRST", "0"))
BLOCK = max(SEEDS // 20, 1)


def run(seed: int) -> Simulation:
    try:
        simulation = Simulation(seed)
        simulation.run()
    except Exception as error:
        error.add_note(f"seed {seed}")
        raise
    return simulation


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, BLOCK))
@pytest.mark.deadline(1200)
def test_session_survives_everything_that_a_seed_does_to_it(first: int) -> None:
    for seed in range(first, first + BLOCK):
        run(seed)


def test_one_seed_is_one_run() -> None:
    """Two runs of a seed take the same steps to the last one."""
    first, second = run(7), run(7)
    assert (first.loop.events, first.loop.now_us) == (second.loop.events, second.loop.now_us)
    assert list(first.flows) == list(second.flows)


def test_seeds_bring_about_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first runs, all together, lose and repeat and block as much as the simulator is there to make them."""
    seen: Counter[str] = Counter()

    def count(method: str) -> None:
        original = getattr(SessionShare, method)

        def counting(self: SessionShare, *arguments: object) -> object:
            seen[method] += 1
            return original(self, *arguments)

        monkeypatch.setattr(SessionShare, method, counting)

    for method in ("on_blocked", "on_bound", "on_peer_gone", "reset_stream", "on_fin", "ack_again", "send_again"):
        count(method)
    for seed in range(120):
        simulation = run(seed)
        seen["faultless"] += not simulation.faults.any
        seen["several workers"] += max(simulation.workers_per_end) > 1
        for worker in simulation.workers[frame.CLIENT].values():
            seen["reinjected"] += worker.share.reinjected_bytes
            seen["duplicates"] += worker.share.duplicate_bytes
            seen["hedged"] += worker.hedged
            seen["passed on"] += worker.passed_on
            seen["reset streams"] += worker.share.reset_streams
        for flow in simulation.flows.values():
            if flow.client.complete and flow.server is not None:
                seen["complete"] += 1
                seen["zero bytes"] += not flow.client.plan.source and not flow.server.plan.source
                seen["server first"] += flow.client.plan.starts != "at once"
                seen["both at once"] += len(flow.client.received) > 10_000 and len(flow.server.received) > 10_000
    assert len(seen) == 18
    assert all(seen.values()), seen
