"""Stripes on their way out, with stripes and a share that only note what is done to them."""

from types import SimpleNamespace
from typing import Any

import pytest

from workers.core import frame
from workers.io import mesh, parting
from workers.io.parting import END_US, PATH_US, REPLACED_US, Parting


class World:
    def __init__(self, patch: pytest.MonkeyPatch, end: int) -> None:
        self.now_us = 1_000_000
        patch.setattr(parting, "clock_us", lambda: self.now_us)
        self.lost: list[Any] = []
        self.told: list[int] = []
        share: Any = SimpleNamespace(end=end, rtt_us=10_000, lose_path=self.lost.append)
        exchange: Any = SimpleNamespace(tell_all=lambda kind, **fields: self.told.append(kind))
        self.parting = Parting(share, exchange)

    def passes(self, time_us: int) -> None:
        self.now_us += time_us
        self.parting.on_time(self.now_us)


class Stripe:
    """`left`, `failed`: what was done to it."""

    def __init__(self, world: World, *, moved: bool = False, stalled: bool = False) -> None:
        self.world, self.moved, self.stalled = world, moved, stalled
        self.index = 3
        self.closed = self.in_order = self.left = False
        self.path = SimpleNamespace(generation=1, stalled=False)
        self.failed = ""

    def sample(self, _frame_max_bytes: int) -> None:
        pass

    def leave(self) -> None:
        self.left = True

    def fail(self, why: str) -> None:
        if not self.closed:
            self.closed, self.failed = True, why
            self.world.parting.on_lost(self)  # type: ignore[arg-type]

    close = leave

    def ends(self) -> None:
        self.in_order = self.left or self.moved
        self.fail("closed by the peer")


def part(world: World, **state: bool) -> Any:
    stripe: Any = Stripe(world, **state)
    world.parting.part(stripe)
    return stripe


def test_path_of_a_stripe_that_ended_in_order_stays_for_what_was_sent_last(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, frame.CLIENT)
    stripe = part(world)
    assert stripe.left and len(world.parting) == 1
    stripe.ends()
    assert len(world.parting) == 0 and not world.lost
    world.passes(PATH_US)
    assert not world.lost
    world.passes(20_000)
    assert world.lost == [stripe.path] and world.told == [mesh.LOST]
    world.passes(END_US)
    assert len(world.lost) == 1


def test_stripe_that_breaks_while_it_is_left_loses_its_path_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, frame.CLIENT)
    stripe = part(world)
    stripe.fail("reset")
    assert world.lost == [stripe.path]


def test_stripe_that_stalls_is_closed_when_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, frame.CLIENT)
    stripe = part(world, stalled=True)
    assert stripe.closed and not stripe.left and world.lost == [stripe.path]


def test_server_gives_a_client_a_moment_to_say_that_it_has_replaced_a_stripe(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, frame.SERVER)
    silent, said = part(world), part(world)
    assert not silent.left
    world.passes(REPLACED_US // 2)
    said.moved = True
    world.parting.leave(said)
    world.passes(REPLACED_US)
    assert silent.failed and said.left and not said.closed
    assert world.lost == [silent.path]
    world.passes(END_US)
    assert said.failed == "does not end" and len(world.lost) == 2


def test_stripe_that_is_no_part_of_this_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, frame.CLIENT)
    assert not world.parting.on_lost(Stripe(world))  # type: ignore[arg-type]
    moved: Any = Stripe(world, moved=True)
    moved.ends()
    assert not world.lost, "its end was announced"
