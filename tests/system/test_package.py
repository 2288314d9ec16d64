"""The package in a Debian 12 that has nothing but what it depends on, no compiler and no network: installed, used as
its own user, upgraded, removed, purged.

FORWARDER_TEST_LONG=1 runs it: it builds the package and needs debootstrap, and a network for both.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.booted import Booted
from tests.system.serviced import (
    DATAGRAMS,
    ECHO,
    TARGET,
    Transfer,
    built_package,
    forwarder_pids,
    install,
    serve,
    set_up,
    shown,
    status,
)

pytestmark = [
    pytest.mark.skipif(not os.environ.get("FORWARDER_TEST_LONG"), reason="minutes: FORWARDER_TEST_LONG=1"),
    pytest.mark.deadline(900),
]
UNITS = ("forwarder@server", "forwarder@client", "forwarder-spray@server-spray", "forwarder-spray@client-spray")
OLDER = "0.0.9"
# All but what dpkg, apt, the journal and the tools for passwords keep of what they did.
EVERYTHING = r"""
find / -xdev \( -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/cache -o -path /var/log/journal \) -prune -o \
    -path /tmp -prune -o ! -name 'passwd-' ! -name 'group-' ! -name 'shadow-' ! -name 'gshadow-' ! -name dpkg.log \
    -printf '%p %M %u %g %l\n'
cat /etc/passwd /etc/group /etc/shadow /etc/gshadow
"""


@pytest.fixture(scope="module")
def package() -> Path:
    return built_package()


@pytest.fixture(scope="module")
def older(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package as a lower version, which has other examples of configuration."""
    folder = tmp_path_factory.mktemp("older")
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    changed = {
        tree / "DEBIAN" / "control": (r"(?m)^Version: .*$", f"Version: {OLDER}-1"),
        tree / "usr/lib/forwarder/forwarder/__init__.py": (r'__version__ = ".*"', f'__version__ = "{OLDER}"'),
        tree / "etc/forwarder/client.toml": (r"^", "# as it was\n"),
        tree / "etc/forwarder/server.toml": (r"^", "# as it was\n"),
    }
    for path, (old, new) in changed.items():
        path.write_text(re.sub(old, new, path.read_text(), count=1))
    made = folder / f"forwarder_{OLDER}-1_amd64.deb"
    build = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", tree, made]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return made


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Booted]:
    with Booted(tmp_path) as host:
        yield host


def changed(before: str, after: str) -> list[str]:
    """Lines that came and lines that went."""
    old, new = set(before.splitlines()), set(after.splitlines())
    return [f"+ {line}" for line in sorted(new - old)] + [f"- {line}" for line in sorted(old - new)]


def test_package_has_no_finding_of_lintian(package: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("there is no lintian")
    said = subprocess.run(["lintian", "--allow-root", package], check=False, capture_output=True, text=True)
    assert not [line for line in said.stdout.splitlines() if line.startswith(("E:", "W:"))]


def test_package_serves_both_modes_as_its_user_and_starts_nothing_itself(host: Booted, package: Path) -> None:
    assert host.run("sh", "-c", "command -v gcc cc make", check=False).returncode != 0
    install(host, package)
    assert not forwarder_pids(host)
    assert host.run("forwarder", "--version").stdout.startswith("forwarder ")
    assert host.run("find", "/usr/lib/forwarder/workers", "-name", "worker.cpython-311.pyc").stdout
    host.run("runuser", "-u", "forwarder", "--", "test", "!", "-w", "/etc/forwarder")
    host.run("runuser", "-u", "forwarder", "--", "test", "-r", "/etc/forwarder/client.toml")
    set_up(host)
    if "doctor" in host.run("forwarder", "--help").stdout:
        assert host.run("forwarder", "doctor", check=False).returncode in (0, 1)
    targets = [serve(host, TARGET), serve(host, ECHO)]
    host.run("systemctl", "start", *UNITS)
    Transfer(host, 100).check()
    assert host.run("python3", "-c", DATAGRAMS).stdout == "500 True\n"
    user = host.run("id", "-u", "forwarder").stdout.strip()
    for pid in forwarder_pids(host):
        assert host.run("stat", "-c", "%u", f"/proc/{pid}").stdout.strip() == user
    for target in targets:
        target.kill()


def test_log_file_is_rotated_and_opened_again(host: Booted, package: Path) -> None:
    install(host, package)
    set_up(host)
    host.run("sh", "-c", "printf '[log]\nfile = \"/var/log/forwarder/client.log\"\n' >>/etc/forwarder/client.toml")
    host.run("systemctl", "start", "forwarder@client")
    host.run("logrotate", "--force", "/etc/logrotate.d/forwarder")
    host.run("systemctl", "stop", "forwarder@client")
    assert "forwarder starts" in host.run("cat", "/var/log/forwarder/client.log.1").stdout
    assert "forwarder has stopped" in host.run("cat", "/var/log/forwarder/client.log").stdout


def test_upgrade_goes_through_a_transfer_and_keeps_what_was_edited(host: Booted, package: Path, older: Path) -> None:
    install(host, older)
    set_up(host)  # this is the edit: client.toml and server.toml are others now
    host.run("sh", "-c", "sed -i 's/^drain_timeout.*/&  # edited/' /etc/forwarder/client.toml")
    serve(host, TARGET)
    host.run("systemctl", "start", *UNITS)
    assert status(host, "client")["version"] == OLDER
    edited = host.run("cat", "/etc/forwarder/client.toml").stdout
    transfer = Transfer(host, 200, 0.05)
    install(host, package)
    transfer.check()
    for unit in UNITS:
        assert shown(host, unit, "ActiveState") == "active"
        assert status(host, unit.partition("@")[2])["version"] != OLDER
    assert host.run("cat", "/etc/forwarder/client.toml").stdout == edited
    assert not host.run("head", "-1", "/etc/forwarder/client.toml.dpkg-dist").stdout.startswith("# as it was")
    assert host.run("stat", "-c", "%U:%G %a", "/etc/forwarder/client.toml").stdout == "root:forwarder 640\n"
    Transfer(host, 20).check()


def test_unedited_configuration_is_replaced_by_an_upgrade(host: Booted, package: Path, older: Path) -> None:
    install(host, older)
    install(host, package)
    assert not host.run("cat", "/etc/forwarder/server.toml").stdout.startswith("# as it was")
    assert host.run("stat", "-c", "%U:%G %a", "/etc/forwarder/server.toml").stdout == "root:forwarder 640\n"


def test_remove_keeps_configuration_and_purge_leaves_nothing(host: Booted, package: Path, older: Path) -> None:
    before = host.run("sh", "-c", EVERYTHING).stdout
    install(host, older)
    set_up(host)
    host.run("systemctl", "enable", *UNITS[1:2], *UNITS[3:])
    host.run("systemctl", "start", *UNITS)
    install(host, package)
    host.run("forwarder", "check", "-c", "/etc/forwarder/client.toml")
    host.run("dpkg", "--remove", "forwarder")
    assert not forwarder_pids(host)
    left = host.run("find", "/etc/forwarder", "/usr/lib/forwarder", "/usr/bin/forwarder", check=False).stdout.split()
    assert "/etc/forwarder/laptop.key" in left and not [path for path in left if path.startswith("/usr")]
    host.run("dpkg", "--purge", "forwarder")
    host.run("sh", "-c", "rm -r /etc/systemd/system/forwarder*.service.d")  # the test's own
    assert changed(before, host.run("sh", "-c", EVERYTHING).stdout) == []
