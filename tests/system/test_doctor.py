"""`doctor` on a real kernel: it mends in a namespace of the test's own, and sees a running instance."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.free_ports import free_port
from tests.system import unshared
from tests.system.processes import skip_unless_nobody_can_import
from tests.system.test_exit_codes import ROOT, write_client

SETTINGS = ("net/core/somaxconn", "net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem")
LOWER = """
mount -t tmpfs none /etc/sysctl.d
echo 128 > /proc/sys/net/core/somaxconn
echo 4096 131072 1000000 > /proc/sys/net/ipv4/tcp_rmem
"""


def of_host() -> list[str]:
    """What no test may change."""
    values = [Path("/proc/sys", name).read_text() for name in SETTINGS]
    return [*values, *sorted(os.listdir("/etc/sysctl.d"))]


def checks(text: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(text)["checks"]}


def test_fix_mends_a_namespace_and_nothing_else(tmp_path: Path) -> None:
    before = of_host()
    show = "cat /proc/sys/net/core/somaxconn /etc/sysctl.d/60-forwarder.conf"
    script = f"forwarder doctor --json || true\nforwarder doctor --fix --json || true\n{show}"
    done = unshared.run(LOWER + script, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, *rest = done.stdout.splitlines()
    lacking = checks(first)
    assert lacking["net.core.somaxconn"]["status"] == lacking["net.ipv4.tcp_rmem"]["status"] == "shortfall"
    assert lacking["net.core.somaxconn"]["command"] == "sysctl -w net.core.somaxconn=4096"
    mended = checks(second)
    assert mended["net.core.somaxconn"]["status"] == mended["net.ipv4.tcp_rmem"]["status"] == "ok"
    changes = {each["key"]: (each["before"], each["after"]) for each in json.loads(second)["fixed"]["changes"]}
    assert changes["net.core.somaxconn"] == ("128", "4096")
    assert changes["net.ipv4.tcp_rmem"] == ("4096 131072 1000000", "4096 131072 16777216")
    assert rest[0] == "4096" and {"net.core.somaxconn = 4096", "net.ipv4.tcp_rmem = 4096 131072 16777216"} < set(rest)
    left = {name for name, check in mended.items() if check["status"] == "shortfall"}
    assert left <= {each["key"] for each in json.loads(second)["fixed"]["refused"]}
    assert of_host() == before


def test_fix_says_what_a_container_does_not_let_it_set(tmp_path: Path) -> None:
    seal = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys\n"
    done = unshared.run(LOWER + seal + "forwarder doctor --fix && exit 9 || echo $? && ls /etc/sysctl.d", tmp_path)
    lines = done.stdout.splitlines()
    assert lines[-1] == "1", done
    assert any(line.startswith("not set  net.core.somaxconn: read-only file system") for line in lines), lines
    assert "    $ sysctl -w net.core.somaxconn=4096" in lines


def test_firewall_that_answers_invalid_with_a_reset_is_found(tmp_path: Path) -> None:
    where = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if not all(shutil.which(tool, path=where) for tool in ("nft", "iptables")):
        pytest.skip("nft or iptables is not installed")
    if not Path("/proc/sys/net/netfilter/nf_conntrack_max").exists():
        pytest.skip("there is no conntrack")
    nft = "nft add table inet t\nnft 'add chain inet t c { type filter hook input priority 0; }'\n"
    nft += "nft add rule inet t c ct state invalid reject with tcp reset\n"
    iptables = "iptables -A INPUT -p tcp -m conntrack --ctstate INVALID -j REJECT --reject-with tcp-reset\n"
    look = "forwarder doctor --json || true\n"
    done = unshared.run(f"PATH={where}\n{nft}{look}nft flush ruleset\n{iptables}{look}", tmp_path)
    if done.returncode:
        pytest.skip(f"they do not work here: {done.stderr}")
    for tool, text in zip(("nft", "iptables"), done.stdout.splitlines(), strict=True):
        found = checks(text)["firewall"]
        assert found["status"] == "shortfall" and found["command"].startswith(tool)


@contextlib.contextmanager
def instance(file: Path) -> Iterator[int]:
    """A running instance; its pid."""
    command = [sys.executable, "-m", "forwarder"]
    process = subprocess.Popen([*command, "start", "-c", str(file)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not (file.parent / "client.sock").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        yield process.pid
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(10)


def doctor(file: Path, *prefix: str, fix: bool = False) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "forwarder", "doctor", "--json", "-c", str(file)]
    command += ["--fix"] if fix else []
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_running_instance_is_seen_by_its_user_and_hidden_from_others(tmp_path: Path) -> None:
    file = write_client(tmp_path, free_port())
    with instance(file) as pid:
        seen = checks(doctor(file).stdout)
        assert seen["ports of web"]["found"].endswith(f": held by pid {pid}")
        assert seen["control socket"]["found"].endswith(f"answered by pid {pid}")
        assert seen["open files, running instance"]["status"] in ("ok", "shortfall")
        if os.geteuid() != 0 or shutil.which("setpriv") is None:
            pytest.skip("only root can become another user, by setpriv")
        skip_unless_nobody_can_import()
        for folder in (tmp_path, *tmp_path.parents[:-2]):
            folder.chmod(folder.stat().st_mode | 0o011)
        file.chmod(0o644)
        other = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        done, fix = doctor(file, *other), doctor(file, *other, fix=True)
    assert (fix.returncode, fix.stdout, fix.stderr.count("\n")) == (77, "", 1)
    assert done.returncode in (0, 1), done.stderr
    hidden = checks(done.stdout)
    for name in ("open files, running instance", "key of auth", "ports of web", "control socket"):
        assert hidden[name]["status"] == "unknown" and "permission denied" in hidden[name]["found"], hidden[name]
