"""The supervisor with real processes and fake workers (tests/system/supervised.py)."""

import json
import os
import pwd
import signal
import socket
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from forwarder.control import request
from forwarder.privileges import CAP_NET_ADMIN, CAP_NET_RAW
from tests.system.rig import PATIENCE_S, Rig, is_alive, wait_until
from workers.settings import Address, LogSettings, SprayClientTunnel


def capabilities_of(pid: int) -> int:
    """The effective ones."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("CapEff")), 16)


def test_start_gives_every_worker_what_is_its_own_and_no_more(rig: Rig) -> None:
    process = rig.start(workers=3, pid_file=True, log=LogSettings(file=str(rig.directory / "log")))
    born = rig.events("born")
    serials = {line["slot"]: line["serial"] for line in born}
    assert len(set(serials.values())) == 3 and 0 not in serials.values()
    for line in born:
        assert line["peers"] == [[slot, serials[slot]] for slot in range(3) if slot != line["slot"]]
        # The socket for log lines is all that the boot parameters do not name.
        assert [name.split(":")[0] for name in line["stray"]] == ["socket"]
    for slot, seen in enumerate(rig.status()["open"]):
        others = [other for other in range(3) if other != slot]
        assert [seen[f"arena_{other}"] for other in others] == [serials[other] for other in others]
        assert [seen[f"ring_{other}"] for other in others] == [serials[other] for other in others]
        assert seen["inbox"] == 2
    titles = [Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0") for pid in (process.pid, born[0]["pid"])]
    assert titles == ["forwarder: supervisor plan0.json", f"forwarder: worker {born[0]['slot']}"]


def test_each_worker_of_a_spray_client_has_its_datagram_socket_and_no_others(rig: Rig) -> None:
    local = Address("127.0.0.1", rig.port)
    spray = SprayClientTunnel(name="kcp", index=1, ports=(80,), type="udp", local=local, hosts=("server",))
    process = rig.start(workers=3, spray_client_tunnels=(spray,), log=LogSettings(file=str(rig.directory / "log")))
    os.kill(rig.worker_pids()[0], signal.SIGKILL)
    wait_until(lambda: len(rig.events("born")) == 4, "a replacement")
    for line in rig.events("born"):
        assert line["listeners"] == {"0": 1, "1": 1}
        assert [name.split(":")[0] for name in line["stray"]] == ["socket"]
    wait_until(lambda: rig.all_up(3), "every worker up")
    assert [(tunnel["name"], tunnel["mode"]) for tunnel in rig.status()["tunnels"]] == [
        ("web", "stripe"),
        ("kcp", "spray"),
    ]
    process.terminate()
    assert rig.end(process)[0] == 0
    rig.assert_nothing_left()


def test_missing_device_stops_the_start_with_its_line(rig: Rig) -> None:
    local = Address("127.0.0.1", rig.port)
    spray = SprayClientTunnel(name="kcp", index=1, ports=(80,), device="nosuch0", local=local, hosts=("server",))
    code, stderr = rig.end(rig.start(ready=False, spray_client_tunnels=(spray,)))
    assert (code, stderr.splitlines()[-1]) == (69, "tunnel 'kcp': no device 'nosuch0' on this host")
    assert rig.events("born") == []
    rig.assert_nothing_left()


def test_pinned_workers_have_a_core_each(rig: Rig) -> None:
    rig.start(pin=True)
    cores = sorted(os.sched_getaffinity(0))
    assert {line["slot"]: line["cores"] for line in rig.events("born")} == {
        slot: [cores[slot % len(cores)]] for slot in range(2)
    }


def test_status_merges_the_workers_reports(rig: Rig) -> None:
    process = rig.start()
    status = rig.status()
    assert status["role"] == "client" and status["pid"] == process.pid and status["uptime_s"] >= 0
    assert [worker["restarts"] for worker in status["workers"]] == [0, 0]
    (tunnel,) = status["tunnels"]
    (session,) = tunnel["sessions"]  # the same session id in both workers
    assert tunnel["state"] == "up" and tunnel["flows_open"] == 6 and session["carriers_up"] == 10
    assert rig.socket.stat().st_mode & 0o777 == 0o600


def test_what_is_open_is_counted_only_for_who_asks(rig: Rig) -> None:
    rig.start()
    assert "open" not in request(rig.socket, {"command": "status"}, PATIENCE_S)
    assert len(request(rig.socket, {"command": "status", "counts": True}, PATIENCE_S)["open"]) == 2
    assert "open" not in request(rig.socket, {"command": "status"}, PATIENCE_S)


def test_mute_worker_is_down_in_the_status(rig: Rig) -> None:
    rig.start(behaviour={"1": "mute"}, ready=False)
    wait_until(lambda: rig.states() == ["up", "down"], "one worker up and one asked in vain")
    assert rig.events("StatusRequest", 1)
    began = time.monotonic()
    status = rig.status()
    assert time.monotonic() - began < 2
    assert [worker["state"] for worker in status["workers"]] == ["up", "down"]
    assert status["tunnels"][0]["state"] == "degraded"


def test_worker_that_cannot_start_stops_everything_with_its_line(rig: Rig) -> None:
    code, stderr = rig.end(rig.start(behaviour={"1": "fail"}, ready=False))
    assert code == 78
    assert "this fake cannot start" in stderr.splitlines()
    assert len(rig.events("born", 1)) == 1
    rig.assert_nothing_left()


def test_worker_that_crashes_at_every_start_is_tried_again_then_given_up(rig: Rig) -> None:
    code, stderr = rig.end(rig.start(behaviour={"all": "crash"}, workers=1, ready=False))
    assert code == 1
    assert "worker 0 died 5 times in a row before it was ready" in stderr.splitlines()
    assert stderr.count("RuntimeError: this fake crashes") == 5  # what it logged last is not lost
    assert len(rig.events("born")) == 5
    rig.assert_nothing_left()


def test_killed_worker_is_replaced_and_the_others_are_told(rig: Rig) -> None:
    rig.start(workers=3)
    before = {line["slot"]: line for line in rig.events("born")}
    os.kill(before[1]["pid"], signal.SIGKILL)
    (second,) = wait_until(lambda: rig.events("born", 1)[1:], "a replacement")
    serials = {0: before[0]["serial"], 1: second["serial"], 2: before[2]["serial"]}
    assert second["serial"] not in [line["serial"] for line in before.values()]
    assert second["peers"] == [[0, serials[0]], [2, serials[2]]]
    wait_until(lambda: rig.all_up(3), "every worker up")
    for slot in (0, 2):
        gone = [line["message"] for line in rig.events("PeerGone", slot)]
        joined = [line["message"] for line in rig.events("PeerJoined", slot)]
        assert [(line["slot"], line["serial"]) for line in gone] == [(1, before[1]["serial"])]
        assert [(line["slot"], line["serial"]) for line in joined] == [(1, serials[1])]
        arena, ring, event = "/memfd:forwarder-arena", "/memfd:forwarder-ring", "anon_inode:[eventfd]"
        kinds = [kind.split(":")[0] for kind in rig.events("joined", slot)[0]["kinds"][:-1]]
        assert kinds == [each.split(":")[0] for each in (arena, ring, event, event, ring, event, event)]
    status = rig.status()
    assert [worker["restarts"] for worker in status["workers"]] == [0, 1, 0]
    assert status["open"][0]["arena_1"] == status["open"][0]["ring_1"] == serials[1]
    assert status["open"][1]["arena_2"] == status["open"][1]["ring_2"] == serials[2]


def test_two_workers_killed_at_once_meet_again(rig: Rig) -> None:
    rig.start(workers=3)
    for pid in rig.worker_pids()[:2]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(rig.events("born")) == 5 and rig.all_up(3), "every worker up")
    serials = [worker["serial"] for worker in rig.status()["workers"]]
    wait_until(
        lambda: all(
            seen.get(f"{what}_{other}") == serials[other]
            for slot, seen in enumerate(rig.status()["open"])
            for other in range(3)
            if other != slot
            for what in ("arena", "ring")
        ),
        "everybody knows everybody",
    )


def test_hung_worker_is_killed_and_replaced(rig: Rig) -> None:
    process = rig.start(behaviour={"1": "hang"})
    first = rig.events("born", 1)[0]["pid"]
    wait_until(lambda: len(rig.events("born", 1)) == 2 and rig.all_up(2), "a replacement")
    assert not is_alive(first)
    assert len(rig.events("born", 0)) == 1
    process.send_signal(signal.SIGTERM)
    code, stderr = rig.end(process)
    assert code == 0 and "a worker is hung and is killed worker=1" in stderr


def test_paused_machine_kills_nobody(rig: Rig) -> None:
    process = rig.start()
    everybody = [*rig.worker_pids(), process.pid]
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)  # six ticks
    for pid in reversed(everybody):
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)
    time.sleep(1.2)
    assert [worker["restarts"] for worker in rig.status()["workers"]] == [0, 0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_drain_accepts_nothing_more_and_ends_with_0(rig: Rig, signum: signal.Signals) -> None:
    process = rig.start(behaviour={"0": "slow"}, pid_file=True)
    assert rig.pid_file.read_text() == f"{process.pid}\n"
    os.killpg(process.pid, signum)  # as a terminal or a service manager does: workers must not take it personally
    wait_until(lambda: rig.events("Drain", 0), "a drain")
    assert rig.events("Drain", 0)[0]["message"]["timeout_s"] == 1.0
    assert rig.status()["tunnels"][0]["state"] == "draining"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", rig.port))
    code, stderr = rig.end(process)
    assert code == 0, stderr
    assert len(rig.events("leaving")) == 2 and len(rig.worker_pids()) == 2
    rig.assert_nothing_left()


def test_worker_that_does_not_drain_is_killed_in_the_end(rig: Rig) -> None:
    process = rig.start(behaviour={"0": "stubborn"})
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _ = rig.end(process)
    assert code == 0
    assert 1.5 <= time.monotonic() - began < 4
    rig.assert_nothing_left()


def test_second_term_ends_the_drain(rig: Rig) -> None:
    process = rig.start(behaviour={"0": "stubborn"}, drain_timeout_s=60.0)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: rig.events("Drain", 0), "a drain")
    process.send_signal(signal.SIGTERM)
    assert rig.end(process)[0] == 0
    assert len(rig.events("Quit", 0)) == 1
    rig.assert_nothing_left()


def test_quit_ends_at_once(rig: Rig) -> None:
    process = rig.start(drain_timeout_s=60.0)
    process.send_signal(signal.SIGQUIT)
    assert rig.end(process)[0] == 0
    assert len(rig.events("Quit")) == 2 and not rig.events("Drain")
    rig.assert_nothing_left()


def test_term_while_workers_start_ends_at_once(rig: Rig) -> None:
    process = rig.start(behaviour={"1": "late"}, ready=False)
    wait_until(lambda: len(rig.worker_pids()) == 2, "two workers")
    process.send_signal(signal.SIGTERM)
    assert rig.end(process)[0] == 0
    rig.assert_nothing_left()


def test_killed_supervisor_takes_its_workers_along_and_hinders_no_successor(rig: Rig) -> None:
    first = rig.start(pid_file=True, behaviour={"all": "stubborn"})  # they do not look at their channel's end
    first.kill()
    first.wait()
    second = rig.start(pid_file=True)
    wait_until(lambda: not any(is_alive(pid) for pid in rig.worker_pids()[:2]), "the end of the first workers", 2)
    assert rig.pid_file.read_text() == f"{second.pid}\n"
    second.send_signal(signal.SIGTERM)
    assert rig.end(second)[0] == 0
    rig.assert_nothing_left()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_worker_that_became_another_user_dies_with_the_supervisor(rig: Rig) -> None:
    process = rig.start(user="nobody", behaviour={"all": "stubborn"})
    assert {line["uid"] for line in rig.events("born")} == {pwd.getpwnam("nobody").pw_uid}
    process.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in rig.worker_pids()), "the end of the workers", 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(("kind", "wanted"), [("udp", 0), ("tcp", 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW)])
def test_worker_that_became_another_user_keeps_what_fake_tcp_needs(
    rig: Rig, kind: Literal["tcp", "udp"], wanted: int
) -> None:
    held = capabilities_of(os.getpid())
    if not held >> CAP_NET_RAW & 1:
        pytest.skip("no packet sockets here")
    local = Address("127.0.0.1", rig.port)
    spray = SprayClientTunnel(name="kcp", index=1, ports=(80,), type=kind, local=local, hosts=("server",))
    process = rig.start(user="nobody", spray_client_tunnels=(spray,))
    os.kill(rig.worker_pids()[0], signal.SIGKILL)
    wait_until(lambda: len(rig.events("born")) == 3, "a replacement")
    for pid in rig.worker_pids()[1:]:
        assert capabilities_of(pid) == held & wanted
    process.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in rig.worker_pids()), "the end of the workers", 2)


def test_second_instance_is_refused_and_the_first_goes_on(rig: Rig) -> None:
    first = rig.start()
    code, stderr = rig.end(rig.start(ready=False))
    assert code == 69
    assert stderr == f"already running with pid {first.pid} (control socket {rig.socket})\n"
    assert rig.status()["pid"] == first.pid


def test_refused_start_writes_nothing_into_the_log_of_the_first(rig: Rig) -> None:
    settings: dict[str, Any] = {"log": LogSettings(file=str(rig.directory / "log")), "pid_file": True}
    rig.start(**settings)
    before = (rig.directory / "log").read_text()
    for changes in ({}, {"control_socket": str(rig.directory / "other.sock")}):
        code, stderr = rig.end(rig.start(ready=False, **settings, **changes))
        assert code == 69 and "already running" in stderr
    assert (rig.directory / "log").read_text() == before


def test_held_pid_file_is_refused(rig: Rig) -> None:
    first = rig.start(pid_file=True)
    other = rig.directory / "other.sock"
    code, stderr = rig.end(rig.start(pid_file=True, ready=False, control_socket=str(other)))
    assert code == 69
    assert stderr == f"already running with pid {first.pid} (pid file {rig.pid_file})\n"
    assert rig.pid_file.read_text() == f"{first.pid}\n" and not other.exists()


def test_taken_port_is_one_line_and_69(rig: Rig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", rig.port))
        taken.listen()
        code, stderr = rig.end(rig.start(ready=False, pid_file=True))
    assert code == 69
    assert stderr == f"tunnel 'web': cannot listen on 127.0.0.1:{rig.port}: address already in use\n"
    rig.assert_nothing_left()


def test_daemon_returns_once_it_serves(rig: Rig) -> None:
    log_file = rig.directory / "log"
    starter = rig.start(daemon=True, pid_file=True, ready=False, log=LogSettings(file=str(log_file)))
    assert rig.end(starter) == (0, "")
    rig.daemon_pid = pid = int(rig.pid_file.read_text())
    assert rig.all_up(2) and rig.status()["pid"] == pid != starter.pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/" and os.readlink(f"/proc/{pid}/fd/2") == str(log_file)
    assert os.getsid(pid) not in (pid, os.getsid(0))
    assert request(rig.socket, {"command": "stop", "now": False}, PATIENCE_S) == {"stopping": True, "pid": pid}
    wait_until(lambda: not is_alive(pid), "the daemon's end", 1)
    assert "forwarder has stopped" in log_file.read_text()
    rig.assert_nothing_left()


def test_daemon_leaves_its_last_words_in_the_log_also_after_a_rotation(rig: Rig) -> None:
    log_file = rig.directory / "log"
    assert rig.end(rig.start(daemon=True, pid_file=True, ready=False, log=LogSettings(file=str(log_file)))) == (0, "")
    rig.daemon_pid = pid = int(rig.pid_file.read_text())
    log_file.rename(rig.directory / "log.1")
    os.kill(pid, signal.SIGHUP)
    wait_until(lambda: os.readlink(f"/proc/{pid}/fd/2") == str(log_file), "a new standard error")
    assert rig.worker_pids() and all(
        os.readlink(f"/proc/{worker}/fd/2") == str(rig.directory / "log.1") for worker in rig.worker_pids()
    )


def test_daemon_that_cannot_start_tells_its_starter(rig: Rig) -> None:
    log_file = rig.directory / "log"
    starter = rig.start(
        daemon=True, pid_file=True, ready=False, behaviour={"0": "fail"}, log=LogSettings(file=str(log_file))
    )
    assert rig.end(starter) == (78, "this fake cannot start\n")
    wait_until(lambda: not rig.pid_file.exists(), "the daemon's end")
    rig.assert_nothing_left()


def test_daemon_without_a_log_file_is_refused(rig: Rig) -> None:
    code, stderr = rig.end(rig.start(daemon=True, ready=False))
    assert code == 78 and len(stderr.splitlines()) == 1 and "log.file" in stderr
    rig.assert_nothing_left()


def test_hup_reopens_the_log_that_workers_share(rig: Rig) -> None:
    log_file = rig.directory / "log"
    process = rig.start(log=LogSettings(file=str(log_file), format="json"))
    rotated = log_file.rename(rig.directory / "log.1")
    lines = [json.loads(line) for line in rotated.read_text().splitlines()]
    fake = [line for line in lines if line["message"] == "a fake is born"]
    assert sorted(line["process"] for line in fake) == ["worker 0", "worker 1"]
    process.send_signal(signal.SIGHUP)
    wait_until(log_file.exists, "a new log file")
    os.kill(rig.worker_pids()[0], signal.SIGKILL)
    wait_until(lambda: "a fake is born" in log_file.read_text(), "a worker's line in the new file")
    assert "forwarder has stopped" not in rotated.read_text()


def test_full_log_stops_nothing(rig: Rig) -> None:
    process = rig.start(log=LogSettings(file="/dev/full"))
    os.kill(rig.worker_pids()[0], signal.SIGKILL)
    wait_until(lambda: len(rig.worker_pids()) == 3 and rig.all_up(2), "a replacement")
    process.send_signal(signal.SIGTERM)
    told = "log file /dev/full: no space left on device: lines are lost until it takes them again\n"
    assert rig.end(process) == (0, told)


def test_clients_that_say_nothing_block_nobody(rig: Rig) -> None:
    rig.start()
    silent = []
    for _ in range(40):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(rig.socket))
        sock.send(b'{"command": "sta')
        silent.append(sock)
    assert rig.all_up(2)
    assert request(rig.socket, {"command": "dance"}, PATIENCE_S) == {"error": "unknown command 'dance'"}
    for sock in silent:
        sock.close()


def test_stop_now_quits(rig: Rig) -> None:
    process = rig.start(drain_timeout_s=60.0)
    request(rig.socket, {"command": "stop", "now": True}, PATIENCE_S)
    assert process.wait(1) == 0
    assert len(rig.events("Quit")) == 2
    rig.assert_nothing_left()
