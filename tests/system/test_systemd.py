"""The units under a real systemd, which boots in namespaces of the test's own: every verb, with a transfer going on.

FORWARDER_TEST_LONG=1 runs them: they build the package and need debootstrap, and a network for both.
"""

import os
import time
from collections.abc import Iterator

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
    pytest.mark.deadline(600),
]
CLIENT, SERVER = "forwarder@client", "forwarder@server"
SPRAY_CLIENT, SPRAY_SERVER = "forwarder-spray@client-spray", "forwarder-spray@server-spray"
DRAIN_S, MARGIN_S = 15.0, 7.0
RECOVERED_S = 3.0
TAKER = """
import os, socket, time
taken = socket.create_server(("127.0.0.1", 80))
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    package = built_package()
    with Booted(tmp_path_factory.mktemp("booted")) as host:
        install(host, package)
        set_up(host)
        serve(host, TARGET)
        serve(host, ECHO)
        yield host


@pytest.fixture
def host(booted: Booted) -> Booted:
    """With both ends of the stripes running."""
    booted.run("systemctl", "reset-failed")
    booted.run("systemctl", "start", CLIENT, SERVER)
    wait_stripes(booted)
    return booted


def wait_stripes(host: Booted) -> None:
    host.wait(lambda: stripes(host) == 10, "stripes")


def stripes(host: Booted) -> int:
    return sum(session["carriers_up"] for session in status(host, "client")["tunnels"][0]["sessions"])


def override(host: Booted, setting: str | None) -> None:
    """One setting of the client's unit, until None takes it away."""
    folder = f"/run/systemd/system/{CLIENT}.service.d"
    write = f"mkdir -p {folder}; printf '[Service]\\n{setting}\\n' >{folder}/test.conf"
    host.run("sh", "-c", write if setting else f"rm -r {folder}")
    host.run("systemctl", "daemon-reload")


def main_pid(host: Booted, unit: str) -> int:
    return int(shown(host, unit, "MainPID"))


def test_start_returns_when_it_serves(host: Booted) -> None:
    host.run("systemctl", "stop", CLIENT)
    host.run("systemctl", "start", CLIENT)
    assert [worker["state"] for worker in status(host, "client")["workers"]] == ["up", "up"]
    assert shown(host, CLIENT, "StatusText") == "serves (workers: 2)"
    Transfer(host, 20).check()


def test_processes_are_the_packaged_users_with_one_capability_under_seccomp(host: Booted) -> None:
    for pid in forwarder_pids(host):
        lines = host.run("cat", f"/proc/{pid}/status").stdout.splitlines()
        said = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert said["Uid"][0] == host.run("id", "-u", "forwarder").stdout.strip()
        assert said["CapPrm"] == said["CapBnd"] == [f"{1 << 10:016x}"]  # CAP_NET_BIND_SERVICE
        assert said["Seccomp"] == ["2"] and said["NoNewPrivs"] == ["1"]
    exposure = host.run("systemd-analyze", "security", "--no-pager", f"{CLIENT}.service").stdout.split("for ")[-1]
    assert float(exposure.split()[1]) <= 3.0


def test_reload_keeps_process_and_transfer(host: Booted) -> None:
    transfer, pid = Transfer(host, 40, 0.05), main_pid(host, CLIENT)
    for unit in (CLIENT, SERVER, CLIENT):
        host.run("systemctl", "reload", unit)
        host.wait(lambda unit=unit: shown(host, unit, "ActiveState") == "active", "end of the reload", 2.0)
    assert transfer.going_on
    transfer.check()
    assert main_pid(host, CLIENT) == pid


@pytest.mark.parametrize("unit", [CLIENT, SERVER])
def test_restart_waits_for_the_transfer(host: Booted, unit: str) -> None:
    transfer, pid = Transfer(host, 60, 0.05), main_pid(host, unit)
    started = time.monotonic()
    host.run("systemctl", "restart", unit)
    assert time.monotonic() - started > 2
    transfer.check()
    assert main_pid(host, unit) != pid
    wait_stripes(host)
    Transfer(host, 5).check()


def test_stop_ends_at_its_deadline_and_not_before(host: Booted) -> None:
    transfer = Transfer(host, 1000, 0.1)
    started = time.monotonic()
    host.run("systemctl", "stop", CLIENT)
    assert DRAIN_S - 1 < time.monotonic() - started < DRAIN_S + MARGIN_S
    assert "ConnectionResetError" in transfer.end()
    assert shown(host, CLIENT, "Result") == "success"


