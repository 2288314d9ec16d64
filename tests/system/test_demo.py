"""The demo: what it shows, and that nothing is left of it, however it ends."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.demo import kcptun
from tests.netlab import RunVoid, rerun_if_void

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
SET_CHILD_SUBREAPER = 36
STRIPED = ("directly", "through 1 stripe", "through 10 stripes", "through 40 stripes")
WAYS = (*STRIPED, *(["kcptun directly", "kcptun through 10 ports"] if kcptun.programs() else []))
WITH_KCPTUN = pytest.mark.skipif(kcptun.programs() is None, reason="no kcptun here (Debian: kcptun)")


class Demo:
    """The demo in a session of its own, with temporary files in `folder`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.before = descendants(os.getpid())
        self.output = folder.with_suffix(".out")
        with open(self.output, "wb") as output:
            self.process: subprocess.Popen[Any] = subprocess.Popen(
                [sys.executable, "-m", "tests.demo", "--quick", *arguments],
                cwd=ROOT,
                env=os.environ | {"TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait(self, text: str = "", seconds: float = 90.0) -> None:
        """For an output with `text`, or for so long, or until it ends."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until and not (text and text in self.text()):
            time.sleep(0.02)

    def text(self) -> str:
        return self.output.read_text()

    def left(self) -> list[str]:
        """Processes that it left and that do not go within a second. Its namespaces have no name: they go with them."""
        until = time.monotonic() + 1
        while (lost := descendants(os.getpid()) - self.before) and time.monotonic() < until:
            for pid in lost:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)
        return [f"{pid}: {Path(f'/proc/{pid}/cmdline').read_bytes()!r}" for pid in lost]


def descendants(ancestor: int) -> set[int]:
    parents: dict[int, int] = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[int(pid)] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


@pytest.fixture
def folder() -> Iterator[Path]:
    """For temporary files. Meanwhile, orphans of our descendants become our children, so that none is overlooked."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    with tempfile.TemporaryDirectory(prefix="demo-test-") as name:
        inner = Path(name, "tmp")
        inner.mkdir()
        yield inner
    libc.prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def speeds(text: str) -> dict[str, list[str]]:
    """The table's cells by its first column."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row[0] in WAYS}


@rerun_if_void()
def test_demo_shows_that_stripes_add_up_and_leaves_nothing(folder: Path) -> None:
    demo = Demo(folder)
    demo.wait()
    text = demo.text()
    assert demo.left() == []
    assert list(folder.iterdir()) == []
    if demo.process.returncode and "too busy" in text:
        raise RunVoid(text)
    assert demo.process.returncode == 0, text
    table = speeds(text)
    assert tuple(table) == WAYS, text
    assert {cells[-1] for cells in table.values()} == {"equal"}, text
    assert "\x1b" not in text
    if "refused" not in text:
        assert float(table["through 1 stripe"][3]) >= 0.8, text
        assert float(table["through 10 stripes"][3]) >= 5, text
        assert not kcptun.programs() or float(table["kcptun through 10 ports"][3]) >= 3, text


def test_demo_without_kcptun_says_so_and_shows_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = folder.parent / "bin"
    programs.mkdir()
    for place in os.environ["PATH"].split(":"):
        for program in Path(place).glob("[!k]*"):
            with contextlib.suppress(FileExistsError):
                (programs / program.name).symlink_to(program)
    monkeypatch.setenv("PATH", str(programs))
    demo = Demo(folder, "--loopback")
    demo.wait()
    text = demo.text()
    assert demo.left() == []
    assert demo.process.returncode == 0, text
    assert text.count("apt-get install kcptun") == 1
    assert tuple(speeds(text)) == STRIPED, text


def test_demo_without_namespaces_says_that_nothing_is_limited(folder: Path) -> None:
    demo = Demo(folder, "--loopback")
    demo.wait()
    text = demo.text()
    assert demo.left() == []
    assert list(folder.iterdir()) == []
    assert demo.process.returncode == 0, text
    assert "nothing limits" in text
    assert "times direct" not in text
    assert {cells[-1] for cells in speeds(text).values()} == {"equal"}, text


@pytest.mark.parametrize(
    ("text", "seconds", "arguments"),
    [
        ("", 0.2, []),
        ("", 0.7, []),
        ("everywhere", 0.5, []),
        ("directly:", 0.8, []),
        ("1 stripe:", 2.0, []),
        ("1 stripe:", 0.8, ["--loopback"]),
        pytest.param("kcptun directly:", 0.8, ["--loopback"], marks=WITH_KCPTUN),
    ],
    ids=["importing", "compiling", "direct", "starting", "transfer", "loopback", "ports"],
)
def test_interrupted_demo_leaves_nothing(folder: Path, text: str, seconds: float, arguments: list[str]) -> None:
    demo = Demo(folder, *arguments)
    if text:
        demo.wait(text)
    demo.wait(seconds=seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(demo.process.pid, signal.SIGINT)
    demo.wait(seconds=20)
    said = demo.text()
    assert demo.left() == []
    assert list(folder.iterdir()) == []
    if text:
        assert demo.process.returncode == 128 + signal.SIGINT, said
    assert demo.process.returncode is not None
    assert said.endswith("Interrupted. Nothing is left running.\n") or "KeyboardInterrupt" in said, said


def test_terminated_demo_leaves_nothing(folder: Path) -> None:
    demo = Demo(folder)
    demo.wait("directly:")
    demo.wait(seconds=1.5)
    demo.process.terminate()
    demo.wait(seconds=20)
    assert demo.process.returncode == 128 + signal.SIGTERM, demo.text()
    assert demo.left() == []
    assert list(folder.iterdir()) == []
