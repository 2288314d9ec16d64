"""What a service manager is told, as systemd's sd_notify(3) has it: assignments, one a line, in one datagram to the
socket that NOTIFY_SOCKET names.

The environment is left as it is: a supervisor that executes itself anew in the same process tells it again. Telling
never waits and never fails: whoever has no manager, or one that does not listen, runs on.
"""

import contextlib
import os
import socket
import time
from collections.abc import Mapping

WATCHDOGS_MISSED = 2
"""A manager's patience is as many intervals of ours, as sd_watchdog_enabled(3) recommends."""


class ServiceManager:
    """Tells how the instance is. Each method is one message.

    The watchdog is fed once an interval, by who asks `feed` at least as often.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._interval_s = _watchdog_s(environment) / WATCHDOGS_MISSED
        self._fed_s = 0.0
        self.waits = False
        """Whether the last that it heard was `reloading`."""

    def ready(self, status: str) -> None:
        """It serves, or serves again after `reloading`. status: one line for people."""
        self.waits = False
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """What is read anew is in force, or refused, at the next `ready`."""
        self.waits = True
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell("RELOADING=1", f"MONOTONIC_USEC={now_us}", "STATUS=reads its configuration")

    def stopping(self, patience_s: float) -> None:
        """It ends by itself within `patience_s`, whatever the manager's own patience was."""
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(patience_s * 1e6)}", "STATUS=ends")

    def feed(self, now: float) -> None:
        """All is well. now: of the monotonic clock."""
        if self._interval_s and now - self._fed_s >= self._interval_s:
            self._fed_s = now
            self._tell("WATCHDOG=1")

    def _tell(self, *assignments: str) -> None:
        if self._address is None:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), self._address)


def _address(text: str) -> bytes | None:
    """A path, or `@` and a name of the abstract namespace; None for anything else."""
    if text.startswith("@"):
        return b"\0" + os.fsencode(text[1:])
    return os.fsencode(text) if text.startswith("/") else None


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """How long the manager waits for us to be well; 0: it does not, or waits for another process."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    text = environment.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isdecimal() else 0.0
