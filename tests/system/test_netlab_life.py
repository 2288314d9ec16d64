"""The lab leaves nothing behind, however it ends, and says why when there is none."""

import json
import os
import pwd
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.netlab import Lab, Link, RunVoid, rerun_if_void

ROOT = Path(__file__).parents[2]

MAKER = """
import json, os, subprocess, time
from tests.netlab import Lab, Link
with Lab(Link(delay_ms=1)) as lab:
    lab.popen("client", ["sleep", "60"])
    lab.popen("server", ["sh", "-c", "setsid sleep 60 & sleep 60"])
    held = lab.socket("server")
    time.sleep(0.2)
    inodes = [os.fstat(int(fd)).st_ino for fd in os.listdir("/proc/self/fd") if "net:[" in _link(fd)]
    print(json.dumps(inodes), flush=True)
    {then}
"""
LINK_OF = """
import os
def _link(fd):
    try:
        return os.readlink("/proc/self/fd/" + fd)
    except OSError:
        return ""
"""

REFUSAL = """
from tests.netlab import Lab, NamespacesRefused
try:
    with Lab():
        print("made")
except NamespacesRefused as refused:
    print("refused:", refused)
"""

TRANSFER = """
import os
from tests.netlab import Lab, Link, NamespacesRefused
assert os.geteuid() != 0
try:
    with Lab(Link(delay_ms=1)) as lab, lab.listen("server", lab.server_ip6) as listener:
        with lab.connect("client", lab.server_ip6, listener.getsockname()[1]) as client:
            client.sendall(b"unprivileged")
            print(listener.accept()[0].recv(100).decode(), lab.run("client", ["ip", "-o", "link"]).stdout.count("eth0"))
except NamespacesRefused as refused:
    print("refused:", refused)
"""


def processes_in(namespaces: Iterable[int]) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdigit() and os.stat(f"/proc/{entry}/ns/net").st_ino in namespaces:
                found.append(int(entry))
    return found


def interfaces() -> list[tuple[int, str]]:
    return socket.if_nameindex()


def temporary() -> list[str]:
    return sorted(name for name in os.listdir(tempfile.gettempdir()) if name.startswith("netlab"))


def start_maker(then: str) -> tuple[subprocess.Popen[str], list[int]]:
    maker = subprocess.Popen(
        [sys.executable, "-c", LINK_OF + MAKER.format(then=then)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    namespaces = json.loads(maker.stdout.readline())
    assert len(namespaces) == 3
    assert len(processes_in(namespaces)) >= 5  # four sleepers and shells, the emulator; the keeper in one of them, too
    return maker, namespaces


def assert_gone(namespaces: list[int]) -> None:
    until = time.monotonic() + 3
    while (left := processes_in(namespaces)) and time.monotonic() < until:
        time.sleep(0.01)
    assert left == []


def test_everything_vanishes_when_the_maker_is_killed() -> None:
    maker, namespaces = start_maker("time.sleep(60)")
    maker.kill()
    with maker:
        assert_gone(namespaces)


def test_everything_vanishes_although_a_fork_of_the_maker_lives_on() -> None:
    maker, namespaces = start_maker("pid = os.fork(); pid and print(pid, flush=True); time.sleep(60)")
    assert maker.stdout is not None
    fork = int(maker.stdout.readline())
    with os.fdopen(os.pidfd_open(fork)) as watched:
        maker.kill()
        assert_gone(namespaces)
        assert not select.select([watched], [], [], 0)[0]
        os.kill(fork, signal.SIGKILL)
    maker.wait()
    maker.stdout.close()


def test_interrupt_cleans_up() -> None:
    maker, namespaces = start_maker("time.sleep(60)")
    before = temporary()
    maker.send_signal(signal.SIGINT)
    with maker:
        assert maker.wait(5) in (1, -signal.SIGINT, 130)
    assert processes_in(namespaces) == []
    assert temporary() == before


def test_leaving_the_block_ends_processes_and_returns_every_descriptor() -> None:
    with Lab(Link(delay_ms=1)):
        pass  # the first one compiles the emulator, which stays open for the next
    here, descriptors, files = interfaces(), len(os.listdir("/proc/self/fd")), temporary()
    with Lab(Link(delay_ms=1)) as lab:
        stubborn = lab.popen("server", ["sh", "-c", "trap '' TERM INT; sleep 60"])
        daemon = int(lab.run("client", ["sh", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!"]).stdout)
        with os.fdopen(os.pidfd_open(daemon)) as watched:
            assert interfaces() == here
            lab.close()
            assert stubborn.returncode == -signal.SIGKILL
            assert select.select([watched], [], [], 2)[0]
    assert interfaces() == here
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert temporary() == files


def test_processes_get_no_descriptor_of_the_lab() -> None:
    with Lab() as lab:
        assert lab.run("client", ["ls", "/proc/self/fd"]).stdout.split() == ["0", "1", "2", "3"]  # 3: ls itself


def test_rerun_repeats_void_runs_only_so_often() -> None:
    calls: list[int] = []

    @rerun_if_void(3)
    def measure(good_at: int) -> int:
        calls.append(1)
        if len(calls) < good_at:
            raise RunVoid("late")
        return len(calls)

    assert measure(3) == 3
    calls.clear()
    with pytest.raises(RunVoid):
        measure(4)


def test_unknown_program_is_said_to_be_missing() -> None:
    with Lab() as lab, pytest.raises(FileNotFoundError):
        lab.run("client", ["no-such-program"])


def test_more_addresses_are_usable_at_once() -> None:
    with Lab(addresses=3) as lab:
        for address in (lab.server_ip4s[2], lab.server_ip6s[2]):
            with lab.listen("server", address) as listener:
                lab.connect("client", address, listener.getsockname()[1]).close()


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_refusal_is_told_apart() -> None:
    """Inside a user namespace that may not have network namespaces."""
    command = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", command, sys.executable, REFUSAL],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    if "unshare" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.stdout.startswith("refused: "), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_lab_without_root() -> None:
    nobody = pwd.getpwnam("nobody")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], env={"PATH": os.environ["PATH"]},
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip

    for python in (sys.executable, "/usr/bin/python3"):
        with suppress(OSError):
            if run(python, "-c", "import sys, tests.netlab; assert sys.version_info >= (3, 11)").returncode == 0:
                break
    else:
        pytest.skip("nobody cannot run Python on this tree")
    mode = os.stat(os.devnull).st_mode
    if mode & 0o006 != 0o006:
        pytest.skip(f"{os.devnull} is {stat.filemode(mode)}: nobody cannot write there")
    done = run(python, "-c", TRANSFER)
    if done.stdout.startswith("refused: "):
        pytest.skip(done.stdout.strip())
    assert done.stdout == "unprivileged 1\n", done.stderr
