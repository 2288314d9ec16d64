"""What goes to the next program: the same comes out, and what cannot be taken over is refused in one line."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from forwarder.errors import ForwarderError
from forwarder.generation import SLOTS, free_block
from forwarder.listeners import Wanted
from forwarder.reload import begin
from forwarder.upgrade import (
    VARIABLE,
    VERSION,
    GenerationState,
    MeshState,
    Program,
    SlotState,
    State,
    WorkerState,
    check_upgrade,
    decode,
    encode,
    inherited,
)
from tests.forwarder.test_reload import WEB, settings
from workers.boot import RingFds
from workers.settings import Address, Key


@pytest.fixture
def state() -> Iterator[State]:
    """One whose descriptors are all open."""
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(15)]
    left = iter(fds)
    worker = WorkerState(7, 1234, next(left), "READY", True, 1.5)
    slots = [SlotState(2, 0, (next(left), next(left)), 3, None, worker)]
    running = begin(settings(WEB, keys=(Key("a", bytes(range(32)), frozenset({"web"})),)), lambda: 1 << 63)
    yield State(
        running=running,
        generations=[GenerationState(2, 1, "SERVING", False, None, slots)],
        mesh=MeshState({2: 7}, {2: next(left)}, [(2, 3, RingFds(next(left), next(left), next(left)))]),
        doors=[(Wanted("port", Address("::", 80), "udp"), [next(left)])],
        boot_id=(1 << 64) - 1,
        serial=9,
        heartbeat=next(left),
        stats=next(left),
        lifetime=(next(left), next(left)),
        log_lines=(next(left), next(left)),
        control=next(left),
        control_path="/run/x.sock",
        pid_file=("/run/x.pid", fds[0]),
        daemon=True,
        started_s=2.5,
    )
    for fd in fds:
        os.close(fd)


def test_state_survives_the_journey(state: State) -> None:
    assert decode(encode(state)) == state
    assert len(set(state.descriptors())) == 15


def test_state_of_another_version_is_refused(state: State) -> None:
    other = msgspec.json.encode({"version": VERSION + 1, "something": "else"})
    with pytest.raises(ValueError, match=f"expected a state of version {VERSION}, found {VERSION + 1}"):
        decode(other)


def test_missing_descriptor_is_named(state: State) -> None:
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(ValueError, match=f"descriptor {closed} is not open"):
        decode(encode(msgspec.structs.replace(state, control=closed)))


def test_inherited_state_is_found_once_and_not_passed_on(state: State) -> None:
    for fd in state.descriptors():
        os.set_inheritable(fd, True)
    memory = os.memfd_create("test")
    os.write(memory, encode(state))
    environment = {VARIABLE: str(memory), "HOME": "/"}
    assert inherited(environment) == state
    assert environment == {"HOME": "/"} and inherited(environment) is None
    assert not any(os.get_inheritable(fd) for fd in state.descriptors())
    with pytest.raises(OSError):
        os.fstat(memory)


@pytest.mark.parametrize("number", ["x", "999999"])
def test_state_that_is_not_there_is_one_line(number: str) -> None:
    with pytest.raises(ForwarderError, match=r"^cannot take over from the version before: "):
        inherited({VARIABLE: number})


def test_damaged_state_is_one_line() -> None:
    memory = os.memfd_create("test")
    os.write(memory, b'{"version": 1}')
    with pytest.raises(ForwarderError, match=r"^cannot take over from the version before: "):
        inherited({VARIABLE: str(memory)})


def test_program_is_asked_for_its_whole_and_for_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/forwarder/__main__.py", "start", "-c", "it.toml"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-X", "dev", "-m", "forwarder", "start", "-c", "it.toml"])
    program = Program.of_this_process()
    assert program.prefix == (sys.executable, "-X", "dev", "-m", "forwarder")
    assert program.arguments == ("start", "-c", "it.toml") and program.directory == os.getcwd()
    assert program.check(Path("/it.toml"))[5:] == ["check", "--upgrade-from", str(VERSION), "-c", "/it.toml"]


def test_program_that_is_gone_leaves_all_as_it_was(state: State, tmp_path: Path) -> None:
    program = Program((str(tmp_path / "missing"),), (), str(tmp_path))
    here, before = os.getcwd(), os.listdir("/proc/self/fd")
    with pytest.raises(OSError):
        program.become(state)
    assert os.getcwd() == here and os.listdir("/proc/self/fd") == before
    assert not any(os.get_inheritable(fd) for fd in state.descriptors())


def test_check_refuses_a_state_that_it_does_not_know() -> None:
    with pytest.raises(ForwarderError, match=f"expected a state of version {VERSION} to take over, found 999"):
        check_upgrade(999)


def test_generation_takes_the_lowest_free_block() -> None:
    assert free_block([], 4) == 0
    assert free_block([0, 1], 4) == 2
    assert free_block([2], 2) == 0
    assert free_block([2], 3) == 3
    assert free_block(range(64), 64) == 64
    assert free_block([*range(64), 100], 64) is None
    assert free_block([], SLOTS) == 0


def test_socket_of_another_program_stays_non_blocking() -> None:
    from forwarder.doors import taken_over  # noqa: PLC0415

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, taken_over(os.dup(sock.fileno())) as same:
        assert not same.getblocking()
