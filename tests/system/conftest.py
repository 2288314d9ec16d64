"""What system tests share: where there can be no lab they are skipped, the links that several of them use, and the
backends of fake TCP.

Tests that use `backend` and are marked `pcap` run with that backend, too; with FORWARDER_TEST_LONG=1 all that use it.
"""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.netlab import Lab, LabUnavailable, Link
from tests.system import spray_pair
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = os.environ.get("FORWARDER_TEST_LONG") or metafunc.definition.get_closest_marker("pcap")
    if "backend" in metafunc.fixturenames and wanted:
        metafunc.parametrize("backend", ["packet", "pcap"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of every SprayPair that is made while this lives."""
    name: str = getattr(request, "param", spray_pair.DEFAULT_BACKEND)
    if name == "pcap":
        pytest.importorskip("pcap", reason="no pypcap here: deploy/venv test says why")
    spray_pair.backend_in_use[0] = name
    yield name
    spray_pair.backend_in_use[0] = spray_pair.DEFAULT_BACKEND


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
