"""Programs that people use, through the tunnel: nginx with many curl, ssh and scp."""

import hashlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netlab import Lab, Link
from tests.system.pair import Pair
from tests.system.programs import program, sha256, sshd, wait_for_port, write_random

RANGES = 100
FILE_BYTES = 200_000_000
PROGRAM_S = 60.0

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
    write_random(path, FILE_BYTES)
    yield path
    path.unlink()


def test_parallel_range_requests_to_nginx_make_up_the_file(
    lab: Lab, pair: Pair, original: Path, tmp_path: Path
) -> None:
    nginx, curl = program("nginx"), program("curl")
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(folder=tmp_path, port=pair.target_port))
    os.link(original, tmp_path / "file")
    service = lab.popen("server", [nginx, "-p", str(tmp_path), "-c", str(config), "-e", str(tmp_path / "error.log")])
    try:
        wait_for_port(lab, ("127.0.0.1", pair.target_port), service)
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


def test_ssh_logs_in_and_scp_copies_200_mb(lab: Lab, pair: Pair, original: Path, tmp_path: Path) -> None:
    ssh, scp = program("ssh"), program("scp")
    host = "127.0.0.1"
    with sshd(lab, tmp_path, (host, pair.target_port), (host, pair.local_port)) as options:
        answer = lab.run("client", [ssh, *options, host, "echo", "ok"], timeout=PROGRAM_S)
        assert answer.stdout == "ok\n"
        for source, target in (
            (str(original), f"{host}:{tmp_path / 'sent'}"),
            (f"{host}:{original}", str(tmp_path / "fetched")),
        ):
            lab.run("client", [scp, "-q", *options, source, target], timeout=PROGRAM_S)
    expected = sha256(original)
    for name in ("sent", "fetched"):
        assert sha256(tmp_path / name) == expected
        (tmp_path / name).unlink()
