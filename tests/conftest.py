"""What every test gets: a deadline, one Hypothesis profile, and its turn where several run at once."""

import fcntl
import signal
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import hypothesis
import pytest

DEADLINE_S = 120.0

# Machines differ in speed, so no deadline per example: the test's own is what counts.
hypothesis.settings.register_profile("forwarder", deadline=None, print_blob=True)
hypothesis.settings.load_profile("forwarder")

# In the background of a script Ctrl-C is ignored, and would be by all programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class DeadlineExceeded(BaseException):
    """The test took too long. No Exception, so that neither the code under test nor Hypothesis handles it."""


@contextmanager
def alarm(seconds: float) -> Generator[None, None, None]:
    """Raise DeadlineExceeded in the main thread after `seconds`, again every second in case it gets lost.

    Works under gevent too: its loop hands what a signal handler raises to the main greenlet.
    """

    def expire(_signal: int, _frame: FrameType | None) -> None:
        raise DeadlineExceeded(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limited(item: pytest.Item) -> Generator[None, object, object]:
    marker = item.get_closest_marker("deadline")
    with alarm(marker.args[0] if marker else DEADLINE_S):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from limited(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from limited(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from limited(item))


# Turns. Two processes run tests (pytest -n 2), since most of these wait. What is marked `alone` measures: nothing else
# runs meanwhile.


@contextmanager
def locked(path: Path, how: int) -> Generator[None, None, None]:
    with path.open("w") as file:
        fcntl.flock(file, how)
        yield


@contextmanager
def turn(place: Path, alone: bool) -> Generator[None, None, None]:
    """Holds the machine, `alone` or with others; whoever waits to be alone lets no others in before."""
    with ExitStack() as held:
        with locked(place / "door", fcntl.LOCK_EX):
            held.enter_context(locked(place / "machine", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if not hasattr(item.config, "workerinput"):  # one process runs them all
        return (yield)
    place: Path = item.config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined]
    with turn(place, item.get_closest_marker("alone") is not None):
        return (yield)
