"""Signals as data: handlers only note, the loop reads; blocked around a fork, reset in the child."""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator

# What an operator, a terminal or a service manager may send to the whole process group. A worker ignores these: what
# it has to do the supervisor tells it over its channel, so that a signal to the group still drains.
FOR_SUPERVISOR = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
NOTED = (signal.SIGCHLD, *FOR_SUPERVISOR)


class SignalQueue:
    """The numbers of the signals that arrived, in a pipe that a selector can watch."""

    def __init__(self, noted: Iterable[signal.Signals] = NOTED) -> None:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for signum in noted:
            signal.signal(signum, _note)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)

    def fileno(self) -> int:
        return self._reading

    def take(self) -> list[int]:
        try:
            return list(os.read(self._reading, 512))
        except BlockingIOError:
            return []

    def close(self) -> None:
        """The handlers stay, so that a signal between here and the end of the process does not change its exit code."""
        signal.set_wakeup_fd(-1)
        self.close_in_child()

    def close_in_child(self) -> None:
        os.close(self._reading)
        os.close(self._writing)


def _note(signum: int, frame: object) -> None:
    """The interpreter has written the number into the pipe."""


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Holds back all that is noted, until the end of the block or `reset_in_worker`; a successor of this program until
    `let_come`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NOTED)
    try:
        yield
    finally:
        let_come()


def let_come() -> None:
    """Ends what `blocked` began, perhaps in the program before this one. What came meanwhile arrives now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTED)


def reset_in_worker() -> None:
    """Nothing of the supervisor's handling stays; then the block that was set around the fork is lifted."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for signum in FOR_SUPERVISOR:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTED)
