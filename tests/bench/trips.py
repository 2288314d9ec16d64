"""Round trips of 64 bytes: idle, and while another connection through the same relay sends what it can; where the
stream's own worker has the stripe, and where frames cross to another worker.

Nothing from outside says which worker an application gets: a connection is made again until the client's status says
that it is where it was wanted.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tests.bench.measure import BenchError, wait_listening
from tests.bench.ways import SERVICE_PORT, Between
from tests.netlab import Lab
from tests.system.pair import Pair

LOAD_S = 1.0
"""How long the bulk transfer runs before round trips count."""
LOAD_BYTES = 1_000_000
"""A bulk transfer of less was none."""
_TRIES = 200
_SETTLE_S = 3.0
_PATIENCE_S = 30.0
_ROOT = Path(__file__).parents[2]
_ENDS = (sys.executable, "-m", "tests.bench.ends")


class Place(Enum):
    """Where the client's end of a stream is: where a stripe is, or at a worker that has none."""

    OWN = "own"
    MESH = "mesh"


@dataclass(frozen=True, slots=True)
class Trip:
    """Microseconds."""

    p50_us: float
    p99_us: float


Trips = dict[tuple[Place, bool], Trip]
"""By place, and whether a bulk transfer ran."""


def trips(lab: Lab, between: Between, places: Sequence[Place], *, idle_s: float, loaded_s: float) -> Trips:
    """At each of these places; a single one is taken for granted. Raises BenchError."""
    found: Trips = {}
    with _service(lab):
        for place in places:
            wanted, own = (place, Place.OWN) if len(places) > 1 else (None, None)
            found[place, False] = _ask(lab, between, idle_s, wanted, 0)
            with _bulk(lab, between, own):
                found[place, True] = _ask(lab, between, loaded_s, wanted, 1)
    return found


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
def _bulk(lab: Lab, between: Between, place: Place | None) -> Iterator[None]:
    with _talker(lab, between, ["send"], place, 0) as sender:
        time.sleep(LOAD_S)
        yield
        if sender.poll() is not None:
            raise BenchError(f"the bulk transfer ended: {sender.communicate()[1]}")
        sender.terminate()
        sent = json.loads(_result(sender))["bytes"]
        if sent < LOAD_BYTES:
            raise BenchError(f"the bulk transfer moved {sent} bytes")


def _ask(lab: Lab, between: Between, seconds: float, place: Place | None, others: int) -> Trip:
    with _talker(lab, between, ["ask", str(seconds)], place, others) as asker:
        return Trip(**json.loads(_result(asker, seconds)))


@contextlib.contextmanager
def _talker(
    lab: Lab, between: Between, what: list[str], place: Place | None, others: int
) -> Iterator[subprocess.Popen[Any]]:
    """A process at the client with a connection that is where it was wanted, while `others` are open."""
    verb, *rest = what
    host, port = between.target
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    talker = lab.popen("client", [*_ENDS, verb, host, str(port), *rest], cwd=_ROOT, text=True, **pipes)
    try:
        if place is not None and between.pair is not None:
            _settle(talker, between.pair, place, others)
        else:
            _connect(talker)
        _tell(talker, "go")
        yield talker
    finally:
        talker.kill()
        talker.communicate()


def _settle(talker: subprocess.Popen[Any], pair: Pair, place: Place, others: int) -> None:
    for _ in range(_TRIES):
        before = _status(pair, others)
        _connect(talker)
        if landed(before, _status(pair, others + 1)) is place:
            return
        _tell(talker, "close")
    raise BenchError(f"none of {_TRIES} connections came to a worker of the kind '{place.value}'")


def landed(before: dict[str, Any], after: dict[str, Any]) -> Place:
    """Where the stream is that has come between these two of the client's status."""
    counts = _streams(before)
    worker = next(worker for worker, count in _streams(after).items() if count > counts[worker])
    return Place.OWN if worker in _with_stripe(after) else Place.MESH


def _status(pair: Pair, streams: int) -> dict[str, Any]:
    """The client's, when it says that there are so many streams. Raises BenchError."""
    deadline = time.monotonic() + _SETTLE_S
    while sum(_streams(status := pair.status("client")).values()) != streams:
        if time.monotonic() > deadline:
            raise BenchError(f"the client's status says {_streams(status)} streams, not {streams}")
        time.sleep(0.005)
    return status


def _streams(status: dict[str, Any]) -> dict[int, int]:
    return {worker["id"]: worker["streams"] for worker in status["workers"]}


def _with_stripe(status: dict[str, Any]) -> set[int]:
    sessions = (session for tunnel in status["tunnels"] for session in tunnel["sessions"])
    return {carrier["worker"] for session in sessions for carrier in session["carriers"]}


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
