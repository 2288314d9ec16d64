"""The package installed in a booted Debian: a client there, a server in a network namespace beside it, and transfers
through both modes.

         namespace of the host            namespace "server"
        +----------------------+         +----------------------+
        | 198.18.1.1      eth0 |---------| eth0      198.18.1.2 |
        | forwarder@client     |         |     forwarder@server |
        +----------------------+         +----------------------+

Programs that send and receive are Python, run by the Debian in there.
"""

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.system.booted import Booted

ROOT = Path(__file__).parents[2]
NETWORK = """
ip netns add server
ip link add eth0 type veth peer name eth0 netns server
ip address add 198.18.1.1/24 dev eth0
ip -n server address add 198.18.1.2/24 dev eth0
for at in "" "-n server"; do ip $at link set lo up; ip $at link set eth0 up; done
"""
SETTINGS = """
cd /etc/forwarder
umask 027
forwarder genkey >laptop.key
cat >client.toml <<END
role = "client"
workers = 2
pin = true
user = "forwarder"
drain_timeout = "15s"
[auth]
key_id = "laptop"
key_file = "laptop.key"
[[tunnel]]
name = "web"
mode = "stripe"
host = "198.18.1.2"
host_port = 900
local_port = 80
END
cat >server.toml <<END
role = "server"
workers = 2
pin = true
user = "forwarder"
drain_timeout = "15s"
[[client]]
key_id = "laptop"
key_file = "laptop.key"
[[tunnel]]
name = "web"
mode = "stripe"
host_port = 900
remote_port = 8000
END
for role in client server; do
    sed -e 's/"web"/"kcp"/' -e 's/"stripe"/"spray"/' -e 's/^host_port = .*/ports = "80,443,2000-2001"\\ntype = "all"/' \
        -e 's/^local_port = .*/ludp = "127.0.0.1:3000"/' -e 's/^remote_port = .*/taddr = "127.0.0.1:4000"/' \
        $role.toml >$role-spray.toml
done
for unit in forwarder@server forwarder-spray@server-spray; do
    mkdir -p /etc/systemd/system/$unit.service.d
    printf '[Service]\\nNetworkNamespacePath=/run/netns/server\\n' >/etc/systemd/system/$unit.service.d/server.conf
done
systemctl daemon-reload
"""

# Sends as many megabytes as the connection's first line asks for, with a pause after each.
TARGET = """
import random, socket, threading, time
block = random.Random(1).randbytes(1 << 20)
def serve(connection):
    with connection:
        count, pause = connection.makefile("rb").readline().split()
        for _ in range(int(count)):
            connection.sendall(block)
            time.sleep(float(pause))
listener = socket.create_server(("127.0.0.1", 8000), backlog=100)
print("listening", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
DOWNLOAD = """
import hashlib, random, socket, sys
count, pause = int(sys.argv[1]), sys.argv[2]
digest, expected, received = hashlib.sha256(), hashlib.sha256(), 0
block = random.Random(1).randbytes(1 << 20)
for _ in range(count):
    expected.update(block)
with socket.create_connection(("127.0.0.1", 80), timeout=20) as connection:
    connection.sendall(f"{count} {pause}\\n".encode())
    while data := connection.recv(1 << 16):
        digest.update(data)
        if not received:
            print("begun", flush=True)
        received += len(data)
print(received, digest.hexdigest() == expected.hexdigest(), flush=True)
"""
ECHO = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 4000))
print("listening", flush=True)
while True:
    data, sender = sock.recvfrom(65536)
    sock.sendto(data, sender)
"""
# One at a time, each sent again until its echo is there.
DATAGRAMS = """
import hashlib, os, socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect(("127.0.0.1", 3000))
sock.settimeout(0.5)
sent, received = hashlib.sha256(), hashlib.sha256()
for number in range(500):
    data = number.to_bytes(4) + os.urandom(1196)
    for _ in range(40):
        try:
            sock.send(data)
            while (answer := sock.recv(2000))[:4] != data[:4]:
                pass
        except OSError:
            continue
        break
    sent.update(data)
    received.update(answer)
print(number + 1, sent.hexdigest() == received.hexdigest())
"""


def set_up(host: Booted) -> None:
    """The network, a key and the four files; nothing is started."""
    host.run("sh", "-ec", NETWORK)
    host.run("sh", "-ec", SETTINGS)


def serve(host: Booted, program: str) -> subprocess.Popen[str]:
    """A program of the server's side, once it listens."""
    target = host.popen("ip", "netns", "exec", "server", "python3", "-c", program)
    assert target.stdout is not None and target.stdout.readline() == "listening\n"
    return target


class Transfer:
    """A download of `megabytes` through the stripes, of which the first bytes have arrived."""

    def __init__(self, host: Booted, megabytes: int, pause_s: float = 0.0) -> None:
        self.megabytes = megabytes
        self._process = host.popen("python3", "-c", DOWNLOAD, str(megabytes), str(pause_s))
        assert self._process.stdout is not None
        begun = self._process.stdout.readline()
        assert begun == "begun\n", begun + self._process.stdout.read()

    @property
    def going_on(self) -> bool:
        return self._process.poll() is None

    def check(self) -> None:
        """Waits for its end: every byte is the right one."""
        assert self.end() == f"{self.megabytes << 20} True\n"

    def end(self) -> str:
        """What it says at its end: how much, and whether that is all; or why it broke off."""
        output, _ = self._process.communicate(timeout=60)
        return output


def status(host: Booted, name: str) -> dict[str, Any]:
    """`status --json` of that file's instance, as root asks for it."""
    said = host.run("forwarder", "status", "-c", f"/etc/forwarder/{name}.toml", "--json").stdout
    answer: dict[str, Any] = json.loads(said)
    return answer


def shown(host: Booted, unit: str, name: str) -> str:
    """A property of the unit."""
    value: str = host.run("systemctl", "show", "--property", name, "--value", unit).stdout.strip()
    return value


def forwarder_pids(host: Booted) -> set[str]:
    """Of all processes of forwarder in there, whoever started them."""
    names = host.run("sh", "-c", "grep -l ^forwarder: /proc/[0-9]*/cmdline || true").stdout.split()
    return {Path(name).parts[2] for name in names}


@functools.cache
def built_package() -> Path:
    """What `make deb` makes of this tree, or FORWARDER_TEST_PACKAGE; the test is skipped without what builds it."""
    if given := os.environ.get("FORWARDER_TEST_PACKAGE"):
        return Path(given)
    for program in ("dh", "dpkg-buildpackage"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}")
    made = subprocess.run([ROOT / "deploy" / "build-deb"], check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return ROOT / made.stdout.splitlines()[-1].partition(":")[0]


def install(host: Booted, package: Path) -> None:
    """Without a network: all that it depends on is there."""
    shutil.copy(package, host.root / "root" / package.name)
    host.run("dpkg", "--install", "--force-confold", f"/root/{package.name}", timeout_s=300)
    (host.root / "root" / package.name).unlink()
