"""What the real command says, and how it exits, when it cannot start."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.free_ports import free_port
from tests.system import unshared
from tests.system.processes import skip_unless_nobody_can_import

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 20.0
UNPRIVILEGED = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def forwarder(*arguments: str | Path, prefix: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Exit code and the lines of standard error."""
    command = [*prefix, sys.executable, "-m", "forwarder", *map(str, arguments)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    return done.returncode, done.stderr.splitlines()


def write_client(folder: Path, local_port: int, auth: str = 'key_id = "laptop"\nkey_file = "laptop.key"') -> Path:
    (folder / "laptop.key").write_bytes(base64.b64encode(bytes(range(32))))
    (folder / "laptop.key").chmod(0o600)
    file = folder / "client.toml"
    file.write_text(
        f'role = "client"\nworkers = 1\n[control]\nsocket = "client.sock"\n[auth]\n{auth}\n[[tunnel]]\nname = "web"\n'
        f'mode = "stripe"\nhost = "127.0.0.1"\nhost_port = {free_port()}\nlocal_port = {local_port}\n'
    )
    return file


def write_server(folder: Path, host_port: int, client: str) -> Path:
    file = folder / "server.toml"
    file.touch(0o600)
    file.write_text(
        f'role = "server"\nworkers = 1\n[control]\nsocket = "server.sock"\n{client}\n[[tunnel]]\nname = "web"\n'
        f'mode = "stripe"\nhost_port = {host_port}\nremote_port = 80\n'
    )
    return file


def test_taken_port_is_69_with_one_line(tmp_path: Path) -> None:
    key = base64.b64encode(bytes(32)).decode()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        client = write_client(tmp_path, port)
        server = write_server(tmp_path, port, f'[[client]]\nkey_id = "laptop"\nkey = "{key}"')
        line = "tunnel 'web': cannot listen on %s: address already in use"
        assert forwarder("start", "-c", client) == (69, [line % f"127.0.0.1:{port}"])
        assert forwarder("start", "-c", server) == (69, [line % f"[::]:{port}"])


def test_port_without_the_right_to_it_is_77_with_one_line(tmp_path: Path) -> None:
    port = 80
    if UNPRIVILEGED.exists() and int(UNPRIVILEGED.read_text()) <= port:
        pytest.skip("everybody may listen on port 80 here")
    without: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv to give the right away")
        without = ["setpriv", "--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service"]
    code, lines = forwarder("start", "-c", write_client(tmp_path, port), prefix=without)
    cause = "permission denied (a port below 1024 needs root or the capability CAP_NET_BIND_SERVICE)"
    assert (code, lines) == (77, [f"tunnel 'web': cannot listen on 127.0.0.1:{port}: {cause}"])


NO_KEY = {
    "no client": "",
    "a client without a key": '[[client]]\nkey_id = "laptop"',
    "no key file": '[[client]]\nkey_id = "laptop"\nkey_file = "missing.key"',
    "an empty key file": '[[client]]\nkey_id = "laptop"\nkey_file = "empty.key"',
    "an empty key": '[[client]]\nkey_id = "laptop"\nkey = ""',
    "half a key": f'[[client]]\nkey_id = "laptop"\nkey = "{base64.b64encode(bytes(16)).decode()}"',
}


@pytest.mark.parametrize("what", NO_KEY)
def test_server_without_a_key_does_not_start(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty.key").touch()
    port = free_port()
    code, lines = forwarder("start", "-c", write_server(tmp_path, port, NO_KEY[what]))
    assert code == 78 and len(lines) == 1, lines
    assert lines[0].startswith(f"{tmp_path / 'server.toml'}: client") and "found" in lines[0]
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", port)) != 0


def test_client_without_a_key_does_not_start(tmp_path: Path) -> None:
    code, lines = forwarder(
        "start", "-c", write_client(tmp_path, free_port(), 'key_id = "laptop"\nkey_file = "no.key"')
    )
    assert code == 78 and len(lines) == 1 and "auth.key_file" in lines[0] and "found" in lines[0]


def test_mistakes_in_the_file_are_78_with_one_line(tmp_path: Path) -> None:
    file = write_client(tmp_path, free_port())
    text = file.read_text()
    file.write_text(text + "somaxcon = 10\n")
    code, (line,) = forwarder("start", "-c", file)
    assert code == 78 and str(file) in line and "somaxcon" in line
    file.write_text(text + "somaxconn = \n")
    code, (line,) = forwarder("start", "-c", file)
    assert code == 78 and f"{file}:{text.count(chr(10)) + 1}:" in line


def test_no_instance_is_1_and_a_wrong_command_line_is_2(tmp_path: Path) -> None:
    file = write_client(tmp_path, free_port())
    for command in ("stop", "status"):
        code, lines = forwarder(command, "-c", file)
        assert code == 1 and len(lines) == 1 and "no instance is running" in lines[0]
    assert forwarder("start")[0] == 2
    assert forwarder("dance")[0] == 2


def unprivileged() -> list[str]:
    """What starts a program as somebody who is not root and owns nothing."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user, by setpriv")
    skip_unless_nobody_can_import()
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def open_folder(folder: Path) -> None:
    """Lets everybody through to `folder`."""
    for each in (folder, *folder.parents[:-2]):
        each.chmod(each.stat().st_mode | 0o011)


def test_file_or_key_that_may_not_be_read_is_77_with_one_line(tmp_path: Path) -> None:
    other = unprivileged()
    file = write_client(tmp_path, free_port())
    file.chmod(0o644)
    open_folder(tmp_path)
    start = ("start", "-c", file)
    found = 'expected a readable file, found "laptop.key": Permission denied'
    assert forwarder(*start, prefix=other) == (77, [f"{file}: auth.key_file: {found}"])
    file.chmod(0o600)
    line = f"{file}: expected a readable file, found: Permission denied"
    assert forwarder("stop", "-c", file, prefix=other) == (77, [line])


def test_second_instance_is_69_and_another_user_s_is_77(tmp_path: Path) -> None:
    port = free_port()
    file = write_client(tmp_path, port)
    other = tmp_path / "other.toml"
    other.write_text(file.read_text().replace("client.sock", "other.sock"))
    command = [sys.executable, "-m", "forwarder", "start", "-c", str(file)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        try:
            while "forwarder is ready" not in (line := first.stderr.readline()):
                assert line
            running = f"already running with pid {first.pid} (control socket {tmp_path}/client.sock)"
            assert forwarder("start", "-c", file) == (69, [running])
            taken = f"tunnel 'web': cannot listen on 127.0.0.1:{port}: address already in use"
            assert forwarder("start", "-c", other) == (69, [taken])
            if os.geteuid() == 0:
                open_folder(tmp_path)
                file.chmod(0o644)
                refused = f"control socket {tmp_path}/client.sock: permission denied"
                assert forwarder("status", "-c", file, prefix=unprivileged()) == (77, [refused])
        finally:
            first.send_signal(signal.SIGQUIT)


def test_key_that_everybody_may_read_is_one_warning(tmp_path: Path) -> None:
    file = write_client(tmp_path, free_port())
    (tmp_path / "laptop.key").chmod(0o644)
    line = f"warning: auth.key_file: every user of this host may read {tmp_path / 'laptop.key'}"
    assert forwarder("check", "-c", file) == (0, [line])


def test_read_only_run_is_69_with_one_line(tmp_path: Path) -> None:
    file = write_client(tmp_path, free_port())
    file.write_text(file.read_text().replace('[control]\nsocket = "client.sock"\n', ""))
    start = "forwarder start -c client.toml"
    done = unshared.run(f"mount -t tmpfs -o ro none /run\n{start} || {start} --pid-file /run/pid || exit $?", tmp_path)
    socket_line = "control socket /run/forwarder/client.sock: read-only file system"
    pid_line = "pid file /run/pid: read-only file system"
    assert (done.returncode, done.stderr.splitlines()) == (69, [socket_line, pid_line])


def test_log_that_cannot_be_made_is_69_with_one_line(tmp_path: Path) -> None:
    file = write_client(tmp_path, free_port())
    file.write_text(file.read_text() + '[log]\nfile = "logs/log"\n')
    (tmp_path / "logs").mkdir()
    start = "forwarder start -c client.toml"
    full, read_only = ("mount -t tmpfs -o " + options + " none logs" for options in ("nr_inodes=1", "ro"))
    done = unshared.run(f"{full}\n{start} || {read_only}\n{start} || exit $?", tmp_path)
    lines = [
        f"[log] file: cannot open {tmp_path}/logs/log: {reason}"
        for reason in ("No space left on device", "Read-only file system")
    ]
    assert (done.returncode, done.stderr.splitlines()) == (69, lines)


def test_log_in_place_of_a_directory_is_78_with_one_line(tmp_path: Path) -> None:
    file = write_client(tmp_path, free_port())
    file.write_text(file.read_text() + '[log]\nfile = "logs"\n')
    (tmp_path / "logs").mkdir()
    line = f"[log] file: cannot open {tmp_path}/logs: Is a directory"
    assert forwarder("start", "-c", file) == (78, [line])


FULL_DISK = """
mkdir logs
mount -t tmpfs -o size=64k none logs
dd if=/dev/zero of=logs/fill bs=4k 2> dd || true
$FORWARDER start -c client.toml 2> told &
until worker=$(pgrep -P $!) && [ -s told ]; do sleep 0.05; done
kill -KILL $worker
until [ "$(pgrep -P $!)" != $worker ]; do sleep 0.05; done
until forwarder status --json -c client.toml 2> /dev/null | grep -q '"restarts": 1'; do sleep 0.1; done
cp logs/log while-full
rm logs/fill
kill $! && wait $! && echo "exit $?"
cp logs/log afterwards
"""


def test_full_disk_for_the_log_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    file = write_client(tmp_path, free_port())
    file.write_text(file.read_text() + '[log]\nfile = "logs/log"\nformat = "json"\n')
    done = unshared.run(FULL_DISK, tmp_path)
    assert (done.returncode, done.stdout) == (0, "exit 0\n"), done
    reason = "no space left on device: lines are lost until it takes them again"
    assert (tmp_path / "told").read_text() == f"log file {tmp_path}/logs/log: {reason}\n"
    assert (tmp_path / "while-full").read_text() == ""
    records = [json.loads(line) for line in (tmp_path / "afterwards").read_text().splitlines()]
    assert records[0]["message"] == "log lines were lost" and records[0]["lines"] >= 2
    assert [record["message"] for record in records].count("log lines were lost") == 1
    assert records[-1]["message"] == "forwarder has stopped"
