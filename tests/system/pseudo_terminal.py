"""A program in a terminal of one's own: what it shows as lines of text, and keys pressed for it.

    with PseudoTerminal([sys.executable, "-m", "forwarder", "top", "-c", "client.toml"], 80, 24) as terminal:
        terminal.wait(lambda screen: "quit" in screen.text)
        terminal.press("q")

The screen understands no more than `top` writes: whole lines at an address, and switches.
"""

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

_LINE = re.compile(r"\x1b\[(\d+);1H(.*?)\x1b\[K", re.DOTALL)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SWITCH = re.compile(r"\x1b\[\?(\d+)([hl])")
WAIT_S = 10.0


class Screen:
    """`written` is everything that was written so far."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self.written = ""

    def on(self, number: int) -> bool | None:
        """Whether a private mode is on; None: it was never set. 1049 is the alternate screen, 25 the cursor."""
        switched = [state == "h" for mode, state in _SWITCH.findall(self.written) if int(mode) == number]
        return switched[-1] if switched else None

    @property
    def coloured(self) -> list[str]:
        """The lines with their escape sequences."""
        shown = [""] * self.lines
        for number, line in _LINE.findall(self.written.rpartition("\x1b[2J")[2]):
            if int(number) <= self.lines:
                shown[int(number) - 1] = line
        return shown

    @property
    def rows(self) -> list[str]:
        return [_COLOUR.sub("", line).rstrip() for line in self.coloured]

    @property
    def text(self) -> str:
        return "\n".join(self.rows)


class PseudoTerminal:
    """Runs a program as the leader of a session that has this terminal."""

    def __init__(self, argv: Sequence[str], columns: int, lines: int, **environment: str) -> None:
        self.screen = Screen(columns, lines)
        self.master, slave = os.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | environment
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                os.setsid()
                fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
                for fd in (0, 1, 2):
                    os.dup2(slave, fd)
                os.execvpe(argv[0], list(argv), env)
            os._exit(127)
        self._exit: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._exit is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)

    def ended(self, code: int) -> None:
        """Somebody else has waited for its end."""
        self._exit = code

    def resize(self, columns: int, lines: int) -> None:
        """The kernel tells the program."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.columns, self.screen.lines = columns, lines

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def modes(self) -> list[Any]:
        """What termios says; equal to `before` once the program has given the terminal back."""
        return termios.tcgetattr(self.slave)

    def read(self, wait_s: float) -> None:
        """What the program has written, waiting a while for the first of it."""
        if select.select([self.master], [], [], wait_s)[0]:
            with contextlib.suppress(OSError):
                self.screen.written += os.read(self.master, 1 << 20).decode("utf-8", "replace")

    def wait(self, condition: Callable[[Screen], Any], timeout_s: float = WAIT_S) -> None:
        """Until the screen is as it should be."""
        deadline = time.monotonic() + timeout_s
        while not condition(self.screen):
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s:\n{self.screen.text}"
            self.read(0.1)

    def watch(self, time_s: float) -> None:
        """Lets the program go on for a while."""
        deadline = time.monotonic() + time_s
        while (left_s := deadline - time.monotonic()) > 0:
            self.read(left_s)

    def exit_code(self, timeout_s: float = WAIT_S) -> int:
        """Waits for the end; negative: the signal that ended it."""
        deadline = time.monotonic() + timeout_s
        while self._exit is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.read(0.0 if pid else 0.02)
            if pid:
                self._exit = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, f"still there after {timeout_s:g} s:\n{self.screen.text}"
        self.read(0.0)
        return self._exit
