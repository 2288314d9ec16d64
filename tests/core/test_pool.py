"""The number of stripes against a model of a link: it ends where more would not help, and shrinks back."""

import random

import pytest

from workers.core.pool import IDLE_US, Pool

TICK_US = 100_000
RTT_US = 50_000


class ModelLink:
    """`rate_bps` for all stripes, `each_bps` for one (0: no limit); the rate follows a change within some ticks."""

    def __init__(self, rate_bps: float, each_bps: float, noise: float, seed: int) -> None:
        self.rate_bps, self.each_bps, self.noise = rate_bps, each_bps, noise
        self.random = random.Random(seed)
        self.moved = 0.0
        self.up = 0
        self.speed = 0.0

    def best(self, stripes: int) -> float:
        return min(self.rate_bps, stripes * self.each_bps) if self.each_bps else self.rate_bps

    def pass_tick(self, wanted: int, demand_bps: float) -> None:
        self.up = min(wanted, self.up + 5) if self.up < wanted else wanted
        self.speed += (min(self.best(self.up), demand_bps) - self.speed) * 0.4
        factor = max(0.0, 1 + self.random.gauss(0, self.noise))
        self.moved += self.speed / 8 * TICK_US / 1e6 * factor


def run(pool: Pool, link: ModelLink, seconds: float, start_us: int = 0, demand_bps: float = 1e12) -> list[int]:
    """The sizes, tick by tick."""
    sizes = []
    for tick in range(int(seconds * 1e6 / TICK_US)):
        link.pass_tick(pool.wanted, demand_bps)
        pool.on_sample(start_us + tick * TICK_US, int(link.moved), link.up, RTT_US)
        sizes.append(pool.wanted)
    return sizes


@pytest.mark.parametrize("seed", range(20))
def test_limit_for_each_stripe_makes_the_pool_grow_until_the_link_is_full(seed: int) -> None:
    link = ModelLink(470e6, 9.5e6, 0.05, seed)
    sizes = run(Pool(4, 256), link, 40)
    settled = sizes[250:]
    rates = [link.best(size) for size in settled]
    assert sum(rates) / len(rates) > 0.95 * 470e6, sorted(set(settled))
    assert max(sizes) <= 160
    assert next(tick for tick, size in enumerate(sizes) if link.best(size) > 0.95 * 470e6) < 200


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_no_limit_for_each_stripe_leaves_a_few(noise: float, seed: int) -> None:
    sizes = run(Pool(4, 256), ModelLink(500e6, 0, noise, seed), 600)
    assert sum(sizes) / len(sizes) < 8, sorted(set(sizes))
    assert max(sizes) <= 32


def test_idle_session_shrinks_to_the_least_and_grows_again() -> None:
    pool, link = Pool(4, 256), ModelLink(470e6, 9.5e6, 0.02, 1)
    run(pool, link, 30)
    assert pool.wanted >= 48
    run(pool, link, 6 * IDLE_US / 1e6, 30_000_000, demand_bps=0)
    assert pool.wanted == 4
    run(pool, link, 40, 90_000_000)
    assert link.best(pool.wanted) > 0.95 * 470e6


def test_link_that_becomes_free_needs_fewer() -> None:
    pool, link = Pool(4, 256), ModelLink(470e6, 9.5e6, 0.02, 1)
    run(pool, link, 40)
    link.each_bps = 0
    run(pool, link, 900, 40_000_000)
    assert pool.wanted <= 24


def test_application_that_wants_little_does_not_make_it_grow() -> None:
    sizes = run(Pool(4, 256), ModelLink(470e6, 9.5e6, 0.05, 1), 300, demand_bps=20e6)
    assert sum(sizes) / len(sizes) < 6


def test_never_fewer_than_the_least_nor_more_than_the_most() -> None:
    sizes = run(Pool(2, 20), ModelLink(1e12, 1e6, 0.05, 1), 60)
    assert min(sizes) == 2 and max(sizes) == 20 and sizes[-1] == 20


def test_size_that_another_decided_is_taken_over() -> None:
    pool = Pool(4, 64)
    pool.adopt(48)
    assert pool.wanted == 48
    pool.adopt(1000)
    assert pool.wanted == 64
