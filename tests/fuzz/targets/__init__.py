"""The targets by name. Each module has `run` (raises where the product is wrong) and `SEEDS` (valid inputs by name)."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

NAMES = (
    "handshake",
    "record",
    "frame",
    "share",
    "stripe",
    "session",
    "mesh",
    "ring",
    "config",
    "notations",
    "control",
    "datagram",
    "inner",
    "fragment",
    "segment",
)


@dataclass(frozen=True, slots=True)
class Target:
    """`run` takes any bytes; `seeds` are such as make it succeed."""

    name: str
    run: Callable[[bytes], None]
    seeds: Mapping[str, bytes]


def load(name: str) -> Target:
    """Imports the target, and with it what it tests."""
    module = importlib.import_module(f"{__name__}.{name}")
    return Target(name, module.run, module.SEEDS)
