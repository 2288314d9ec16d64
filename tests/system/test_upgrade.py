"""Upgrade in place with fake workers: the supervisor becomes another program, and nobody notices."""

import base64
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from forwarder import __version__
from forwarder.control import ControlError, request
from tests.free_ports import free_port
from tests.system.rig import ROOT, Rig, is_alive, wait_until
from tests.system.test_reload import connects, descriptors, last_settings, tunnel, tunnels
from workers.settings import Address, LogSettings, SprayClientTunnel


def upgraded(rig: Rig, times: int, workers: int = 2) -> bool:
    """Whether so many generations have been born since the first, and the last one is alone."""
    return len(rig.events("Retire")) >= times and rig.states() == ["up"] * workers


def test_usr2_keeps_pid_socket_pid_file_and_mesh(rig: Rig) -> None:
    spray = SprayClientTunnel(
        name="kcp", index=1, ports=(80,), type="udp", local=Address("127.0.0.1", free_port()), hosts=("server",)
    )
    process = rig.start(pid_file=True, spray_client_tunnels=(spray,))
    inode, uptime_s = rig.socket.stat().st_ino, rig.status()["uptime_s"]
    before, levels = rig.events("born"), []
    for times in range(1, 4):
        process.send_signal(signal.SIGUSR2)
        wait_until(lambda times=times: upgraded(rig, 2 * times), "an upgrade")
        levels.append(descriptors(process))
        status = rig.status()
        assert status["pid"] == process.pid and status["uptime_s"] > uptime_s
        assert rig.socket.stat().st_ino == inode and rig.pid_file.read_text() == f"{process.pid}\n"
        assert connects(rig.port)
    assert len(set(levels)) == 1
    after = rig.events("born")
    assert len(after) == 8
    assert {line["boot_id"] for line in after} == {before[0]["boot_id"]}
    assert len({line["serial"] for line in after}) == 8
    for line in after:
        assert [name.split(":")[0] for name in line["stray"]] == ["socket"]
    (first,) = [line for line in after[2:4] if line["slot"] == 2]
    assert {peer[0] for peer in first["peers"]} == {0, 1, 3}
    assert Path(f"/proc/{process.pid}/cmdline").read_text().startswith("forwarder: supervisor ")
    process.terminate()
    assert rig.end(process)[0] == 0
    rig.assert_nothing_left()


def test_usr2_takes_the_file_as_it_is_now(rig: Rig) -> None:
    process = rig.start()
    port = free_port()
    rig.change(**tunnels(tunnel("ssh", port), tunnel("web", rig.port)), workers=3)
    process.send_signal(signal.SIGUSR2)
    wait_until(lambda: upgraded(rig, 2, 3), "an upgrade")
    assert connects(port) and connects(rig.port)
    assert rig.events("born")[-1]["listeners"] == {"0": 1, "1": 1}
    assert rig.reload() == {"changes": []}
    rig.change(**tunnels(tunnel("ssh", port)))
    assert rig.reload() == {"changes": ["tunnel 'web': removed"]}
    assert [seen["ports"] for seen in last_settings(rig)] == [{"ssh": [1, port]}] * 3
    rig.change(**tunnels(tunnel("web", rig.port)))
    process.send_signal(signal.SIGUSR2)
    wait_until(lambda: upgraded(rig, 5, 3), "an upgrade")
    assert connects(rig.port) and not connects(port)
    for line in rig.events("born")[-3:]:
        assert [name.split(":")[0] for name in line["stray"]] == ["socket"]


def test_daemon_goes_on_as_one(rig: Rig) -> None:
    log_file = rig.directory / "log"
    starter = rig.start(daemon=True, pid_file=True, ready=False, log=LogSettings(file=str(log_file)))
    assert rig.end(starter) == (0, "")
    rig.daemon_pid = pid = int(rig.pid_file.read_text())
    os.kill(pid, signal.SIGUSR2)
    wait_until(lambda: upgraded(rig, 2), "an upgrade")
    assert os.readlink(f"/proc/{pid}/cwd") == "/" and os.readlink(f"/proc/{pid}/fd/2") == str(log_file)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_alive(pid), "the daemon's end")
    rig.assert_nothing_left()


def test_program_that_would_not_work_changes_nothing(rig: Rig) -> None:
    log = rig.directory / "log"
    process = rig.start(log=LogSettings(file=str(log)))
    before = descriptors(process)
    plan_file = rig.directory / "plan0.json"
    good = plan_file.read_bytes()
    plan_file.write_text("{")
    process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "ERROR" in log.read_text(), "the refusal")
    assert rig.all_up(2) and rig.events("Retire") == [] and descriptors(process) == before
    plan_file.write_bytes(good)
    (line,) = [line for line in log.read_text().splitlines() if "ERROR" in line]
    assert "upgrade: this version goes on reason=" in line and str(plan_file) in line


