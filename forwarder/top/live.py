"""The loop of `top`: what has come in (keys, signals, an answer), then what is due (a question), then the screen."""

import io
import os
import selectors
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from forwarder.top.asker import Answer, Asker
from forwarder.top.keys import Keys
from forwarder.top.model import Model
from forwarder.top.terminal import Terminal, TerminalGone, check_terminal
from forwarder.top.view import FULL, PLAIN, Glyphs, frame

ESCAPE_S = 0.1
"""What follows an escape character later than this does not belong to it."""


def run(title: str, control_socket: Path, interval_s: float) -> int:
    """Shows the instance until the operator quits. Returns the exit code; raises WrongUsage without a terminal."""
    check_terminal()
    try:
        with Terminal() as terminal:
            return Live(terminal, Model(title, interval_s), Asker(control_socket)).run()
    except TerminalGone:
        return 128 + signal.SIGHUP


class Live:
    """One look at one instance."""

    def __init__(self, terminal: Terminal, model: Model, asker: Asker) -> None:
        self._terminal = terminal
        self._model = model
        self._asker = asker
        self._keys = Keys()
        self._glyphs = glyphs_of(os.environ.get("TERM", ""), sys.stdout.encoding or "")
        self._selector = selectors.DefaultSelector()
        self._answered_s = float("-inf")
        self._changed = True
        self._exit_code: int | None = None

    def run(self) -> int:
        """The exit code."""
        self._selector.register(self._terminal, selectors.EVENT_READ, self._on_keys)
        self._selector.register(self._terminal.signals, selectors.EVENT_READ, self._on_signals)
        try:
            while self._exit_code is None:
                self._turn()
        finally:
            self._asker.close()
            self._selector.close()
        return self._exit_code

    def _turn(self) -> None:
        now = time.monotonic()
        if self._asker.socket is not None and now >= self._asker.deadline_s:
            self._selector.unregister(self._asker.socket)
            self._take(self._asker.on_time())
        if self._asker.socket is None and not self._model.paused and now >= self._answered_s + self._model.interval_s:
            self._ask(now)
        if self._changed:
            self._draw()
        events = self._selector.select(self._patience_s(now))
        for key, _ in events:
            key.data()
        if self._keys.pending and not events:
            self._press(self._keys.flush())
        if self._model.done:
            self._exit_code = 0

    def _patience_s(self, now: float) -> float | None:
        due = []
        if self._keys.pending:
            due.append(now + ESCAPE_S)
        if self._asker.socket is not None:
            due.append(self._asker.deadline_s)
        elif not self._model.paused:
            due.append(self._answered_s + self._model.interval_s)
        return max(0.0, min(due) - now) if due else None

    # The instance

    def _ask(self, now: float) -> None:
        answer = self._asker.ask(now)
        if answer is not None:
            self._take(answer)
        if self._asker.socket is not None:
            self._selector.register(self._asker.socket, selectors.EVENT_READ, self._on_answer)

    def _on_answer(self) -> None:
        assert self._asker.socket is not None
        fd = self._asker.socket.fileno()
        answer = self._asker.on_readable()
        if answer is not None:
            self._selector.unregister(fd)
            self._take(answer)

    def _take(self, answer: Answer) -> None:
        """The next question is due an interval later: what two answers in a hurry differ by is not a rate."""
        self._answered_s = time.monotonic()
        if answer.status is not None:
            self._model.on_answer(answer.status)
        else:
            self._model.on_silence(answer.silence)
        self._changed = True

    # The operator

    def _on_keys(self) -> None:
        data = self._terminal.read()
        if not data:
            self._exit_code = 128 + signal.SIGHUP
            return
        self._press(self._keys.feed(data))

    def _press(self, keys: list[str]) -> None:
        for key in keys:
            if key == "redraw":
                self._terminal.forget()
            self._model.on_key(key)
        self._changed = self._changed or bool(keys)

    def _on_signals(self) -> None:
        for number in self._terminal.signals.take():
            if number == signal.SIGINT:
                self._exit_code = 0
            elif number in (signal.SIGTERM, signal.SIGHUP):
                self._exit_code = 128 + number
            elif number == signal.SIGTSTP:
                self._terminal.suspend()
            elif number == signal.SIGCONT:
                self._terminal.enter()
            self._terminal.forget()
            self._changed = True

    def _draw(self) -> None:
        width, height = self._terminal.size()
        self._terminal.show(painted(frame(self._model, width, height, self._glyphs), width))
        self._changed = False


def glyphs_of(kind: str, encoding: str) -> Glyphs:
    """The kernel's own console has no font for more than a few hundred characters."""
    return FULL if encoding.lower().replace("-", "") == "utf8" and kind != "linux" else PLAIN


def painted(lines: list[Text], width: int) -> list[str]:
    """Each line with the escape sequences of its colours, as far as the environment wants colours."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, markup=False, highlight=False, emoji=False)
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")
    return stream.getvalue().split("\n")[: len(lines)]
