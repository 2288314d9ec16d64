"""`forwarder top` in a terminal: what it shows of a real instance, what keys and signals do, and that the terminal is
given back whatever happens."""

import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.forwarder.test_render import ANSWER
from tests.netlab import Lab
from tests.system.pair import Pair
from tests.system.pseudo_terminal import PseudoTerminal, Screen

LONG = "FORWARDER_TEST_LONG" in os.environ
ROOT = Path(__file__).parents[2]
CPU_MAX = 0.05


@contextmanager
def answering(path: Path) -> Iterator[None]:
    """An instance that does nothing but answer, a second later each time it is asked."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer() -> None:
        uptime_s = 10.0
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.recv(1000)
                uptime_s += 1.0
                peer.sendall(json.dumps(ANSWER | {"uptime_s": uptime_s}).encode() + b"\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        path.unlink()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration that names the control socket beside it."""
    config = tmp_path / "client.toml"
    config.write_text(f'[control]\nsocket = "{tmp_path / "own.sock"}"\n')
    return config


def top(file: Path, columns: int = 80, lines: int = 24, **environment: str) -> PseudoTerminal:
    environment |= {"PYTHONPATH": str(ROOT)}
    return PseudoTerminal([sys.executable, "-m", "forwarder", "top", "-c", str(file)], columns, lines, **environment)


def shows(*words: str) -> Any:
    return lambda screen: all(word in screen.text for word in words)


def assert_given_back(terminal: PseudoTerminal) -> None:
    """The screen of before, its cursor, its modes."""
    assert (terminal.screen.on(1049), terminal.screen.on(25), terminal.screen.on(7)) == (False, True, True)
    assert terminal.modes() == terminal.before


def test_top_shows_resizes_and_quits(file: Path, tmp_path: Path) -> None:
    with answering(tmp_path / "own.sock"), top(file) as terminal:
        terminal.wait(shows("web stripe", "laptop"))
        screen = terminal.screen
        assert (screen.on(1049), screen.on(25)) == (True, False)
        assert any("\x1b[33m" in line for line in screen.coloured)  # degraded
        terminal.press("a")
        terminal.wait(shows("stripe 2", "50.0 ms"))
        terminal.resize(200, 60)
        terminal.wait(shows("local - peer", "10.0.0.1:40000 - [2001:db8::1]:9000"))
        terminal.resize(20, 5)
        terminal.wait(lambda screen: len(screen.rows[0]) == 20 and screen.rows[4].startswith("q quit"))
        terminal.press("\x1b[B\x1b[6~ps+?")
        terminal.press("q")
        assert terminal.exit_code() == 0
        assert_given_back(terminal)


@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 143)],
)
def test_signal_ends_top_and_gives_the_terminal_back(file: Path, sent: signal.Signals, code: int) -> None:
    with top(file) as terminal:
        terminal.wait(shows("no instance is running", "not running, waiting"))
        if sent == signal.SIGINT:
            terminal.press("\x03")
        else:
            os.kill(terminal.pid, sent)
        assert terminal.exit_code() == code
        assert_given_back(terminal)


def test_top_is_a_job_that_starts_in_the_background_and_stops_and_goes_on(file: Path) -> None:
    """The shell is one that runs commands as jobs."""
    shell = ["bash", "--norc", "--noprofile", "-i"]
    command = f"cd {ROOT}; {sys.executable} -m forwarder top -c {file}"
    with PseudoTerminal(shell, 80, 24, PS1="prompt>", HISTFILE="") as terminal:
        terminal.wait(lambda screen: "prompt>" in screen.written)
        terminal.press(f"{command} &\n")
        terminal.watch(1.0)
        assert terminal.screen.on(1049) is None, "it is in the background, and the terminal is the shell's"
        terminal.press("fg\n")
        terminal.wait(shows("not running, waiting"))
        terminal.press("\x1a")
        terminal.wait(lambda screen: "Stopped" in screen.written)
        assert (terminal.screen.on(1049), terminal.screen.on(25)) == (False, True)
        before = len(terminal.screen.written)
        terminal.press("fg\n")
        terminal.wait(lambda screen: shows("not running, waiting")(since(screen, before)))
        assert (terminal.screen.on(1049), terminal.screen.on(25)) == (True, False)
        before = len(terminal.screen.written)
        terminal.press("q")
        terminal.wait(lambda screen: "prompt>" in screen.written[before:])
        assert terminal.screen.on(1049) is False
        terminal.press("echo code $?; stty -a; exit\n")
        terminal.wait(
            lambda screen: "code 0" in screen.written and re.search(r" icanon .* echo ", screen.written, re.S)
        )
        assert terminal.exit_code() == 0