def test_file_that_breaks_between_check_and_exec_leaves_the_old_settings(rig: Rig) -> None:
    """The new program adopts what there is before it reads anything."""
    process = rig.start()
    (rig.directory / "plan0.json").rename(rig.directory / "kept.json")
    (rig.directory / "plan0.json").write_bytes(
        (rig.directory / "kept.json").read_bytes().replace(b'"user":null', b'"user":"nobody"')
    )
    process.send_signal(signal.SIGUSR2)
    wait_until(lambda: upgraded(rig, 2), "an upgrade")
    process.terminate()
    _, stderr = rig.end(process)
    assert "the configuration stays as it was" in stderr and "user cannot change while it runs" in stderr


def test_signals_around_the_exec_are_not_lost(rig: Rig) -> None:
    process = rig.start(behaviour={"all": "busy"})
    process.send_signal(signal.SIGUSR2)
    end = time.monotonic() + 20
    while not rig.events("Retire") and time.monotonic() < end:
        for signum in (signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD):
            process.send_signal(signum)
        time.sleep(0.002)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, stderr = rig.end(process)
    assert code == 0, stderr
    rig.assert_nothing_left()


def test_term_right_after_usr2_drains(rig: Rig) -> None:
    for delay_s in (0.0, 0.05, 0.15, 0.25, 0.3, 0.35):
        process = rig.start()
        process.send_signal(signal.SIGUSR2)
        time.sleep(delay_s)
        process.send_signal(signal.SIGTERM)
        code, stderr = rig.end(process)
        assert code == 0, stderr
        rig.assert_nothing_left()


def test_new_generation_that_does_not_come_up_leaves_the_old_one(rig: Rig) -> None:
    process = rig.start(behaviour={"2": "fail!"})
    port = free_port()
    rig.change(**tunnels(tunnel("ssh", port), tunnel("web", rig.port)))
    process.send_signal(signal.SIGUSR2)
    wait_until(lambda: rig.events("born", 2), "a worker that fails")
    wait_until(lambda: rig.states() == ["up"] * 2, "the old ones alone")
    assert not connects(port) and connects(rig.port)
    assert [tunnel["name"] for tunnel in rig.status()["tunnels"]] == ["web"]
    os.kill(rig.events("born", 0)[0]["pid"], signal.SIGKILL)  # the old generation is whole again
    wait_until(lambda: len(rig.events("born", 0)) == 2 and rig.all_up(2), "a replacement")
    process.terminate()
    _, stderr = rig.end(process)
    assert 'the new generation of workers is given up reason="this fake cannot start"' in stderr


def test_workers_of_another_format_drain_apart(rig: Rig) -> None:
    process = rig.start(behaviour={"0": "busy"}, environment={"FAKE_FORMAT": "1"})
    process.send_signal(signal.SIGUSR2)
    wait_until(lambda: len(rig.events("Drain")) == 2, "the old ones drain")
    wait_until(lambda: rig.all_up(2), "the new ones alone")
    born = sorted(rig.events("born"), key=lambda line: line["slot"])
    assert rig.events("Retire") == [] and rig.events("PeerJoined") == []
    assert born[2]["boot_id"] != born[0]["boot_id"] and [peer[0] for peer in born[2]["peers"]] == [3]
    process.terminate()
    assert rig.end(process)[0] == 0
    rig.assert_nothing_left()


def test_no_connection_is_refused_meanwhile(rig: Rig) -> None:
    process = rig.start()
    refused: list[OSError] = []
    done = threading.Event()

    def storm() -> None:
        while not done.is_set():
            try:
                socket.create_connection(("127.0.0.1", rig.port), 5).close()
            except OSError as error:
                refused.append(error)
            time.sleep(0.001)

    thread = threading.Thread(target=storm)
    thread.start()
    for times in range(1, 3):
        process.send_signal(signal.SIGUSR2)
        wait_until(lambda times=times: upgraded(rig, 2 * times), "an upgrade")
        rig.change(**tunnels(tunnel("web", rig.port, remote_end=Address("server", 1 + times))))
        rig.reload()
    done.set()
    thread.join()
    assert refused == []


