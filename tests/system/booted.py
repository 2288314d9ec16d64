"""A Debian 12 with systemd as its process 1, in namespaces of its own and without a network: what packages and units
are tried in.

    with Booted(tmp_path) as host:
        host.run("systemctl", "is-system-running")

Needs root and debootstrap; the root that it makes once, with a network, is kept in the temporary directory. It holds
what Debian has of the package's dependencies, and no compiler. Everything ends with the block, or with the process that
made it: processes live in a pid namespace, mounts in a mount namespace, systemd's control groups below one of ours.
"""

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

INCLUDE = ("systemd", "adduser", "iproute2", "libpcap0.8", "libstdc++6", "logrotate", "python3")
CACHE = Path(tempfile.gettempdir()) / "forwarder-debian-12.tar"
MIRROR = """apt-get indextargets --format '$(CREATED_BY) $(CODENAME) $(REPO_URI)' |
    awk '$1 == "Packages" && $2 == "bookworm" {print $3; exit}'"""
BOOT_S = 40.0

# Process 1 to be. Control groups are made below our own, so that nothing of them is left anywhere else.
BOOT = r"""
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
cd "$1"
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
mkdir "sys/fs/cgroup/$2"
echo 0 >"sys/fs/cgroup/$2/cgroup.procs"
umount sys/fs/cgroup
exec unshare --cgroup sh -ec '
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
    mount -t tmpfs -o mode=755,nosuid tmpfs dev
    for node in null zero full random urandom tty; do cp -a "/dev/$node" "dev/$node"; done
    mkdir dev/pts dev/shm .host
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
    ln -s pts/ptmx dev/ptmx
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm
    mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
    pivot_root . .host
    cd /
    umount -l /.host
    rmdir /.host
    exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        /lib/systemd/systemd --unit=multi-user.target --log-target=journal --show-status=no
'
"""
CLEAR = r"""
mount -t cgroup2 cgroup2 /mnt
for _ in 1 2 3 4 5 6 7 8 9 10; do
    [ ! -e "/mnt/$1" ] || find "/mnt/$1" -depth -type d -exec rmdir {} + 2>/dev/null && exit
    sleep 0.2
done
"""


def debian_root() -> Path:
    """The archive of a fresh root, made if there is none; the test is skipped where it cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("namespaces with a systemd of their own need root")
    if CACHE.exists():
        return CACHE
    if shutil.which("debootstrap") is None:
        pytest.skip("there is no debootstrap")
    mirror = subprocess.run(MIRROR, shell=True, check=True, capture_output=True, text=True).stdout.split()
    with tempfile.TemporaryDirectory(prefix="forwarder-debootstrap-") as folder:
        root = Path(folder) / "root"
        include = f"--include={','.join(INCLUDE)}"
        command = ["debootstrap", "--variant=minbase", include, "bookworm", str(root), *mirror]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout[-3000:] + made.stderr
        part = CACHE.with_suffix(".part")
        subprocess.run(["tar", "-C", root, "--one-file-system", "-cf", part, "."], check=True)
        part.rename(CACHE)
    return CACHE


class Booted:
    """`folder` is where its root goes."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self._group = f"forwarder-test-{os.getpid()}-{time.monotonic_ns()}"
        self._log = folder / "boot.log"
        self._archive = debian_root()

    def __enter__(self) -> Self:
        self.root.mkdir()
        subprocess.run(["tar", "-C", self.root, "-xf", self._archive], check=True)
        self.root.chmod(0o755)
        namespaces = ["--mount", "--pid", "--ipc", "--uts", "--net", "--fork", "--kill-child"]
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [*command, "sh", "-c", BOOT, "sh", self.root, self._group],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self.wait(self._is_up, "systemd", BOOT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        subprocess.run(["unshare", "--mount", "sh", "-c", CLEAR, "sh", self._group], check=False)
        shutil.rmtree(self.root, ignore_errors=True)

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        return self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded")

    def inside(self, *command: str | Path) -> list[str]:
        """The command that runs `command` in there."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        pid = children[0] if children else "0"
        entered = ["nsenter", "-t", pid, "-m", "-p", "-i", "-u", "-n", "-C", "-r", "-w"]
        return [*entered, "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", *map(str, command)]

    def run(self, *command: str | Path, check: bool = True, timeout_s: float = 100.0) -> Any:
        """Its result, as of subprocess.run; a failure shows what it said."""
        done = subprocess.run(
            self.inside(*command),
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"
        return done

    def popen(self, *command: str | Path) -> subprocess.Popen[str]:
        """Runs `command`, its output to be read."""
        return subprocess.Popen(
            self.inside(*command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> float:
        """Until `condition` holds; how long it took."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < timeout_s, f"no {what} within {timeout_s:g} s"
            time.sleep(0.05)
        return time.monotonic() - started
