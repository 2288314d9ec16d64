"""Instances of forwarder from configuration texts of one's own: any number of them, in any namespace of a lab.

    with Lab(emulate=False) as lab, Instances(lab) as instances:
        server = instances.start("server", "server", f'role = "server" ... {instances.key("laptop")} ...')

An instance's control socket lies beside its file, which gets a [control] table of its own.
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
from pathlib import Path
from typing import Any, Self

from tests.netlab import Lab

READY_S = 15.0


class Instance:
    """A running instance; `name` is that of its files."""

    def __init__(self, lab: Lab, namespace: str, folder: Path, name: str, text: str) -> None:
        self._log = folder / f"{name}.log"
        self._socket = folder / f"{name}.sock"
        file = folder / f"{name}.toml"
        file.write_text(f'{text}\n[control]\nsocket = "{self._socket}"\n')
        with open(self._log, "wb") as log:
            self.process = lab.popen(
                namespace,
                [sys.executable, "-m", "forwarder", "start", "-c", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
            )

    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    def status(self) -> dict[str, Any]:
        """`status --json`."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(10)
            control.connect(str(self._socket))
            control.sendall(b'{"command":"status"}\n')
            with control.makefile("rb") as answers:
                status: dict[str, Any] = json.loads(answers.readline())
        return status

    def tunnel(self, name: str) -> dict[str, Any]:
        """That tunnel in the status."""
        tunnels: list[dict[str, Any]] = self.status()["tunnels"]
        return next(tunnel for tunnel in tunnels if tunnel["name"] == name)

    def carriers_up(self, tunnel: str) -> int:
        """Stripes of that tunnel, over all sessions."""
        return sum(session["carriers_up"] for session in self.tunnel(tunnel)["sessions"])

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = READY_S) -> None:
        """Until `condition` holds."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError, ValueError):
                if condition():
                    return
            assert self.process.poll() is None, f"exited with {self.process.returncode}: {self.log()}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s: {self.log()}"
            time.sleep(0.05)

    def wait_carriers(self, tunnel: str, count: int) -> None:
        """Until that tunnel has so many stripes."""
        self.wait(lambda: self.carriers_up(tunnel) >= count, f"{count} stripes of {tunnel}")


class Instances:
    """The instances of a test, their folder and their keys."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._folder = Path(tempfile.mkdtemp(prefix="forwarder-instances-"))
        self._running: list[Instance] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for instance in self._running:
            instance.process.send_signal(signal.SIGQUIT)
        for instance in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                instance.process.wait(5)
            instance.process.kill()
            instance.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def key(self, key_id: str) -> str:
        """The two lines that name a key, for [auth] and [[client]]; the key is made when it is first asked for."""
        file = self._folder / f"{key_id}.key"
        if not file.exists():
            file.write_bytes(base64.b64encode(os.urandom(32)))
            file.chmod(0o600)
        return f'key_id = "{key_id}"\nkey_file = "{file.name}"\n'

    def file(self, name: str) -> Path:
        """The configuration of the instance of that name."""
        return self._folder / f"{name}.toml"

    def start(self, namespace: str, name: str, text: str) -> Instance:
        """Start an instance and wait until it is ready."""
        instance = Instance(self._lab, namespace, self._folder, name, text)
        self._running.append(instance)
        instance.wait(lambda: "forwarder is ready" in instance.log(), "readiness")
        return instance
