"""Programs that people use, through the tunnel: nginx with many curl, ssh and scp."""

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

from tests.netlab import Lab, Link
from tests.system.pair import Pair

RANGES = 100
FILE_BYTES = 200_000_000
PROGRAM_S = 60.0
SEARCH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))

NGINX = """\
daemon off;
user root;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 2;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {folder};
    }}
}}
"""

SSHD = """\
ListenAddress 127.0.0.1:{port}
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


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(Link(delay_ms=5)) as lab:
        yield lab


@pytest.fixture(scope="module")
def pair(lab: Lab) -> Iterator[Pair]:
    with Pair(lab, workers=(2, 2)) as pair:
        yield pair


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of FILE_BYTES."""
    path = tmp_path_factory.mktemp("files") / "original"
    numbers = random.Random(1)
    with open(path, "wb") as file:
        for _ in range(FILE_BYTES // 1_000_000):
            file.write(numbers.randbytes(1_000_000))
    yield path
    path.unlink()


def wait_for_port(lab: Lab, port: int, service: subprocess.Popen[bytes]) -> None:
    """Until the service takes connections on that port of the server's namespace."""
    deadline = time.monotonic() + 10
    while True:
        try:
            lab.connect("server", "127.0.0.1", port).close()
            return
        except ConnectionRefusedError:
            assert service.poll() is None, f"the service ended with {service.returncode}"
            assert time.monotonic() < deadline, "the service does not listen"
            time.sleep(0.05)


def test_parallel_range_requests_to_nginx_make_up_the_file(
    lab: Lab, pair: Pair, original: Path, tmp_path: Path
) -> None:
    nginx, curl = program("nginx"), program("curl")
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(folder=tmp_path, port=pair.target_port))
    os.link(original, tmp_path / "file")
    service = lab.popen("server", [nginx, "-p", str(tmp_path), "-c", str(config), "-e", str(tmp_path / "error.log")])
    try:
        wait_for_port(lab, pair.target_port, service)
        cuts = [0, *sorted(random.Random(2).sample(range(1, FILE_BYTES), RANGES - 1)), FILE_BYTES]
        parts = [tmp_path / f"part{number}" for number in range(RANGES)]
        url = f"http://127.0.0.1:{pair.local_port}/file"
        downloads = [
            lab.popen("client", [curl, "-sS", "--fail", "-r", f"{start}-{end - 1}", "-o", str(part), url])
            for part, start, end in zip(parts, cuts, cuts[1:], strict=False)
        ]
        deadline = time.monotonic() + PROGRAM_S
        assert [download.wait(max(deadline - time.monotonic(), 0)) for download in downloads] == [0] * RANGES
    finally:
        service.terminate()
        service.wait(10)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes())
        part.unlink()
    assert digest.hexdigest() == sha256(original)


@pytest.fixture
def sshd(lab: Lab, pair: Pair, tmp_path: Path) -> Iterator[list[str]]:
    """A server for one key behind the tunnel; the options by which ssh and scp reach it."""
    sshd, keygen, unshare = program("sshd"), program("ssh-keygen"), program("unshare")
    if os.geteuid() != 0:
        pytest.skip("sshd needs root")
    tmp_path.chmod(0o755)
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    config = tmp_path / "sshd_config"
    config.write_text(SSHD.format(folder=tmp_path, port=pair.target_port))
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(f"[127.0.0.1]:{pair.local_port} {(tmp_path / 'host.pub').read_text()}")
    with open(tmp_path / "sshd.log", "wb") as log:
        service = lab.popen(
            "server",
            [unshare, "--mount", "sh", "-c", WITH_RUN_SSHD, "sh", sshd, "-D", "-e", "-f", str(config)],
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        wait_for_port(lab, pair.target_port, service)
        options = {
            "User": pwd.getpwuid(os.geteuid()).pw_name,
            "Port": pair.local_port,
            "IdentityFile": tmp_path / "user",
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


def test_ssh_logs_in_and_scp_copies_200_mb(
    lab: Lab, pair: Pair, sshd: list[str], original: Path, tmp_path: Path
) -> None:
    ssh, scp = program("ssh"), program("scp")
    answer = lab.run("client", [ssh, *sshd, "127.0.0.1", "echo", "ok"], timeout=PROGRAM_S)
    assert answer.stdout == "ok\n"
    expected = sha256(original)
    for source, target in (
        (str(original), f"127.0.0.1:{tmp_path / 'sent'}"),
        (f"127.0.0.1:{original}", str(tmp_path / "fetched")),
    ):
        lab.run("client", [scp, "-q", *sshd, source, target], timeout=PROGRAM_S)
    for name in ("sent", "fetched"):
        assert sha256(tmp_path / name) == expected
        (tmp_path / name).unlink()