def test_drain_that_takes_longer_than_the_units_patience_is_waited_for(host: Booted) -> None:
    override(host, "TimeoutStopSec=2s")
    transfer = Transfer(host, 100, 0.05)
    host.run("systemctl", "stop", CLIENT)
    transfer.check()
    assert shown(host, CLIENT, "Result") == "success"
    override(host, None)


def test_supervisor_killed_is_recovered_in_3_s(host: Booted) -> None:
    before, pid = forwarder_pids(host), main_pid(host, CLIENT)
    others = {str(main_pid(host, SERVER)), *(str(worker["pid"]) for worker in status(host, "server")["workers"])}
    host.run("sh", "-c", f"kill -KILL {pid}")
    host.wait(lambda: not (before - others) & forwarder_pids(host), "end of the old workers", 2.0)
    taken = host.wait(lambda: shown(host, CLIENT, "ActiveState") == "active", "recovery", RECOVERED_S)
    print(f"recovered after {taken:.1f} s")
    assert main_pid(host, CLIENT) not in (0, pid)
    wait_stripes(host)
    Transfer(host, 5).check()
    assert len(forwarder_pids(host)) == 6


def test_worker_killed_is_no_matter_for_systemd(host: Booted) -> None:
    pid, restarts = main_pid(host, CLIENT), shown(host, CLIENT, "NRestarts")
    host.run("sh", "-c", f"kill -KILL {status(host, 'client')['workers'][0]['pid']}")
    wait_stripes(host)
    assert (main_pid(host, CLIENT), shown(host, CLIENT, "NRestarts")) == (pid, restarts)


def test_supervisor_that_hangs_is_replaced(host: Booted) -> None:
    override(host, "WatchdogSec=2s")
    host.run("systemctl", "restart", CLIENT)
    pid = main_pid(host, CLIENT)
    time.sleep(5)
    assert main_pid(host, CLIENT) == pid
    host.run("sh", "-c", f"kill -STOP {pid}")
    host.wait(lambda: main_pid(host, CLIENT) not in (0, pid), "replacement", 10.0)
    host.wait(lambda: shown(host, CLIENT, "ActiveState") == "active", "recovery")
    assert "watchdog" in host.run("journalctl", "--unit", CLIENT).stdout
    override(host, None)


def test_mistake_in_the_file_is_final_and_said(host: Booted) -> None:
    host.run("sh", "-c", "echo 'role = \"both\"' >/etc/forwarder/broken.toml")
    assert host.run("systemctl", "start", "forwarder@broken", check=False).returncode != 0
    assert shown(host, "forwarder@broken", "ExecMainStatus") == "78"
    time.sleep(2)
    assert shown(host, "forwarder@broken", "NRestarts") == "0"
    said = host.run("journalctl", "--unit", "forwarder@broken", "--output", "cat").stdout
    assert 'broken.toml: role: expected "client" or "server"' in said


def test_taken_port_is_tried_until_it_is_free(host: Booted) -> None:
    host.run("systemctl", "stop", CLIENT)
    taker = host.popen("python3", "-c", TAKER)
    assert taker.stdout is not None
    pid = taker.stdout.readline().strip()
    host.run("systemctl", "start", "--no-block", CLIENT)
    host.wait(lambda: int(shown(host, CLIENT, "NRestarts")) >= 2, "tries")
    host.run("sh", "-c", f"kill {pid}")
    taker.wait(5)
    host.wait(lambda: shown(host, CLIENT, "ActiveState") == "active", "success")


def test_enabled_instance_is_wanted_at_boot(host: Booted) -> None:
    host.run("systemctl", "enable", CLIENT)
    assert "client" in host.run("systemctl", "list-dependencies", "multi-user.target").stdout
    host.run("systemctl", "disable", CLIENT)


def test_datagrams_pass_where_the_unit_gives_the_rights(host: Booted) -> None:
    said = host.run("systemctl", "start", "forwarder@client-spray", check=False)
    assert said.returncode != 0
    assert shown(host, "forwarder@client-spray", "ExecMainStatus") == "77"
    host.run("systemctl", "start", SPRAY_SERVER, SPRAY_CLIENT)
    assert host.run("python3", "-c", DATAGRAMS).stdout == "500 True\n"
    kinds = {carrier["kind"] for carrier in status(host, "client-spray")["tunnels"][0]["sessions"][0]["carriers"]}
    assert len(kinds) == 2
    host.run("systemctl", "stop", SPRAY_SERVER, SPRAY_CLIENT)


def test_nothing_is_left_after_a_stop(host: Booted) -> None:
    host.run("systemctl", "stop", "forwarder@*", "forwarder-spray@*")
    assert not forwarder_pids(host)
    assert host.run("ls", "/run/forwarder").stdout == ""
