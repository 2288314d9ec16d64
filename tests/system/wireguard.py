"""wireguard-go across a spray tunnel: an IP network between a lab's ends, with its packets in the tunnel's datagrams.

with SprayPair(lab) as pair, Wireguard(lab, LOCAL, TARGET[1]):
    ...                                             # client 10.77.0.1, server 10.77.0.2
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from tests.netlab import Lab

PROGRAMS = ("wireguard-go", "wg")
ADDRESSES = {"client": "10.77.0.1", "server": "10.77.0.2"}
MTU = 1300
START_S = 10.0


def is_missing() -> bool:
    """Whether it cannot be had here: it needs TUN devices, which only root may make."""
    return any(shutil.which(program) is None for program in PROGRAMS) or os.geteuid() != 0


class Wireguard:
    """Both ends of it, while the block lasts: the client's sends to `local`, the server's listens at `port`."""

    def __init__(self, lab: Lab, local: tuple[str, int], port: int) -> None:
        self.lab = lab
        self._local, self._port = local, port
        self._running: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Self:
        keys = {end: self._run(end, "wg", "genkey").strip() for end in ADDRESSES}
        public = {end: self.lab.run(end, ["wg", "pubkey"], input=key).stdout.strip() for end, key in keys.items()}
        ways = {
            "client": ["endpoint", f"{self._local[0]}:{self._local[1]}", "persistent-keepalive", "5"],
            "server": [],
        }
        try:
            for end, other in (("server", "client"), ("client", "server")):
                device = self._start(end)
                # Names are of the machine, not of the namespace: two labs at a time must not meet.
                with tempfile.NamedTemporaryFile("w") as file:
                    file.write(keys[end])
                    file.flush()
                    own = ["private-key", file.name, *(["listen-port", str(self._port)] if end == "server" else [])]
                    peer = ["peer", public[other], "allowed-ips", f"{ADDRESSES[other]}/32", *ways[end]]
                    self._run(end, "wg", "set", device, *own, *peer)
                self._run(end, "ip", "addr", "add", f"{ADDRESSES[end]}/24", "dev", device)
                self._run(end, "ip", "link", "set", device, "mtu", str(MTU), "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, end: str) -> str:
        device = f"wg{end[0]}{os.getpid()}"
        environment = os.environ | {"WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1"}
        process = self.lab.popen(
            end, ["wireguard-go", "-f", device], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._running.append(process)
        deadline = time.monotonic() + START_S
        while not Path(f"/var/run/wireguard/{device}.sock").exists():
            assert process.poll() is None, "wireguard-go has ended"
            assert time.monotonic() < deadline, "wireguard-go does not start"
            time.sleep(0.05)
        return device

    def _run(self, end: str, *words: str) -> str:
        output: str = self.lab.run(end, words).stdout
        return output

    def __exit__(self, *exception: object) -> None:
        for process in self._running:
            process.terminate()
            process.wait()