def since(screen: Screen, start: int) -> Screen:
    """What was written after so many characters."""
    later = Screen(screen.columns, screen.lines)
    later.written = screen.written[start:]
    return later


def test_terminal_that_goes_away_ends_top(file: Path) -> None:
    with top(file) as terminal:
        terminal.wait(shows("waiting"))
        os.close(terminal.slave)
        os.close(terminal.master)
        _, status = os.waitpid(terminal.pid, 0)
        terminal.ended(os.waitstatus_to_exitcode(status))
        assert os.waitstatus_to_exitcode(status) == 129


def test_terminal_without_a_cursor_is_refused(file: Path) -> None:
    with top(file, TERM="dumb") as terminal:
        assert terminal.exit_code() == 2
        assert terminal.screen.written == "top: expected a terminal with a cursor, found TERM=dumb\r\n"


def test_instance_that_stops_and_comes_back(file: Path, tmp_path: Path) -> None:
    with top(file) as terminal:
        terminal.wait(shows("not running, waiting", str(tmp_path)[:40]))
        terminal.press("-")
        with answering(tmp_path / "own.sock"):
            terminal.wait(shows("web stripe", "every 0.5 s"))
        terminal.wait(shows("not running, waiting"))
        terminal.press("q")
        assert terminal.exit_code() == 0


@pytest.mark.skipif(not LONG, reason="starts a pair; FORWARDER_TEST_LONG=1 runs it")
def test_real_client_under_load_is_shown() -> None:
    with (
        Lab(emulate=False) as lab,
        Pair(lab, somaxconn=3) as pair,
        pair.listen() as listener,
        pair.connect() as application,
        listener.accept()[0] as target,
        top(pair.config("client")) as terminal,
    ):
        terminal.wait(shows("web stripe", "3/3"))
        terminal.press("a-")
        target.sendall(bytes(2_000_000))
        left = 2_000_000
        while left:
            left -= len(application.recv(1 << 20))
        terminal.wait(shows("stripe 2", "Mbit/s", "in 2.00 MB"))
        terminal.press("q")
        assert terminal.exit_code() == 0


@pytest.mark.skipif(not LONG, reason="takes a minute; FORWARDER_TEST_LONG=1 runs it")
def test_thousand_carriers_cost_little() -> None:
    """All are expanded and sorted by what moves, on a large terminal, with one look a second."""
    seconds = 20
    with Lab(emulate=False) as lab, Pair(lab, somaxconn=1000, start=False, client_tunnel="dial_rate = 500\n") as pair:
        pair.start("server")
        pair.start("client")
        pair.wait_carriers(1000, 60)
        with top(pair.config("client"), 200, 60) as terminal:
            terminal.wait(shows("1000/1000"))
            terminal.press("assssss")
            terminal.wait(shows("of 1002"))
            process = psutil.Process(terminal.pid)
            before = process.cpu_times()
            terminal.watch(seconds)
            after = process.cpu_times()
            used = after.user + after.system - before.user - before.system
            print(f"top used {used / seconds:.1%} of a core")
            assert used < CPU_MAX * seconds
            terminal.press("q")
            assert terminal.exit_code() == 0
