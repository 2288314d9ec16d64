"""The configurations for supervisord under a real one, with both ends in one namespace: what an operator types, and a
kill."""

import configparser
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forwarder.supervisor import Timing
from tests.netlab import Lab
from tests.system.payload import pieces, receive
from tests.system.processes import is_alive
from tests.system.test_exit_codes import write_client, write_server
from workers.settings import Settings

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "deploy" / "supervisor"
CLIENT, SERVER = "forwarder-client", "forwarder-server"
RECOVERED_S = 3.0
TRANSFER_BYTES = 24 << 20
SUPERVISORD = """\
[unix_http_server]
file={folder}/supervisor.sock
[supervisord]
nodaemon=true
user=root
logfile={folder}/supervisord.log
pidfile={folder}/supervisord.pid
childlogdir={folder}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{folder}/supervisor.sock
[include]
files={folder}/conf.d/*.conf
"""


class Supervised:
    """A supervisord with both programs, and what an operator types."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "supervisord.conf"
        (folder / "supervisord.log").touch()
        self._file.write_text(SUPERVISORD.format(folder=folder))
        (folder / "conf.d").mkdir()
        places = {
            "/usr/bin/forwarder": f"{sys.executable} -m forwarder",
            "/etc/forwarder": str(folder),
            "/var/log/supervisor": str(folder),
            "directory=/\n": f"directory={ROOT}\n",
            "startsecs=2": "startsecs=1",
        }
        for example in EXAMPLES.glob("*.conf"):
            text = example.read_text()
            for installed, here in places.items():
                text = text.replace(installed, here)
            (folder / "conf.d" / example.name).write_text(text)
        self.process = lab.popen(
            "client", ["supervisord", "-c", str(self._file)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    def control(self, *words: str) -> str:
        command = ["supervisorctl", "-c", str(self._file), *words]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60).stdout

    def successes(self, name: str) -> int:
        """How often it entered the state RUNNING."""
        return (self.folder / "supervisord.log").read_text().count(f"success: {name} entered RUNNING")

    def pid(self, name: str) -> int:
        return int(self.control("pid", name))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait(self, condition: Callable[[], bool], timeout_s: float = 15.0) -> float:
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < timeout_s, self.control("status") + self.log(CLIENT) + self.log(SERVER)
            time.sleep(0.05)
        return time.monotonic() - started


@pytest.fixture
def supervised(lab: Lab, tmp_path: Path) -> Iterator[Supervised]:
    if shutil.which("supervisord") is None:
        pytest.skip("there is no supervisord")
    client = write_client(tmp_path, 8080)
    port = re.search(r"host_port = (\d+)", client.read_text())
    assert port is not None
    server = write_server(tmp_path, int(port[1]), '[[client]]\nkey_id = "laptop"\nkey_file = "laptop.key"')
    server.write_text(server.read_text().replace("remote_port = 80", "remote_port = 8000"))
    made = Supervised(lab, tmp_path)
    yield made
    made.process.terminate()
    made.process.wait(20)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_operator_starts_reloads_restarts_kills_and_stops(lab: Lab, supervised: Supervised) -> None:
    supervised.wait(lambda: bool(supervised.successes(CLIENT) and supervised.successes(SERVER)))
    with lab.listen("client", "127.0.0.1", 8000) as target:
        target.settimeout(20)
        _restart_during_a_transfer(lab, supervised, target)
        _kill_and_recover(supervised)
        lab.connect("client", "127.0.0.1", 8080, timeout=20).close()
    supervised.control("signal", "HUP", "all")
    workers = children(supervised.pid(CLIENT)) + children(supervised.pid(SERVER))
    assert supervised.control("stop", "all").count(": stopped") == 2
    assert supervised.control("status").count("STOPPED") == 2
    assert not [pid for pid in workers if is_alive(pid)]
    assert not list(supervised.folder.glob("*er.sock"))


def _restart_during_a_transfer(lab: Lab, supervised: Supervised, target: socket.socket) -> None:
    """HUP changes nothing; a restart waits for the last byte."""
    pid, received = supervised.pid(CLIENT), []
    with lab.connect("client", "127.0.0.1", 8080, timeout=20) as application:
        served, _ = target.accept()
        reading = threading.Thread(target=lambda: received.append(receive(application)))
        reading.start()
        assert "signalled" in supervised.control("signal", "HUP", CLIENT)
        restart = threading.Thread(target=supervised.control, args=("restart", CLIENT))
        with served:
            sent = _send_slowly(served, restart.start)
        reading.join()
        application.close()
        restart.join()
    assert received == [sent]
    assert supervised.successes(CLIENT) == 2 and supervised.pid(CLIENT) != pid


def _send_slowly(served: socket.socket, at_a_quarter: Callable[[], None]) -> str:
    """As `send`, in about 2 s."""
    digest, sent = hashlib.sha256(), 0
    for piece in pieces(1, TRANSFER_BYTES):
        if sent == TRANSFER_BYTES // 4:
            at_a_quarter()
        served.sendall(piece)
        digest.update(piece)
        sent += len(piece)
        time.sleep(0.02)
    return f"{sent} {digest.hexdigest()}"


def _kill_and_recover(supervised: Supervised) -> None:
    """No orphan, and neither the control socket nor a port of the killed one is in the way."""
    pid = supervised.pid(SERVER)
    workers, starts = children(pid), supervised.log(SERVER).count("forwarder is ready")
    os.kill(pid, signal.SIGKILL)
    supervised.wait(lambda: supervised.log(SERVER).count("forwarder is ready") > starts, RECOVERED_S)
    assert not [worker for worker in workers if is_alive(worker)]
    supervised.wait(lambda: supervised.successes(SERVER) == 2)
    assert supervised.log(SERVER).count("forwarder starts") == starts + 1


def test_stop_is_patient_for_longer_than_a_drain() -> None:
    drain_s = Settings(role="client", workers=1, keys=()).drain_timeout_s
    for example in EXAMPLES.glob("*.conf"):
        program = configparser.ConfigParser(inline_comment_prefixes=(" ;",), interpolation=None)
        program.read(example)
        settings = program[f"program:{example.stem}"]
        assert float(settings["stopwaitsecs"]) > drain_s + Timing().drain_margin_s + Timing().quit_grace_s
        assert (settings["stopsignal"], settings["stopasgroup"], settings["killasgroup"]) == ("TERM", "false", "true")
