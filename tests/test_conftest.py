"""The deadline that guards every other test."""

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
