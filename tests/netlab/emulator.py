"""The maker's side of the emulator: commands, and what it reports."""

import json
import socket
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.netlab.errors import LabError, RunVoid

_ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Way:
    """Counters of one direction. `dropped` is by cause: lost, queue, connection_queue, policed, blackholed, reset,
    oversize (above the MTU)."""

    packets_in: int
    bytes_in: int
    packets_out: int
    bytes_out: int
    reordered: int
    duplicated: int
    corrupted: int
    refused: int
    overrun: int
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class Report:
    """Since the start or the last `clear_report`; `lost_by_kernel`, `cpu_s` and `connections` since the start.

    Lateness is how long after its due time each packet was released. `refused`, `overrun` and `lost_by_kernel` are
    packets that went missing without a decision of the emulator.
    """

    up: Way
    down: Way
    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float
    late_over_2_ms: int
    connections: int
    waiting: int
    cpu_s: float
    lost_by_kernel: int

    def check(self, p99_ms: float, max_ms: float | None) -> None:
        """Raise RunVoid if packets were late beyond these bounds or went missing by accident."""
        if self.late_p99_ms > p99_ms:
            raise RunVoid(f"the emulator was late: p99 {self.late_p99_ms} ms, bound {p99_ms} ms")
        if max_ms is not None and self.late_max_ms > max_ms:
            raise RunVoid(f"the emulator was late: at most {self.late_max_ms} ms, bound {max_ms} ms")
        accidents = self.lost_by_kernel + sum(way.refused + way.overrun for way in (self.up, self.down))
        if accidents:
            raise RunVoid(f"{accidents} packets were lost by accident: {self}")


@dataclass(frozen=True, slots=True)
class LiveConnection:
    """A TCP or UDP 4-tuple, as the emulator saw it. Pairs are (up, down); bytes are of frames, before any drop."""

    index: int
    protocol: str
    client: tuple[str, int]
    server: tuple[str, int]
    packets: tuple[int, int]
    bytes: tuple[int, int]
    dropped: tuple[int, int]
    blackholed: bool
    closed: bool


class Emulator:
    """A running emulator. Commands may come from several threads."""

    def __init__(self, program: str, user: int, network: int, mtu: int) -> None:
        ours, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._control = ours
        ours.settimeout(_ANSWER_TIMEOUT_S)
        descriptors = [theirs.fileno(), network, *([user] if user >= 0 else [])]
        arguments = [user, network, theirs.fileno(), mtu, "to-client", "to-server"]
        with theirs:
            self.process = subprocess.Popen(
                ["netlab-link", "run", *map(str, arguments)],
                executable=program,
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._answers = ours.makefile("rb")

    def command(self, line: str) -> Any:
        with self._lock:
            try:
                self._control.sendall(line.encode() + b"\n")
                answer = self._answers.readline()
            except OSError as error:
                raise LabError(f"the emulator does not answer: {error}") from error
        if not answer:
            assert self.process.stderr is not None
            raise LabError(f"the emulator ended: {self.process.stderr.read().decode().strip()}")
        content = json.loads(answer)
        if "error" in content:
            raise LabError(f"emulator: {content['error']}: {line}")
        return content

    def commands(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.command(line)

    def report(self, lost_by_kernel: int) -> Report:
        content = self.command("report")
        up, down = (Way(**way) for way in content.pop("ways"))
        return Report(up=up, down=down, lost_by_kernel=lost_by_kernel, **content)

    def connections(self, which: str) -> list[LiveConnection]:
        pairs = ("client", "server", "packets", "bytes", "dropped")
        entries: list[dict[str, Any]] = self.command(f"list {which}")["connections"]
        return [LiveConnection(**(entry | {name: tuple(entry[name]) for name in pairs})) for entry in entries]

    def close(self) -> None:
        self._answers.close()
        self._control.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
