"""Reload, and generations of workers, with fake workers; the real ones are in test_life.py."""

import json
import os
import signal
import socket
import subprocess
import time
from typing import Any

import msgspec

from tests.free_ports import free_port, free_ports
from tests.system.rig import Rig, wait_until
from workers.settings import Address, Key, LogSettings, SprayClientTunnel, StripeClientTunnel


def tunnel(name: str, port: int, **changes: Any) -> StripeClientTunnel:
    local = Address("127.0.0.1", port)
    made = StripeClientTunnel(name=name, index=0, local=local, remote_end=Address("server", 1))
    return msgspec.structs.replace(made, **changes)


def tunnels(*found: StripeClientTunnel) -> dict[str, Any]:
    """In the file's order."""
    return {"client_tunnels": tuple(msgspec.structs.replace(each, index=at) for at, each in enumerate(found))}


def connects(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def last_settings(rig: Rig) -> list[dict[str, Any]]:
    """What each worker has taken last, by its process."""
    last = {line["pid"]: line for line in rig.events("settings")}
    return list(last.values())


def descriptors(process: subprocess.Popen[str]) -> int:
    found = []
    for _ in range(5):
        time.sleep(0.05)  # it closes what it was asked through
        found.append(len(os.listdir(f"/proc/{process.pid}/fd")))
    return min(found)


def retired(rig: Rig, workers: int) -> bool:
    """Whether as many workers are there and all of them serve."""
    return rig.states() == ["up"] * workers


def test_reload_without_a_change_tells_no_worker(rig: Rig) -> None:
    rig.start()
    assert rig.reload() == {"changes": []}
    assert rig.events("Reconfigure") == []


def test_tunnels_come_change_and_go(rig: Rig) -> None:
    rig.start()
    one, two = free_port(), free_port()
    rig.change(**tunnels(tunnel("ssh", one), tunnel("web", rig.port)))
    assert rig.reload() == {"changes": ["tunnel 'ssh': added"]}
    assert connects(one) and connects(rig.port)
    for seen in last_settings(rig):
        assert seen["ports"] == {"ssh": [1, one], "web": [0, rig.port]}
    assert [each["name"] for each in rig.status()["tunnels"]] == ["ssh", "web"]  # the file's order
    rig.change(**tunnels(tunnel("ssh", two), tunnel("web", rig.port, remote_end=Address("other", 1))))
    assert rig.reload() == {"changes": ["tunnel 'ssh': changed (local)", "tunnel 'web': changed (host)"]}
    assert connects(two) and not connects(one)
    for seen in last_settings(rig):
        assert seen["ports"] == {"ssh": [1, two], "web": [2, rig.port]}
    rig.change(**tunnels(tunnel("web", rig.port, remote_end=Address("other", 1))))
    assert rig.reload() == {"changes": ["tunnel 'ssh': removed"]}
    assert not connects(two) and connects(rig.port)
    os.kill(rig.events("born", 0)[0]["pid"], signal.SIGKILL)
    replaced = wait_until(lambda: rig.events("born", 0)[1:], "a replacement")
    assert replaced[0]["listeners"] == {"2": 1}


def test_reload_is_refused_as_a_whole(rig: Rig) -> None:
    process = rig.start()
    plan_file = rig.directory / "plan0.json"
    good = plan_file.read_bytes()
    plan_file.write_text("{")
    before = descriptors(process)
    answer = rig.reload()
    assert answer["code"] == 78 and answer["error"].startswith(f"{plan_file}: ")
    plan_file.write_bytes(good)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        rig.change(**tunnels(tunnel("new", free_port()), tunnel("web", rig.port), tunnel("ssh", port)))
        line = f"tunnel 'ssh': cannot listen on 127.0.0.1:{port}: address already in use"
        assert rig.reload() == {"error": line, "code": 69}
    for changes, key in (({"user": "nobody"}, "user"), ({"pin": True}, "pin"), ({"role": "server"}, "role")):
        plan_file.write_bytes(good)
        rig.change(**changes)
        answer = rig.reload()
        assert answer["code"] == 78 and f"{key} cannot change while it runs: expected " in answer["error"]
    assert rig.events("Reconfigure") == [] and descriptors(process) == before
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.terminate()
    _, stderr = rig.end(process)
    assert stderr.count("ERROR supervisor: the configuration stays as it was") == 6


def test_port_that_overlaps_with_our_own_takes_a_restart(rig: Rig) -> None:
    rig.start()
    rig.change(**tunnels(tunnel("web", rig.port, local=Address("0.0.0.0", rig.port))))
    answer = rig.reload()
    assert answer["code"] == 69
    assert answer["error"].endswith(
        f"address already in use, by this instance's 127.0.0.1:{rig.port}: changing that takes a restart"
    )
    assert connects(rig.port)


def test_keys_keep_their_places(rig: Rig) -> None:
    keys = tuple(Key(name, bytes(32)) for name in ("a", "b"))
    rig.start(role="server", client_tunnels=(), keys=keys)
    rig.change(keys=(Key("c", bytes(32)), Key("b", bytes(31) + b"1")))
    changes = ["key 'a': removed", "key 'b': changed (secret)", "key 'c': added"]
    assert rig.reload() == {"changes": changes}
    assert all(seen["keys"] == [["a", True], ["b", False], ["c", False]] for seen in last_settings(rig))


def test_log_follows_the_file(rig: Rig) -> None:
    first, second = rig.directory / "first", rig.directory / "second"
    rig.start(log=LogSettings(file=str(first)))
    rig.change(log=LogSettings(file=str(second), level="debug", format="json"))
    changes = ["log.level: info -> debug", "log.format: text -> json", f"log.file: {first} -> {second}"]
    assert rig.reload() == {"changes": changes}
    assert json.loads(second.read_text().splitlines()[0])["message"] == "the configuration was read again"
    assert [seen["level"] for seen in last_settings(rig)] == ["debug"] * 2


def test_fifty_reloads_leave_nothing_open(rig: Rig) -> None:
    process = rig.start()
    port = free_port()
    levels = []
    for number in range(50):
        more = [tunnel("ssh", port, somaxconn=number + 1)] if number % 2 else []
        rig.change(**tunnels(tunnel("web", rig.port, remote_end=Address("server", 2 + number)), *more))
        assert rig.reload()["changes"]
        if number in (2, 3, 24, 25, 48, 49):
            levels.append(descriptors(process))
    assert levels == levels[:2] * 3
    assert [worker["restarts"] for worker in rig.status()["workers"]] == [0, 0]


def test_thousands_of_listening_sockets_reach_slow_workers(rig: Rig) -> None:
    """Each Opened waits for its turn on a channel that takes a few at a time; nobody is killed for it."""
    process = rig.start(workers=3)
    before = descriptors(process)
    rig.change(**tunnels(tunnel("web", rig.port), *(tunnel(f"t{port}", port) for port in free_ports(500))))
    pids = rig.worker_pids()
    os.kill(pids[1], signal.SIGSTOP)
    answer = rig.reload_later()
    time.sleep(0.3)
    os.kill(pids[1], signal.SIGCONT)
    assert len(answer()["changes"]) == 500
    assert all(len(seen["ports"]) == 501 for seen in last_settings(rig)) and len(last_settings(rig)) == 3
    assert descriptors(process) == before + 500
    assert rig.worker_pids() == pids


# Generations


def test_more_and_fewer_workers(rig: Rig) -> None:
    spray = SprayClientTunnel(
        name="kcp", index=1, ports=(80,), type="udp", local=Address("127.0.0.1", free_port()), hosts=("server",)
    )
    process = rig.start(spray_client_tunnels=(spray,), pid_file=True)
    os.kill(rig.events("born", 0)[0]["pid"], signal.SIGKILL)
    wait_until(lambda: len(rig.events("born")) == 3 and rig.all_up(2), "a replacement")
    before = descriptors(process)
    process.send_signal(signal.SIGTTIN)
    wait_until(lambda: retired(rig, 3), "three workers")
    born = {line["slot"]: line for line in rig.events("born")}
    status = rig.status()["workers"]
    assert [worker["id"] for worker in status] == [2, 3, 4]
    assert [worker["restarts"] for worker in status] == [1, 0, 0]
    for slot in (2, 3, 4):
        assert (born[slot]["base"], born[slot]["workers"]) == (2, 3)
        assert {peer[0] for peer in born[slot]["peers"]} == {0, 1, 2, 3, 4} - {slot}
        assert born[slot]["listeners"] == {"0": 1, "1": 1}
        assert born[slot]["boot_id"] == born[0]["boot_id"]
        assert [name.split(":")[0] for name in born[slot]["stray"]] == ["socket"]
    for slot in (0, 1):
        assert {line["message"]["slot"] for line in rig.events("PeerJoined", slot)} >= {2, 3, 4}
        assert len(rig.events("Retire", slot)) == 1
    process.send_signal(signal.SIGTTOU)
    wait_until(lambda: retired(rig, 2), "two workers")
    process.send_signal(signal.SIGTTOU)
    wait_until(lambda: retired(rig, 1), "one worker")
    assert rig.events("born")[-1]["listeners"] == {"0": 1, "1": 3}  # the group does not shrink
    process.send_signal(signal.SIGTTOU)
    process.send_signal(signal.SIGTTIN)
    wait_until(lambda: retired(rig, 2), "two workers")
    assert descriptors(process) <= before + 1  # the group's third socket
    process.terminate()
    assert rig.end(process)[0] == 0
    rig.assert_nothing_left()


def test_steps_that_wait_become_one_change(rig: Rig) -> None:
    process = rig.start(behaviour={"2": "late"})
    process.send_signal(signal.SIGTTIN)
    wait_until(lambda: rig.events("born", 2), "a late one")
    for signum in (signal.SIGTTIN, signal.SIGTTIN, signal.SIGTTOU, signal.SIGTTIN):
        process.send_signal(signum)
        time.sleep(0.05)
    os.kill(rig.events("born", 2)[0]["pid"], signal.SIGKILL)
    wait_until(lambda: retired(rig, 5), "five workers")
    assert {line["workers"] for line in rig.events("born")} == {2, 3, 5}


def test_reload_changes_the_number_of_workers(rig: Rig) -> None:
    rig.start()
    rig.change(workers=3)
    assert rig.reload() == {"changes": ["workers: 2 -> 3"]}
    wait_until(lambda: retired(rig, 3), "three workers")


def test_retiring_workers_stay_as_long_as_they_are_busy(rig: Rig) -> None:
    process = rig.start(behaviour={"0": "busy"})
    process.send_signal(signal.SIGTTIN)
    wait_until(lambda: rig.states() == ["draining", "up", "up", "up"], "one that drains")
    rig.change(**tunnels(tunnel("web", rig.port), tunnel("ssh", free_port())))
    assert rig.reload() == {"changes": ["tunnel 'ssh': added"]}
    assert rig.events("Opened", 0) == [] and len(rig.events("Reconfigure", 0)) == 1
    process.terminate()
    assert rig.end(process)[0] == 0
    assert len(rig.events("Drain", 0)) == 1
    rig.assert_nothing_left()


def test_new_generation_that_does_not_come_up_is_given_up(rig: Rig) -> None:
    process = rig.start(behaviour={str(slot): "crash!" for slot in range(2, 5)})
    before = descriptors(process)
    rig.change(workers=3)
    rig.reload()
    wait_until(lambda: len(rig.events("born")) >= 2 + 5, "deaths")
    wait_until(lambda: retired(rig, 2), "the old ones alone")
    assert [line["slot"] for line in rig.events("Retire")] == []
    assert descriptors(process) == before
    assert rig.reload() == {"changes": ["workers: 2 -> 3"]}  # the file is still another
    process.terminate()
    _, stderr = rig.end(process)
    assert stderr.count("ERROR supervisor: the new generation of workers is given up") >= 1


def test_worker_killed_during_the_change_is_replaced(rig: Rig) -> None:
    process = rig.start(behaviour={"3": "late"})
    process.send_signal(signal.SIGTTIN)
    late = wait_until(lambda: rig.events("born", 3), "a late one")[0]
    assert rig.events("Retire") == []
    os.kill(late["pid"], signal.SIGKILL)
    wait_until(lambda: retired(rig, 3), "three workers")
    assert len(rig.events("born", 3)) == 2


def test_term_during_the_change_ends_everything(rig: Rig) -> None:
    process = rig.start(behaviour={"2": "late"})
    process.send_signal(signal.SIGTTIN)
    wait_until(lambda: rig.events("born", 2), "a late one")
    process.terminate()
    assert rig.end(process)[0] == 0
    rig.assert_nothing_left()
