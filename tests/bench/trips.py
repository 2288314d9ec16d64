"""Round trips of 64 bytes: idle, and while another connection through the same relay sends what it can."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.measure import BenchError, wait_listening
from tests.bench.ways import SERVICE_PORT, Between
from tests.netlab import Lab

LOAD_S = 1.0
"""How long the bulk transfer runs before round trips count."""
LOAD_BYTES = 1_000_000
"""A bulk transfer of less was none."""
_PATIENCE_S = 30.0
_ROOT = Path(__file__).parents[2]
_ENDS = (sys.executable, "-m", "tests.bench.ends")


@dataclass(frozen=True, slots=True)
class Trip:
    """Microseconds."""

    p50_us: float
    p99_us: float


class Trips(NamedTuple):
    """Alone, and while a bulk transfer ran."""

    idle: Trip
    loaded: Trip


def trips(lab: Lab, between: Between, *, idle_s: float, loaded_s: float) -> Trips:
    """Raises BenchError."""
    with _service(lab):
        idle = _ask(lab, between, idle_s)
        with _bulk(lab, between):
            return Trips(idle, _ask(lab, between, loaded_s))


@contextlib.contextmanager
def _service(lab: Lab) -> Iterator[None]:
    server = lab.popen("server", [*_ENDS, "serve", str(SERVICE_PORT)], cwd=_ROOT)
    try:
        wait_listening(lab, "server", SERVICE_PORT)
        yield
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def _bulk(lab: Lab, between: Between) -> Iterator[None]:
    with _talker(lab, between, ["send"]) as sender:
        time.sleep(LOAD_S)
        yield
        if sender.poll() is not None:
            raise BenchError(f"the bulk transfer ended: {sender.communicate()[1]}")
        sender.terminate()
        sent = json.loads(_result(sender))["bytes"]
        if sent < LOAD_BYTES:
            raise BenchError(f"the bulk transfer moved {sent} bytes")


def _ask(lab: Lab, between: Between, seconds: float) -> Trip:
    with _talker(lab, between, ["ask", str(seconds)]) as asker:
        return Trip(**json.loads(_result(asker, seconds)))


@contextlib.contextmanager
def _talker(lab: Lab, between: Between, what: list[str]) -> Iterator[subprocess.Popen[Any]]:
    """A process at the client with a connection."""
    verb, *rest = what
    host, port = between.target
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    talker = lab.popen("client", [*_ENDS, verb, host, str(port), *rest], cwd=_ROOT, text=True, **pipes)
    try:
        _connect(talker)
        _tell(talker, "go")
        yield talker
    finally:
        talker.kill()
        talker.communicate()


def _connect(talker: subprocess.Popen[Any]) -> None:
    _tell(talker, "connect")
    assert talker.stdout is not None
    if talker.stdout.readline() != "connected\n":
        raise BenchError(f"no connection: {talker.communicate()[1]}")


def _tell(talker: subprocess.Popen[Any], word: str) -> None:
    assert talker.stdin is not None
    try:
        talker.stdin.write(f"{word}\n")
        talker.stdin.flush()
    except OSError as error:
        raise BenchError(f"no connection: {error}") from error


def _result(talker: subprocess.Popen[Any], seconds: float = 0.0) -> str:
    try:
        output, errors = talker.communicate(timeout=seconds + _PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"no answer within {error.timeout:g} s") from error
    if talker.returncode:
        raise BenchError(errors.strip().rpartition("\n")[2])
    return str(output)
