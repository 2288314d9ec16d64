"""What the real command says, and how it exits, when it cannot start."""

import base64
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 20.0
UNPRIVILEGED = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def forwarder(*arguments: str | Path, prefix: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Exit code and the lines of standard error."""
    command = [*prefix, sys.executable, "-m", "forwarder", *map(str, arguments)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    return done.returncode, done.stderr.splitlines()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


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
