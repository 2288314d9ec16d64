"""Connections of strangers, as many a second as asked for: run in a lab's namespace.

    python -m tests.system.flood ADDRESS PORT SOURCE PER_SECOND SECONDS HOLD_S all|drip < message

Each connection sends `message` once it is established (or a byte of it a second), and is reset HOLD_S later. Prints one
line of JSON: a `Count`.
"""

import contextlib
import json
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.netlab import Lab

WAIT_S = 0.005
MOST_A_TURN = 256
_RESET_ON_CLOSE = struct.pack("=ii", 1, 0)
_BIND_ADDRESS_NO_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)


@dataclass(slots=True)
class Count:
    """What became of the connections: `begun`, then `established`, then `reset` by the other end or `answered` by it
    while they were held."""

    begun: int = 0
    established: int = 0
    answered: int = 0
    reset: int = 0
    most_held: int = 0
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return self.established / self.seconds


class Flood:
    def __init__(self, target: tuple[str, int], source: str, message: bytes, hold_s: float, drip: bool) -> None:
        self.count = Count()
        self._target, self._source, self._message, self._hold_s = target, source, message, hold_s
        self._drip = drip
        self._dripped_s = 0.0
        self._connecting: dict[int, socket.socket] = {}
        self._poll = select.epoll()
        self._held: deque[tuple[float, socket.socket]] = deque()

    def run(self, per_second: float, seconds: float) -> None:
        """It catches up where it has fallen behind, MOST_A_TURN at a time."""
        began_s = now_s = time.monotonic()
        while now_s < began_s + seconds:
            due = int((now_s - began_s) * per_second) - self.count.begun
            for _ in range(min(due, MOST_A_TURN)):
                self._connect()
            self._send(now_s)
            if self._drip and now_s - self._dripped_s >= 1:
                self._dripped_s = now_s
                self._send_drips(now_s)
            self._close(now_s)
            now_s = time.monotonic()
        self.count.seconds = now_s - began_s
        self._close(float("inf"))
        for sock in self._connecting.values():
            sock.close()

    def _connect(self) -> None:
        self.count.begun += 1
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
            sock.bind((self._source, 0))
            sock.connect(self._target)
        except BlockingIOError:
            self._connecting[sock.fileno()] = sock
            self._poll.register(sock.fileno(), select.EPOLLOUT | select.EPOLLET)
        except OSError:
            sock.close()

    def _send(self, now_s: float) -> None:
        """To those that are established by now."""
        for fd, _ in self._poll.poll(WAIT_S, MOST_A_TURN):
            sock = self._connecting.pop(fd, None)
            if sock is None:
                continue  # it is held, and was reset
            try:
                if not self._drip:
                    sock.send(self._message)
                self.count.established += not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            except OSError:
                sock.close()
                continue
            self._held.append((now_s, sock))
            self.count.most_held = max(self.count.most_held, len(self._held))

    def _send_drips(self, now_s: float) -> None:
        for since_s, sock in self._held:
            place = int(now_s - since_s)
            with contextlib.suppress(OSError):
                sock.send(self._message[place : place + 1])

    def _close(self, now_s: float) -> None:
        held = self._held
        while held and now_s - held[0][0] >= self._hold_s:
            sock = held.popleft()[1]
            try:
                self.count.answered += bool(sock.recv(1))
            except BlockingIOError:
                pass
            except OSError:
                self.count.reset += 1
            sock.close()


@contextlib.contextmanager
def flooding(
    lab: Lab, port: int, per_second: float, seconds: float, *, message: bytes, hold_s: float = 0.5, drip: bool = False
) -> Any:
    """A flood from the client's second address while the block lasts, and at least `seconds`. Yields a list that has
    its Count afterwards."""
    words = [lab.server_ip4, port, lab.client_ip4s[1], per_second, seconds, hold_s, "drip" if drip else "all"]
    argv = [sys.executable, "-m", "tests.system.flood", *map(str, words)]
    process = lab.popen("client", argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    process.stdin.write(message)
    process.stdin.close()
    counts: list[Count] = []
    try:
        yield counts
        counts.append(Count(**json.loads(process.stdout.read())))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    address, port, source, per_second, seconds, hold_s, how = sys.argv[1:]
    message = sys.stdin.buffer.read()
    flood = Flood((address, int(port)), source, message, float(hold_s), how == "drip")
    flood.run(float(per_second), float(seconds))
    print(json.dumps(asdict(flood.count)))


if __name__ == "__main__":
    main()
