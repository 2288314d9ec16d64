"""The corpus: `corpus/TARGET/NAME`, seeds by their names and found inputs by their digests.

Kept small: of what a run found, only inputs that reach lines, or follow each other's in a new order, which the smaller
ones do not.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.targets import Target

ROOT = Path(__file__).parent / "corpus"
PRODUCT = (str(ROOT.parents[2] / "forwarder"), str(ROOT.parents[2] / "workers"))
KEPT_BYTES_MAX = 4096
KEPT_MAX = 40
"""Inputs a target, seeds included."""

Step = tuple[str, int, int]
"""A file of the product, a line, and the line of the same call before it."""


def directory(target: Target) -> Path:
    """Where the target's inputs are."""
    return ROOT / target.name


def write_seeds(target: Target) -> None:
    """Write the target's seeds, as they follow from its code."""
    directory(target).mkdir(parents=True, exist_ok=True)
    for name, data in target.seeds.items():
        (directory(target) / name).write_bytes(data)


def steps_of(run: Callable[[bytes], None], data: bytes) -> set[Step]:
    """The steps that the product takes on `data`."""
    steps: set[Step] = set()

    def trace(called: FrameType, _event: str, _argument: Any) -> Any:
        file = called.f_code.co_filename
        if not file.startswith(PRODUCT):
            return None
        before = 0

        def trace_line(current: FrameType, event: str, _argument: Any) -> Any:
            nonlocal before
            if event == "line":
                steps.add((file, before, current.f_lineno))
                before = current.f_lineno
            return trace_line

        return trace_line

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        run(data)
    finally:
        sys.settrace(former)
    return steps


def keep(target: Target, found: Iterable[Path]) -> int:
    """Add to the corpus those of the `found` inputs that do something new; returns how many."""
    kept = [file.read_bytes() for file in sorted(directory(target).iterdir())]
    known: set[Step] = set()
    for data in kept:
        known |= steps_of(target.run, data)
    candidates = sorted({file.read_bytes() for file in found}, key=lambda data: (len(data), data))
    news = [(data, steps_of(target.run, data) - known) for data in candidates if len(data) <= KEPT_BYTES_MAX]
    added = 0
    while len(kept) + added < KEPT_MAX:
        news = [(data, left) for data, steps in news if (left := steps - known)]
        if not news:
            break
        data, steps = max(news, key=lambda each: (len(each[1]), -len(each[0])))
        (directory(target) / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        known |= steps
        added += 1
    return added
