"""Ctrl-C and its relatives, noted rather than obeyed on the spot."""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """`number` is the signal that arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """From its making on, signals that were not ignored are noted; they never interrupt anything."""

    def __init__(self) -> None:
        self.noted = 0
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.noted = self.noted or number

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self.noted:
            raise Interrupted(self.noted)

    def wait(self, condition: Callable[[], Any], timeout_s: float, interval_s: float = 0.05) -> bool:
        """Whether `condition` held within the time; raises Interrupted."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                return False
            time.sleep(interval_s)
        return True
