"""One measurement: payload per second between two iperf3, and what it costs."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.netlab import Lab

WARM_UP_S = 1
BUSY_CORES = 0.3
"""Where other programs use more than that, figures tell of the machine's load."""
_SAMPLE_S = 0.5
_START_S = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A measurement that did not come about."""


@dataclass(frozen=True, slots=True)
class Flow:
    """`bits_per_s` is payload as the receiver counts it. `cpu_s_per_gb` (1e9 bytes) and `memory_bytes` (the most seen)
    are of the relays' processes; 0 without a relay. `others_cores`: what programs that are not ours used meanwhile.
    `stripes`: how many there were at the end."""

    bits_per_s: float
    cpu_s_per_gb: float
    memory_bytes: int
    others_cores: float
    stripes: int = 0


def flow(
    lab: Lab,
    target: tuple[str, int],
    listen_port: int,
    *,
    seconds: int,
    warm_up_s: int = WARM_UP_S,
    connections: int = 1,
    congestion: str | None = None,
    relays: Iterable[int] = (),
) -> Flow:
    """iperf3 at the client sends to `target`, through which iperf3 listens on `listen_port` at the server.

    `relays` are the processes to blame for what lies between; their children count. Raises BenchError.
    """
    length_s = warm_up_s + seconds + 1  # the last second is cut short
    server = lab.popen(
        "server",
        ["iperf3", "--server", "--one-off", "--json", "--interval", "1", "--port", str(listen_port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_listening(lab, "server", listen_port)
        command = ["iperf3", "--json", "--client", target[0], "--port", str(target[1]), "--time", str(length_s)]
        command += ["--parallel", str(connections), *(["--congestion", congestion] if congestion else [])]
        meter, others = Meter(list(relays)), Others()
        with meter.running():
            done = lab.run("client", command, timeout=length_s + 60, check=False)
        if done.returncode:
            raise BenchError(f"iperf3 to {target}: {_error(done.stdout) or done.stderr}")
        report = json.loads(server.communicate(timeout=_START_S)[0])
        others_cores = others.cores()
    except subprocess.TimeoutExpired as error:
        raise BenchError(str(error)) from error
    finally:
        server.kill()
        server.communicate()
    rate, total = _received(report, warm_up_s, seconds)
    return Flow(rate, meter.cpu_s / (total / 1e9), meter.memory_bytes, others_cores)


def _received(report: dict[str, Any], warm_up_s: int, seconds: int) -> tuple[float, int]:
    """Bits per second in the steady state, and all bytes, of what iperf3's server reports."""
    if "error" in report:
        raise BenchError(f"iperf3 at the server: {report['error']}")
    sums = [interval["sum"] for interval in report["intervals"]]
    steady = sums[warm_up_s : warm_up_s + seconds]
    if len(steady) < seconds:
        raise BenchError(f"iperf3 was there for {len(sums)} s, not {warm_up_s + seconds} s")
    rate = 8 * sum(each["bytes"] for each in steady) / sum(each["seconds"] for each in steady)
    return rate, sum(each["bytes"] for each in sums)


def _error(output: str) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        return str(json.loads(output).get("error", ""))
    return output


def wait_listening(lab: Lab, namespace: str, port: int) -> None:
    """Until some process listens on the port, without connecting to it. Raises BenchError."""
    deadline = time.monotonic() + _START_S
    while not lab.run(namespace, ["ss", "-Hltn", f"sport = :{port}"]).stdout.strip():
        if time.monotonic() > deadline:
            raise BenchError(f"nobody listens on port {port}")
        time.sleep(0.02)


class Meter:
    """CPU time and memory of processes and all their descendants."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self.cpu_s = 0.0
        self.memory_bytes = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Meter until the end of the block."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_SAMPLE_S):
                self.memory_bytes = max(self.memory_bytes, sum(map(memory_bytes, family(self._pids))))

        before = sum(map(cpu_s, family(self._pids)))
        thread = threading.Thread(target=watch)
        if self._pids:
            thread.start()
        try:
            yield
        finally:
            self.cpu_s = sum(map(cpu_s, family(self._pids))) - before
            over.set()
            if self._pids:
                thread.join()


class Others:
    """The rest of the machine: what it does not leave to this process and its descendants. From now on."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._busy_s = self._read()

    def cores(self) -> float:
        """On average so far. Interrupts (softirq) are taken for ours."""
        return (self._read() - self._busy_s) / (time.monotonic() - self._since)

    @staticmethod
    def _read() -> float:
        user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        return (user + nice + system + steal) / _TICKS - sum(map(cpu_s, family([os.getpid()])))


def family(pids: Iterable[int]) -> list[int]:
    """The processes and their living descendants."""
    found = list(pids)
    for pid in found:
        with contextlib.suppress(OSError):
            found.extend(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return found


def cpu_s(pid: int) -> float:
    """User and system time, that of children who have ended included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS


def memory_bytes(pid: int) -> int:
    """What the process holds, shared pages by share (PSS)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


def programs_missing(*names: str) -> list[str]:
    """Those that are not installed."""
    return [name for name in names if shutil.which(name) is None]
