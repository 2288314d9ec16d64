"""What system tests share: where there can be no lab they are skipped, and the links that several of them use."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.netlab import Lab, LabUnavailable, Link
from tests.system.rig import Rig


def skipped_without_lab() -> Generator[None, object, object]:
    try:
        return (yield)
    except LabUnavailable as why:
        pytest.skip(str(why))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    return (yield from skipped_without_lab())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    return (yield from skipped_without_lab())


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """An instance with fake workers, to be started."""
    made = Rig(tmp_path)
    yield made
    made.clear()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A bare wire."""
    with Lab(emulate=False) as made:
        yield made


@pytest.fixture(scope="module")
def link() -> Iterator[Lab]:
    """A link of 100 Mbit/s and 20 ms, which one worker's stripes fill, and which can be broken."""
    with Lab(Link(delay_ms=10, rate_bps=100e6)) as made:
        yield made
