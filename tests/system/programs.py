"""Programs of the system that tests use: where they are, files for them to move, and a server of ssh."""

import contextlib
import hashlib
import os
import pwd
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netlab import Lab

SEARCH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))

SSHD = """\
ListenAddress {address}:{port}
HostKey {folder}/host
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""

# sshd wants this directory even if it does not use it; Debian makes it only when the service starts.
WITH_RUN_SSHD = 'mount -t tmpfs none /run && mkdir -m 755 /run/sshd && exec "$@"'


def program(name: str) -> str:
    """The program's path; without the program, the test is skipped."""
    path = shutil.which(name, path=SEARCH)
    if path is None:
        pytest.skip(f"there is no {name}")
    return path


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_random(path: Path, size_bytes: int) -> None:
    """A file of so many bytes, in whole millions, that do not repeat."""
    numbers = random.Random(1)
    with open(path, "wb") as file:
        for _ in range(size_bytes // 1_000_000):
            file.write(numbers.randbytes(1_000_000))


def wait_for_port(lab: Lab, address: tuple[str, int], service: subprocess.Popen[bytes]) -> None:
    """Until the service takes connections at that address of the server's namespace."""
    deadline = time.monotonic() + 10
    while True:
        try:
            lab.connect("server", *address).close()
            return
        except ConnectionRefusedError:
            assert service.poll() is None, f"the service ended with {service.returncode}"
            assert time.monotonic() < deadline, "the service does not listen"
            time.sleep(0.05)


@contextlib.contextmanager
def sshd(lab: Lab, folder: Path, listens: tuple[str, int], reached: tuple[str, int]) -> Iterator[list[str]]:
    """A server for one key, in the server's namespace at `listens`; the options by which ssh and scp find it where it
    is `reached`."""
    server, keygen, unshare = program("sshd"), program("ssh-keygen"), program("unshare")
    if os.geteuid() != 0:
        pytest.skip("sshd needs root")
    folder.chmod(0o755)
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    config = folder / "sshd_config"
    config.write_text(SSHD.format(folder=folder, address=listens[0], port=listens[1]))
    known_hosts = folder / "known_hosts"
    host = reached[0] if reached[1] == 22 else f"[{reached[0]}]:{reached[1]}"
    known_hosts.write_text(f"{host} {(folder / 'host.pub').read_text()}")
    with open(folder / "sshd.log", "wb") as log:
        service = lab.popen(
            "server",
            [unshare, "--mount", "sh", "-c", WITH_RUN_SSHD, "sh", server, "-D", "-e", "-f", str(config)],
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        wait_for_port(lab, listens, service)
        options = {
            "User": pwd.getpwuid(os.geteuid()).pw_name,
            "Port": reached[1],
            "IdentityFile": folder / "user",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": known_hosts,
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": 20,
        }
        yield ["-F", "none", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    finally:
        service.terminate()
        service.wait(10)
