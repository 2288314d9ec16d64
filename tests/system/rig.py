"""An instance with fake workers (tests/system/supervised.py), and what to ask of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from forwarder.control import ControlError, request
from forwarder.timing import Timing
from tests.free_ports import free_port
from tests.system.supervised import Plan
from workers.settings import Address, Key, Settings, StripeClientTunnel

ROOT = Path(__file__).parents[2]
PATIENCE_S = 10.0
# A quarter of the real pace, which is still slow beside a turn of a fake.
FAST = Timing(
    tick_s=0.25,
    start_ticks=12,
    young_s=1.0,
    backoff_first_s=0.05,
    backoff_max_s=0.2,
    drain_margin_s=0.5,
    quit_grace_s=0.3,
    status_s=0.4,
)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False


def wait_until(true: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if result := true():
            return result
        time.sleep(0.01)
    raise AssertionError(f"not within {patience_s} s: {what}")


class Rig:
    """One instance in a directory of its own; everything it started is gone afterwards, or the test fails."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.socket = directory / "run" / "instance.sock"
        self.journal = directory / "journal"
        self.pid_file = directory / "pid"
        self.started: list[subprocess.Popen[str]] = []
        self.daemon_pid: int | None = None

    def start(
        self,
        *,
        workers: int = 2,
        behaviour: dict[str, str] | None = None,
        ready: bool = True,
        pid_file: bool = False,
        daemon: bool = False,
        environment: dict[str, str] | None = None,
        **changes: Any,
    ) -> subprocess.Popen[str]:
        local = Address("127.0.0.1", self.port)
        tunnel = StripeClientTunnel(name="web", index=0, local=local, remote_end=Address("server", 1))
        settings = Settings(
            role="client",
            workers=workers,
            keys=(Key("laptop", bytes(32)),),
            client_tunnels=(tunnel,),
            control_socket=str(self.socket),
            drain_timeout_s=1.0,
        )
        plan = Plan(
            settings=msgspec.structs.replace(settings, **changes),
            timing=FAST,
            behaviour=behaviour or {},
            journal=str(self.journal),
            pid_file=str(self.pid_file) if pid_file else None,
            daemon=daemon,
        )
        plan_file = self.directory / f"plan{len(self.started)}.json"
        plan_file.write_bytes(msgspec.json.encode(plan))
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.supervised", str(plan_file)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | (environment or {}),
        )
        self.started.append(process)
        if ready:
            wait_until(lambda: self.all_up(workers), "every worker up")
        return process

    def change(self, **changes: Any) -> None:
        """Rewrites the file of the instance that was started last."""
        plan_file = self.directory / f"plan{len(self.started) - 1}.json"
        plan = msgspec.json.decode(plan_file.read_bytes(), type=Plan)
        plan.settings = msgspec.structs.replace(plan.settings, **changes)
        fresh = plan_file.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(plan))
        fresh.rename(plan_file)

    def reload(self) -> dict[str, Any]:
        return request(self.socket, {"command": "reload"}, PATIENCE_S)

    def reload_later(self) -> Callable[[], dict[str, Any]]:
        """Asks for it, and returns what waits for the answer."""
        pool = ThreadPoolExecutor(1)
        answer = pool.submit(self.reload)
        pool.shutdown(wait=False)
        return answer.result

    def states(self) -> list[str]:
        try:
            return [worker["state"] for worker in self.status()["workers"]]
        except ControlError:
            return []

    def all_up(self, workers: int) -> bool:
        return self.states() == ["up"] * workers

    def status(self) -> dict[str, Any]:
        return request(self.socket, {"command": "status", "counts": True}, PATIENCE_S)

    def events(self, event: str, slot: int | None = None) -> list[dict[str, Any]]:
        written = self.journal.read_text().rpartition("\n")[0] if self.journal.exists() else ""
        lines = [json.loads(line) for line in written.splitlines()]
        return [line for line in lines if line["event"] == event and slot in (None, line["slot"])]

    def worker_pids(self) -> list[int]:
        return [line["pid"] for line in self.events("born")]

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Waits for the end; exit code and standard error."""
        _, stderr = process.communicate(timeout=PATIENCE_S)
        return process.returncode, stderr

    def assert_nothing_left(self) -> None:
        assert [pid for pid in self.worker_pids() if is_alive(pid)] == []
        assert not self.socket.exists()
        assert not self.pid_file.exists()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", self.port))

    def clear(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
        if self.daemon_pid is not None and is_alive(self.daemon_pid):
            os.kill(self.daemon_pid, signal.SIGKILL)
        left = [pid for pid in self.worker_pids() if is_alive(pid)]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.communicate()
