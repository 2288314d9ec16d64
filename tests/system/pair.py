"""A real client and a real server of forwarder in a lab's namespaces, with an application's view of the tunnel.

    with Lab(emulate=False) as lab, Pair(lab, workers=(1, 2)) as pair:
        target = lab.listen("server", "127.0.0.1", pair.target_port)
        application = pair.connect()                 # a connection to the client's local port

Everything (configuration, key, logs, control sockets) lives in a folder of its own that goes with the block.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

from tests.netlab import Lab

ENDS = ("client", "server")
START_S = 15.0
KEY_ID = "laptop"


class Pair:
    """`workers` are the client's and the server's. `client` and `server` are more lines of TOML for the top of each
    file, `client_tunnel` and `server_tunnel` for the tunnel. `address` is the server's, as `host` names it.

    Before a start, `modules` and `environment` may name another program than `forwarder`, and what to tell it."""

    def __init__(
        self,
        lab: Lab,
        *,
        workers: tuple[int, int] = (1, 1),
        somaxconn: int | str = 10,
        congestion: str | None = "cubic",
        address: str | list[str] | None = None,
        host_port: int = 9000,
        local_port: int = 8080,
        target_port: int = 8000,
        client: str = "",
        server: str = "",
        client_tunnel: str = "",
        server_tunnel: str = "",
        start: bool = True,
    ) -> None:
        self.lab = lab
        self.workers = dict(zip(ENDS, workers, strict=True))
        self.somaxconn = somaxconn
        self.address = address or lab.server_ip4
        self.host_port, self.local_port, self.target_port = host_port, local_port, target_port
        self.folder = Path(tempfile.mkdtemp(prefix="forwarder-pair-"))
        self.processes: dict[str, subprocess.Popen[Any]] = {}
        self.modules = {end: ["forwarder"] for end in ENDS}
        self.environment: dict[str, dict[str, str]] = {end: {} for end in ENDS}
        self._start = start
        control = f'congestion = "{congestion}"\n' if congestion else ""
        (self.folder / "laptop.key").write_bytes(base64.b64encode(os.urandom(32)))
        (self.folder / "laptop.key").chmod(0o600)
        self._write(
            "client",
            client,
            f'[auth]\nkey_id = "{KEY_ID}"\nkey_file = "laptop.key"',
            (
                f"host = {json.dumps(self.address)}\nhost_port = {host_port}\nlocal_port = {local_port}\n"
                f"somaxconn = {json.dumps(somaxconn)}\n{control}{client_tunnel}"
            ),
        )
        self._write(
            "server",
            server,
            f'[[client]]\nkey_id = "{KEY_ID}"\nkey_file = "laptop.key"',
            (f"host_port = {host_port}\nremote_port = {target_port}\n{control}{server_tunnel}"),
        )

    def _write(self, end: str, top: str, keys: str, tunnel: str) -> None:
        self.config(end).write_text(
            f'role = "{end}"\nworkers = {self.workers[end]}\n{top}\n[control]\nsocket = "{self.folder}/{end}.sock"\n'
            f'{keys}\n[[tunnel]]\nname = "web"\nmode = "stripe"\n{tunnel}\n'
        )

    def __enter__(self) -> Self:
        if self._start:
            try:
                self.start("server")
                self.start("client")
                self.wait_carriers(1 if isinstance(self.somaxconn, str) else self.somaxconn)
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Processes

    def config(self, end: str) -> Path:
        return self.folder / f"{end}.toml"

    def log(self, end: str) -> str:
        """What that end has logged so far."""
        path = self.folder / f"{end}.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        """Both logs, for a failure."""
        return f"\n--- client\n{self.log('client')}\n--- server\n{self.log('server')}"

    def start(self, end: str, output: str | None = None) -> None:
        """Start that end, and wait until it is ready. output: where its standard error goes instead of the log."""
        with open(output or self.folder / f"{end}.log", "ab") as log:
            self.processes[end] = self.lab.popen(
                end,
                [sys.executable, "-m", *self.modules[end], "start", "-c", str(self.config(end))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
                env=os.environ | self.environment[end],
            )
        self.wait(lambda: self._is_ready(end), f"{end} is ready")

    def _is_ready(self, end: str) -> bool:
        status = self.status(end)
        return all(worker["state"] == "up" for worker in status["workers"])

    def stop(self, end: str, sig: int = signal.SIGTERM, timeout_s: float = 40.0) -> int:
        """Send a signal to that end's supervisor and wait for its exit code."""
        process = self.processes.pop(end)
        process.send_signal(sig)
        return process.wait(timeout_s)

    def close(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGQUIT)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
        self.processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Looking inside

    def status(self, end: str, *, counts: bool = False) -> dict[str, Any]:
        """`status --json` of that end, by its control socket; counts: and what its workers have open."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(10)
            control.connect(str(self.folder / f"{end}.sock"))
            control.sendall(json.dumps({"command": "status", "counts": counts}).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n") and (data := control.recv(1 << 20)):
                answer += data
        status: dict[str, Any] = json.loads(answer)
        return status

    def tunnel(self, end: str) -> dict[str, Any]:
        """That end's tunnel in the status."""
        tunnels: list[dict[str, Any]] = self.status(end)["tunnels"]
        return next(tunnel for tunnel in tunnels if tunnel["name"] == "web")

    def worker_pids(self, end: str) -> list[int]:
        """By slot."""
        return [worker["pid"] for worker in sorted(self.status(end)["workers"], key=lambda worker: worker["id"])]

    def carriers_up(self, end: str = "client") -> int:
        return sum(session["carriers_up"] for session in self.tunnel(end)["sessions"])

    def flows_open(self, end: str) -> int:
        return int(self.tunnel(end)["flows_open"])

    def open_counts(self, end: str) -> list[dict[str, int]]:
        """What each worker holds: level when nothing goes on."""
        counts: list[dict[str, int]] = self.status(end, counts=True)["open"]
        return counts

    def wait_carriers(self, count: int, timeout_s: float = START_S) -> None:
        for end in ENDS:
            self.wait(partial(self._has_carriers, end, count), f"{count} carriers at the {end}", timeout_s)

    def _has_carriers(self, end: str, count: int) -> bool:
        return self.carriers_up(end) >= count

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = START_S) -> None:
        """Until `condition` holds; a failure shows both logs."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError, ValueError):
                if condition():
                    return
            for end, process in self.processes.items():
                assert process.poll() is None, f"{end} exited with {process.returncode}: {self.log(end)}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s{self.logs()}"
            time.sleep(0.05)

    # The application's view

    def connect(self, timeout: float = 20.0) -> socket.socket:
        """A connection of an application to the client's local port."""
        return self.lab.connect("client", "127.0.0.1", self.local_port, timeout=timeout)

    def listen(self, backlog: int = 512) -> socket.socket:
        """The service behind the server, to be accepted from in this process."""
        listener = self.lab.listen("server", "127.0.0.1", self.target_port, backlog=backlog)
        listener.settimeout(20.0)
        return listener
