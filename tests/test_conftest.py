"""The deadline that guards every other test, and the turns that they take."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DeadlineExceeded, alarm

GEVENT_MAIN = """
import gevent
from tests.conftest import DeadlineExceeded, alarm
try:
    with alarm(0.05):
        gevent.sleep(30)
except DeadlineExceeded:
    print("expired")
"""


def test_busy_test_is_interrupted() -> None:
    with pytest.raises(DeadlineExceeded, match=r"0\.05 s"), alarm(0.05):
        while True:
            pass


def test_test_waiting_in_gevent_is_interrupted() -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", GEVENT_MAIN]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout == "expired\n", done.stderr


def test_marked_test_fails_at_its_deadline(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    (tmp_path / "test_hangs.py").write_text(
        "import pytest\n"
        "@pytest.mark.deadline(0.05)\n"
        "def test_hangs():\n"
        "    while True:\n"
        "        pass\n"
        "def test_after_it_passes():\n"
        "    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(root / "pyproject.toml")]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "DeadlineExceeded: not done after 0.05 s" in done.stdout, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout


TURNS = """
import time
import pytest

@pytest.mark.parametrize(
    "name", [pytest.param(f"{number}-alone", marks=pytest.mark.alone) if number % 3 == 0 else str(number)
             for number in range(12)])
def test_one(name, tmp_path_factory):
    begun = time.monotonic()
    time.sleep(0.1)
    with (tmp_path_factory.getbasetemp().parent / "spans").open("a") as spans:
        spans.write(f"{name} {begun} {time.monotonic()}\\n")
"""


def overlaps(spans: list[tuple[str, float, float]]) -> set[frozenset[str]]:
    return {
        frozenset((one, other))
        for one, begun, ended in spans
        for other, other_begun, other_ended in spans
        if one != other and begun < other_ended and other_begun < ended
    }


def test_what_is_alone_meets_no_other_test_and_the_others_meet(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    (tmp_path / "test_turns.py").write_text(TURNS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(root / "pyproject.toml"), "-n", "2"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}", f"--rootdir={tmp_path}", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "12 passed" in done.stdout, done.stdout + done.stderr
    lines = [line.split() for line in (tmp_path / "base" / "spans").read_text().splitlines()]
    met = overlaps([(name, float(begun), float(ended)) for name, begun, ended in lines])
    assert met
    assert not [pair for pair in met if any(name.endswith("alone") for name in pair)]