def test_new_version_is_taken_up_and_a_broken_one_is_not(tmp_path: Path) -> None:
    """The real program, from a directory in which it is replaced."""
    for package in ("forwarder", "workers"):
        shutil.copytree(ROOT / package, tmp_path / package)
    file, port = tmp_path / "client.toml", free_port()
    (tmp_path / "laptop.key").write_bytes(base64.b64encode(bytes(32)))
    (tmp_path / "laptop.key").chmod(0o600)
    file.write_text(
        'role = "client"\nworkers = 1\ncontrol.socket = "it.sock"\n[auth]\nkey_id = "laptop"\nkey_file = "laptop.key"\n'
        f'[[tunnel]]\nname = "web"\nmode = "stripe"\nhost = "127.0.0.1"\nhost_port = {free_port()}\n'
        f"local_port = {port}\n"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-m", "forwarder", "start", "-c", "client.toml", "--log-level", "warning"]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=output)

    def status() -> dict[str, Any]:
        try:
            return request(tmp_path / "it.sock", {"command": "status"}, 10)
        except ControlError:
            return {}

    def workers() -> list[tuple[int, str]]:
        return [(worker["id"], worker["state"]) for worker in status().get("workers", [])]

    try:
        wait_until(lambda: workers() == [(0, "up")], "the start", 30)
        launch, init = tmp_path / "forwarder" / "launch.py", tmp_path / "forwarder" / "__init__.py"
        good = launch.read_text()
        launch.write_text(good + "\nraise RuntimeError('half installed')\n")
        process.send_signal(signal.SIGUSR2)
        wait_until(lambda: "ERROR" in log.read_text(), "the refusal", 30)
        assert workers() == [(0, "up")] and connects(port)
        launch.write_text(good)
        init.write_text(init.read_text().replace(__version__, "99.0"))
        process.send_signal(signal.SIGUSR2)
        wait_until(lambda: status().get("version") == "99.0" and workers() == [(1, "up")], "the new version", 30)
        assert connects(port)
        process.terminate()
        assert process.wait(20) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    (line,) = [line for line in log.read_text().splitlines() if "ERROR" in line]
    assert line.endswith('upgrade: this version goes on reason="RuntimeError: half installed"')


@pytest.mark.parametrize("descriptors_left", [0, 20])
def test_shortage_of_descriptors_leaves_what_there_is(rig: Rig, descriptors_left: int) -> None:
    log = rig.directory / "log"
    process = rig.start(workers=3, log=LogSettings(file=str(log)))
    limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir(f"/proc/{process.pid}/fd"))
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (highest + 1 + descriptors_left, limits[1]))
    rig.change(drain_timeout_s=2.0)
    for signum, outcomes in (
        (signal.SIGTTIN, ("cannot start 4 workers",)),
        (signal.SIGUSR2, ("upgrade: this version goes on",)),
        (signal.SIGHUP, ("the configuration stays as it was", "the configuration was read again")),
    ):
        process.send_signal(signum)
        wait_until(lambda words=outcomes: any(each in log.read_text() for each in words), str(outcomes))
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: rig.all_up(3), "the three there were")
    assert rig.events("Retire") == []
    process.send_signal(signal.SIGUSR2)
    wait_until(lambda: upgraded(rig, 3, 3), "an upgrade")
    process.terminate()
    assert rig.end(process)[0] == 0 and "oo many open files" in log.read_text()
    rig.assert_nothing_left()


def test_killed_supervisor_takes_workers_of_every_generation_along(rig: Rig) -> None:
    process = rig.start(behaviour={"all": "busy"})
    process.send_signal(signal.SIGUSR2)
    wait_until(lambda: rig.states() == ["draining"] * 2 + ["up"] * 2, "an upgrade")
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in rig.worker_pids()), "the end of the workers", 2)


def test_reloads_that_are_asked_for_meanwhile_are_answered(rig: Rig) -> None:
    process = rig.start()
    answers = []
    for number in range(30):
        if number % 10 == 0:
            process.send_signal(signal.SIGUSR2)
        rig.change(drain_timeout_s=1.0 + number % 2)
        try:
            answers.append(rig.reload())
        except ControlError as error:  # the very moment of the exec: it was not taken up yet
            answers.append({"changes": [str(error)]})
        time.sleep(0.03)
    wait_until(lambda: len(rig.events("Retire")) >= 2 and rig.all_up(2), "an upgrade")
    assert all("error" not in answer for answer in answers)
    process.terminate()
    code, stderr = rig.end(process)
    assert code == 0 and "ERROR" not in stderr, stderr


def test_wish_behind_an_upgrade_is_not_left_behind(rig: Rig) -> None:
    process = rig.start()
    for signum in (signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTIN):
        process.send_signal(signum)
        time.sleep(0.02)
    wait_until(lambda: rig.states() == ["up"] * 4 and rig.status()["workers"][0]["id"] > 3, "four workers")
