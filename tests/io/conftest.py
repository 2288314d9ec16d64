"""Spray tunnels in one process, made by a test and closed after it (`tests.io.spray_world`)."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.io.spray_world import World


@pytest.fixture
def make_unmet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    """Makes a client and a server that have not met yet."""
    made: list[World] = []

    def build(**settings: Any) -> World:
        made.append(World(monkeypatch, **settings))
        return made[-1]

    yield build
    for world in made:
        world.close()


@pytest.fixture
def make(make_unmet: Callable[..., World]) -> Callable[..., World]:
    """Makes both with all ports up."""
    return lambda **settings: make_unmet(**settings).up()
