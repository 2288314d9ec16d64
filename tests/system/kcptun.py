"""Debian's kcptun across a spray tunnel: an application's TCP goes over KCP, in the tunnel's datagrams, to a service.

with SprayPair(lab) as pair, Kcptun(lab, LOCAL, TARGET) as kcptun, kcptun.opened() as (application, service):
    ...
"""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any, Self

from tests.netlab import Lab

PROGRAMS = ("kcptun-client", "kcptun-server")
ENTRANCE = ("127.0.0.1", 12948)
SERVICE = ("127.0.0.1", 8000)
OPTIONS = ["--crypt=none", "--datashard=0", "--parityshard=0", "--nocomp", "--quiet", "--mode=fast"]
OPTIONS += ["--mtu=1350"]
"""Neither encrypted nor made redundant: the tunnel does the one, and KCP itself repeats what is lost."""
OPENING_S = 10.0
OPERATION_S = 30.0


def is_missing() -> bool:
    """Whether there is no kcptun on this system."""
    return any(shutil.which(program) is None for program in PROGRAMS)


class Kcptun:
    """Both ends of it, while the block lasts: the client's sends to `local`, the server's listens at `target`.

    window: packets that may be on their way."""

    def __init__(self, lab: Lab, local: tuple[str, int], target: tuple[str, int], *, window: int = 1024) -> None:
        self.lab = lab
        self._windows = [f"--sndwnd={window}", f"--rcvwnd={window}"]
        self._arguments = {
            "server": [PROGRAMS[1], f"--listen={target[0]}:{target[1]}", f"--target={SERVICE[0]}:{SERVICE[1]}"],
            "client": [PROGRAMS[0], f"--localaddr={ENTRANCE[0]}:{ENTRANCE[1]}", f"--remoteaddr={local[0]}:{local[1]}"],
        }
        self._running: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Self:
        for end, words in self._arguments.items():
            self._running.append(
                self.lab.popen(
                    end, [*words, *OPTIONS, *self._windows], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._running:
            process.kill()
            process.wait()

    @property
    def pids(self) -> list[int]:
        """Of both ends."""
        return [process.pid for process in self._running]

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """The application's end and the service's end of a connection."""
        with self.lab.listen("server", *SERVICE) as listener:
            listener.settimeout(OPENING_S)
            with self._connect() as application:
                # The stream is there for the far end once it carries something.
                application.sendall(b"!")
                service, _ = listener.accept()
                with service:
                    service.settimeout(OPERATION_S)
                    assert service.recv(1) == b"!"
                    yield application, service

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + OPENING_S
        while True:
            try:
                return self.lab.connect("client", *ENTRANCE, timeout=OPERATION_S)
            except ConnectionRefusedError:
                assert all(process.poll() is None for process in self._running), "kcptun has ended"
                assert time.monotonic() < deadline, "kcptun does not listen"
                time.sleep(0.05)
