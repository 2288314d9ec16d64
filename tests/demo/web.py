"""The web server, the file that it serves, and curl."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.demo.place import Place, running
from tests.demo.signals import Signals

MIB = 1 << 20
PORT = 80
FILE = "random.bin"

_DOWNLOAD_S = 180.0
_START_S = 10.0

# nginx finds its listening socket in the variable NGINX, as one does that takes over from an older one: so the socket's
# congestion control is ours to choose. root may be a user namespace's, where nobody else exists.
_NGINX_CONF = """\
daemon off;
worker_processes 1;
user root root;
pid nginx.pid;
error_log nginx.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    server {{ listen {address}:{port}; root www; }}
}}
"""


class DemoError(Exception):
    """What went wrong, for people."""


@dataclass(frozen=True, slots=True)
class Download:
    """What curl measured, and whether what it wrote is what was served."""

    size: int
    seconds: float
    equal: bool

    @property
    def mbit_s(self) -> float:
        return self.size * 8 / 1e6 / self.seconds


def programs() -> dict[str, str]:
    """Paths of nginx and curl; raises DemoError."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    found = {"nginx": shutil.which("nginx", path=path), "curl": shutil.which("curl", path=path)}
    if missing := [package for name, package in (("nginx", "nginx-light"), ("curl", "curl")) if found[name] is None]:
        raise DemoError(f"not installed: {', '.join(missing)} (apt-get install {' '.join(missing)})")
    return {name: program for name, program in found.items() if program is not None}


def make_file(folder: Path, sizes: Sequence[int], signals: Signals) -> dict[int, str]:
    """Write random bytes, as many as the largest of `sizes`; returns the sha256 of the first `size` bytes for each."""
    (folder / "www").mkdir()
    digest, digests = hashlib.sha256(), {}
    with open(folder / "www" / FILE, "wb") as file:
        for end in range(MIB, max(sizes) + MIB, MIB):
            signals.check()
            chunk = os.urandom(MIB)
            file.write(chunk)
            digest.update(chunk)
            if end in sizes:
                digests[end] = digest.hexdigest()
    return digests


@contextlib.contextmanager
def web_server(place: Place, nginx: str, folder: Path, signals: Signals) -> Iterator[int]:
    """nginx at the server, serving `www`; yields its port."""
    with place.listen(PORT) as listener:
        address, port = listener.getsockname()
        (folder / "nginx.conf").write_text(_NGINX_CONF.format(address=address, port=port))
        descriptor = listener.fileno()
        with open(folder / "nginx.log", "ab") as log:
            process = place.start(
                "server",
                [nginx, "-p", f"{folder}/", "-c", "nginx.conf", "-e", "nginx.log"],
                env=os.environ | {"NGINX": f"{descriptor};"},
                pass_fds=[descriptor],
                stdout=log,
                stderr=log,
            )
    with running(process):
        signals.wait(lambda: (folder / "nginx.pid").exists() or process.poll() is not None, _START_S)
        if process.poll() is not None:
            raise DemoError(f"nginx does not start: {(folder / 'nginx.log').read_text().strip()}")
        yield port


def download(
    place: Place,
    curl: str,
    url: str,
    folder: Path,
    sha256: str,
    size: int,
    signals: Signals,
    on_progress: Callable[[int, float], None],
) -> Download:
    """The first `size` bytes of the file; `on_progress` gets bytes and seconds so far."""
    output = folder / "download.bin"
    argv = [curl, "-q", "--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", str(_DOWNLOAD_S)]
    argv += ["--range", f"0-{size - 1}", "--output", str(output), "--write-out", "%{time_total}", url]
    process = place.start("client", argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()

    def ended() -> bool:
        if output.exists():
            on_progress(output.stat().st_size, time.monotonic() - started)
        return process.poll() is not None

    with process, running(process):
        signals.wait(ended, _DOWNLOAD_S + 10, interval_s=0.1)
        seconds, complaint = process.communicate()
    if process.returncode:
        raise DemoError(f"the download failed: {complaint.strip()}")
    with open(output, "rb") as file:
        equal = output.stat().st_size == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256
    output.unlink()
    return Download(size, float(seconds), equal)
