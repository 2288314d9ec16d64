"""The terminal: a screen of its own, keys as they are pressed, and everything as it was before at the end."""

import contextlib
import errno
import os
import signal
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from forwarder.errors import WrongUsage
from forwarder.signals import SignalQueue

NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)

READ_BYTES = 1024
FOREGROUND_RETRY_S = 0.1

# xterm: alternate screen, cursor, automatic margins.
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
_CLEAR_REST = "\x1b[K"

_LFLAG, _IFLAG = 3, 0


class TerminalGone(Exception):
    """It was closed while it was in use."""


def check_terminal() -> None:
    """Raises WrongUsage where nothing can be shown live."""
    for stream in (sys.stdin, sys.stdout):
        if not stream.isatty():
            name = "input" if stream is sys.stdin else "output"
            raise WrongUsage(f"top: expected a terminal as standard {name}, found none; `forwarder status` needs none")
    kind = os.environ.get("TERM", "")
    if kind in ("", "dumb", "unknown"):
        raise WrongUsage(f"top: expected a terminal with a cursor, found TERM={kind or 'unset'}")


class Terminal:
    """Owns the terminal within its `with` block. `signals` has what came meanwhile, for a selector."""

    def __init__(self) -> None:
        """Standard input and output are terminals."""
        self._input, self._output = sys.stdin.fileno(), sys.stdout.fileno()
        self._found: list[Any] | None = None
        self._own: list[Any] | None = None
        self._shown: list[str] = []
        self.signals = SignalQueue(NOTED)

    def __enter__(self) -> Self:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(TerminalGone):
            self._leave()
        self.signals.close()

    def enter(self) -> None:
        """Takes the terminal, at the start and whenever the process goes on: a shell may have had it in between."""
        self._await_foreground()
        try:
            modes = termios.tcgetattr(self._input)
        except termios.error as error:
            raise TerminalGone from error
        if modes != self._own:
            self._found = modes.copy()
            modes[_LFLAG] &= ~(termios.ICANON | termios.ECHO)
            modes[_IFLAG] &= ~(termios.IXON | termios.ICRNL)
            self._set(modes)
            self._own = termios.tcgetattr(self._input)
        self._shown = []
        self._write(_ENTER)

    def _await_foreground(self) -> None:
        """In the background the terminal is somebody else's, and so are its modes: stops as if it had been written to.
        Where no shell looks after jobs that does not stop, and there is nothing to do but to wait. What ends a process
        ends it at once meanwhile: there is nothing to give back."""
        try:
            if os.tcgetpgrp(self._input) == os.getpgrp():
                return
            with _default(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                while os.tcgetpgrp(self._input) != os.getpgrp():
                    os.kill(os.getpid(), signal.SIGTTOU)
                    time.sleep(FOREGROUND_RETRY_S)
        except OSError as error:
            raise TerminalGone from error

    def suspend(self) -> None:
        """Stops as a terminal's stop key makes a process stop; returns when it goes on."""
        self._leave()
        with _default(signal.SIGTSTP):
            os.kill(os.getpid(), signal.SIGTSTP)
        self.enter()

    def _leave(self) -> None:
        if self._found is not None:
            self._write(_LEAVE)
            self._set(self._found)

    def _set(self, modes: list[Any]) -> None:
        while True:
            try:
                termios.tcsetattr(self._input, termios.TCSANOW, modes)
                return
            except termios.error as error:
                if error.args[0] != errno.EINTR:
                    raise TerminalGone from error

    def fileno(self) -> int:
        """Where keys come from."""
        return self._input

    def read(self) -> bytes:
        """What was typed; empty when the terminal is gone."""
        try:
            return os.read(self._input, READ_BYTES)
        except OSError:
            return b""

    def size(self) -> tuple[int, int]:
        """Columns and lines; where the terminal does not know, what the first ones had."""
        with contextlib.suppress(OSError):
            columns, lines = os.get_terminal_size(self._output)
            if columns and lines:
                return columns, lines
        return 80, 24

    def forget(self) -> None:
        """The screen may show anything: the next lines are all written."""
        self._shown = []

    def show(self, lines: Sequence[str]) -> None:
        """As many lines as the terminal has. Only those that have changed are written."""
        parts = [] if self._shown else ["\x1b[2J"]
        for number, line in enumerate(lines):
            if number >= len(self._shown) or self._shown[number] != line:
                parts.append(f"\x1b[{number + 1};1H{line}{_CLEAR_REST}")
        self._shown = list(lines)
        self._write("".join(parts))

    def _write(self, text: str) -> None:
        data = text.encode(sys.stdout.encoding or "utf-8", "replace")
        try:
            while data:
                data = data[os.write(self._output, data) :]
        except OSError as error:
            raise TerminalGone from error


@contextlib.contextmanager
def _default(*signals: signal.Signals) -> Iterator[None]:
    """Within the block these do what they do to a program that knows nothing of them."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
