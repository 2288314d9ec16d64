"""Measurements in turn: again when the link's emulator was late, left out when they fail or time is over."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from tests.bench.measure import BenchError
from tests.netlab import RunVoid

ATTEMPTS = 3

Result = TypeVar("Result")


@dataclass(slots=True)
class Section:
    """One table in the making. `until` is when, in time.monotonic(), nothing new is begun."""

    rounds: int
    seconds: int
    say: Callable[[str], None]
    until: float
    left_out: list[str] = field(default_factory=list)
    others_cores: float = 0.0
    _over: bool = False

    @property
    def median(self) -> str:
        """What is shown of a figure."""
        return f"median of {self.rounds} rounds" if self.rounds > 1 else "one round"

    def measure(self, turn: int, name: str, once: Callable[[], Result], show: Callable[[Result], str]) -> Result | None:
        """What `once` returns, or None if it did not come about."""
        if time.monotonic() >= self.until:
            if not self._over:
                self._leave_out(f"all from round {turn + 1}, {name} on: the time was over")
            self._over = True
            return None
        why: Exception | None = None
        for _ in range(ATTEMPTS):
            try:
                result = once()
            except RunVoid as void:
                why = void
            except BenchError as error:
                why = error
                break
            else:
                self.say(f"round {turn + 1}: {name}: {show(result)}")
                return result
        self._leave_out(f"round {turn + 1}, {name}: {why}")
        return None

    def without(self, what: str, why: str) -> None:
        """Note what is not even tried."""
        self._leave_out(f"{what}: {why}")

    def _leave_out(self, what: str) -> None:
        self.left_out.append(f"Left out: {what}.")
        self.say(self.left_out[-1])
