"""One instance a socket: a dead one's is taken over, a living one's is not."""

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forwarder import instance
from forwarder.errors import BootError
from forwarder.instance import PidFile, take_control_socket


def test_socket_is_private_and_its_directory_made(tmp_path: Path) -> None:
    path = tmp_path / "run" / "forwarder" / "client.sock"
    sock, stale = take_control_socket(path)
    assert not stale
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o755
    assert sock.getblocking() is False
    sock.close()


def test_socket_of_a_killed_instance_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    take_control_socket(path)[0].close()
    sock, stale = take_control_socket(path)
    assert stale
    sock.close()


def test_socket_of_a_running_instance_is_refused_with_its_pid(tmp_path: Path) -> None:
    sock, _ = take_control_socket(tmp_path / "s")
    with pytest.raises(BootError, match=f"already running with pid {os.getpid()} ") as refused:
        take_control_socket(tmp_path / "s")
    assert refused.value.code == 69
    assert (tmp_path / "s").exists()
    sock.close()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(BootError, match="something else is there"):
        take_control_socket(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "precious"


def test_path_too_long_for_a_socket_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(BootError) as refused:
        take_control_socket(tmp_path / ("x" * 108))
    assert refused.value.code == 78


def test_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BootError) as refused:
        take_control_socket(tmp_path / "file" / "s")
    assert refused.value.code == 69


def test_missing_rights_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> socket.socket:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(instance, "_bind", refuse)
    with pytest.raises(BootError, match="permission denied") as refused:
        take_control_socket(tmp_path / "s")
    assert refused.value.code == 77


def test_directory_that_stays_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "LOCK_TIMEOUT_S", 0.1)
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(BootError, match="stays locked"):
        take_control_socket(tmp_path / "s")
    os.close(held)


def test_pid_file_is_written_and_removed(tmp_path: Path) -> None:
    file = PidFile(tmp_path / "pid")
    file.take()
    assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
    assert os.listdir(tmp_path) == ["pid"]
    file.release()
    file.release()
    assert os.listdir(tmp_path) == []


def test_pid_file_that_is_held_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, forwarder.instance as i\n"
        "i.PidFile(pathlib.Path(sys.argv[1])).take()\nprint(flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pid")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(BootError, match=f"already running with pid {holder.pid} ") as refused:
            PidFile(tmp_path / "pid").take()
        holder.communicate()
    assert refused.value.code == 69
    PidFile(tmp_path / "pid").take()  # its end freed it, though it left the file


@pytest.mark.parametrize("left", [b"", b"999999999\n", b"1\n", b"nonsense"])
def test_pid_file_that_a_killed_instance_left_is_replaced(tmp_path: Path, left: bytes) -> None:
    """Whatever pid it holds: that number may be somebody else's by now."""
    (tmp_path / "pid").write_bytes(left)
    (tmp_path / f".pid.{os.getpid()}").touch()
    file = PidFile(tmp_path / "pid")
    file.take()
    assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
    file.release()


def test_pid_file_in_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BootError) as refused:
        PidFile(tmp_path / "no" / "pid").take()
    assert refused.value.code == 69


def test_release_leaves_a_successors_pid_file(tmp_path: Path) -> None:
    file = PidFile(tmp_path / "pid")
    file.take()
    (tmp_path / "pid").unlink()
    (tmp_path / "pid").write_text("7\n")
    file.release()
    assert (tmp_path / "pid").read_text() == "7\n"
