"""Short connections of every kind, and the ends of long ones: all complete, none stalls, nothing is left open."""

import contextlib
import hashlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.netlab import Lab, Link
from tests.system.pair import ENDS, Pair
from tests.system.payload import receive, send, together

CONNECTIONS, AT_ONCE = 200, 50
STALL_S = 5.0
"""A connection takes 0.1 to 0.5 s here, and a moment more on a busy machine; none may need a timeout to go on."""
IDLE_S = 1.0
OPERATION_S = 20.0
NUMBER = struct.Struct("!I")
GREETING = b"220 ready\r\n"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
SLOW_BYTES = 64 << 20
"""More than all the kernel's buffers on the way hold."""
PAUSE_S = 1.0
WINDOW_BYTES = 1 << 20

Application = Callable[[socket.socket, int], None]
Service = Callable[[socket.socket], None]


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=["1x1", "2x2"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    window = f'window_max = "{WINDOW_BYTES >> 20}MiB"\n'
    with (
        Lab(Link(delay_ms=10)) as lab,
        Pair(lab, workers=request.param, client_tunnel=window, server_tunnel=window) as pair,
    ):
        yield pair


@pytest.fixture(autouse=True)
def level(pair: Pair) -> Iterator[None]:
    """What is open before a test is open after it, and no more."""

    def count() -> list[Any]:
        return [(pair.flows_open(end), pair.open_counts(end)) for end in ENDS]

    time.sleep(0.15)  # for a moment after many handshakes a server accepts none
    before = count()
    yield
    pair.wait(lambda: count() == before, f"return to {before}", 5.0)


def read_exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = connection.recv(min(count - len(data), 1 << 20))
        assert more, f"end after {len(data)} of {count} bytes"
        data += more
    return bytes(data)


def read_all(connection: socket.socket) -> bytes:
    data = bytearray()
    while more := connection.recv(1 << 20):
        data += more
    return bytes(data)


# The service speaks first.


def answer_greeting(application: socket.socket, number: int) -> None:
    assert read_exactly(application, len(GREETING)) == GREETING
    application.sendall(NUMBER.pack(number))
    assert read_all(application) == NUMBER.pack(number)


def greet(service: socket.socket) -> None:
    service.sendall(GREETING)
    service.sendall(read_exactly(service, NUMBER.size))


# The application ends its direction, then reads.


def ask(application: socket.socket, number: int) -> None:
    question = NUMBER.pack(number) * (number * 50)
    application.sendall(question)
    application.shutdown(socket.SHUT_WR)
    assert read_all(application) == hashlib.sha256(question).digest()


def answer(service: socket.socket) -> None:
    service.sendall(hashlib.sha256(read_all(service)).digest())


# The service closes at once.


def read_end(application: socket.socket, _number: int) -> None:
    assert application.recv(1) == b""


def close_at_once(_service: socket.socket) -> None:
    pass


# Both are idle for a while.


def wait_and_ask(application: socket.socket, number: int) -> None:
    time.sleep(IDLE_S)
    application.sendall(NUMBER.pack(number))
    assert read_all(application) == NUMBER.pack(number)


def echo(service: socket.socket) -> None:
    service.sendall(read_exactly(service, NUMBER.size))


# Nothing is sent.


def send_nothing(application: socket.socket, _number: int) -> None:
    application.shutdown(socket.SHUT_WR)
    assert application.recv(1) == b""


def read_nothing(service: socket.socket) -> None:
    assert service.recv(1) == b""


@pytest.mark.parametrize(
    ("application", "service"),
    [
        pytest.param(answer_greeting, greet, id="service-speaks-first"),
        pytest.param(ask, answer, id="half-close-then-read"),
        pytest.param(read_end, close_at_once, id="service-closes-at-once"),
        pytest.param(wait_and_ask, echo, id="both-idle"),
        pytest.param(send_nothing, read_nothing, id="zero-bytes"),
    ],
)
def test_short_connections_complete_and_none_stalls(pair: Pair, application: Application, service: Service) -> None:
    def connect(number: int) -> float:
        start = time.monotonic()
        with pair.connect(timeout=OPERATION_S) as connection:
            application(connection, number)
        return time.monotonic() - start

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(OPERATION_S)
            service(connection)

    with (
        pair.listen() as listener,
        ThreadPoolExecutor(AT_ONCE) as applications,
        ThreadPoolExecutor(AT_ONCE) as services,
    ):
        times = [applications.submit(connect, number) for number in range(CONNECTIONS)]
        served = [services.submit(serve, listener.accept()[0]) for _ in range(CONNECTIONS)]
        for each in served:
            each.result()
        took = sorted(each.result() for each in times)
    allowed_s = STALL_S + (IDLE_S if application is wait_and_ask else 0)
    assert took[-1] < allowed_s, f"slowest {took[-5:]}, median {took[CONNECTIONS // 2]}"


Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends(pair: Pair) -> Iterator[Ends]:
    """The two ends of one connection: the application's at the client and the service's at the server."""
    with pair.listen() as listener, pair.connect(timeout=OPERATION_S) as application:
        service, _ = listener.accept()
        with service:
            service.settimeout(OPERATION_S)
            yield application, service


def pick(ends: Ends, first: str) -> Ends:
    """The ends with the one called `first` in front."""
    return ends if first == "application" else (ends[1], ends[0])


def fill(connection: socket.socket) -> int:
    """Send until nothing more is taken for half a second; how many bytes that were."""
    sent = 0
    connection.settimeout(0.5)
    piece = bytes(65536)
    try:
        while True:
            sent += connection.send(piece)
    except TimeoutError:
        connection.settimeout(OPERATION_S)
        return sent


def drain_to_reset(connection: socket.socket) -> int:
    """Read until a reset; how many bytes came before it. An end of stream instead is a failure."""
    count = 0
    try:
        while data := connection.recv(1 << 20):
            count += len(data)
    except ConnectionResetError:
        return count
    raise AssertionError(f"end of stream after {count} bytes")


@pytest.mark.parametrize("resets", ["application", "service"])
@pytest.mark.parametrize("waiting", ["nothing", "from the one that resets", "from the other", "both ways"])
def test_reset_while_data_waits_reaches_the_other_end(ends: Ends, resets: str, waiting: str) -> None:
    one, other = pick(ends, resets)
    sent = fill(one) if waiting in ("from the one that resets", "both ways") else 0
    if waiting in ("from the other", "both ways"):
        fill(other)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    one.close()
    assert drain_to_reset(other) <= sent


def test_reset_right_after_the_start_is_a_reset_to_the_service(pair: Pair) -> None:
    """The stream is over before the target is connected: a service that sees the connection at all sees it reset."""
    with pair.listen() as listener:
        for _ in range(AT_ONCE):
            application = pair.connect()
            application.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            application.close()
        listener.settimeout(1.0)
        seen = 0
        with contextlib.suppress(TimeoutError):
            while True:
                service, _ = listener.accept()
                service.settimeout(OPERATION_S)
                with service, pytest.raises(ConnectionResetError):
                    service.recv(1)
                seen += 1
        assert 0 < seen <= AT_ONCE


@pytest.mark.parametrize("resets", ["application", "service"])
def test_reset_after_own_end_reaches_the_other_end(ends: Ends, resets: str) -> None:
    """The end of one direction has arrived: the other end still learns that its own direction broke."""
    one, other = pick(ends, resets)
    one.sendall(b"last words")
    one.shutdown(socket.SHUT_WR)
    assert read_all(other) == b"last words"
    fill(other)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    one.close()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        other.sendall(bytes(32 << 20))


@pytest.mark.parametrize("sends", ["application", "service"])
def test_end_after_10_mb_comes_after_all_of_them(ends: Ends, sends: str) -> None:
    """Then the other direction goes on, for as long as it likes."""
    one, other = pick(ends, sends)
    sent, received = together(lambda: send(one, 1, 10_000_000), lambda: receive(other))
    assert received == sent
    sent, received = together(lambda: send(other, 2, 10_000_000), lambda: receive(one))
    assert received == sent


@pytest.mark.parametrize("reads", ["application", "service"])
def test_slow_reader_is_not_overrun(ends: Ends, pair: Pair, reads: str) -> None:
    """Memory is bounded by the window; all of the rest waits in the writer."""
    reader, writer = pick(ends, reads)

    def used_bytes() -> int:
        return sum(worker["arena_used_bytes"] for end in ENDS for worker in pair.status(end)["workers"])

    def read_slowly() -> str:
        digest = hashlib.sha256()
        for go in range(4):
            time.sleep(PAUSE_S / 2)
            assert used_bytes() < 3 * WINDOW_BYTES
            digest.update(read_exactly(reader, go << 20))
        assert not writing.done()
        digest.update(read_all(reader))
        return f"{SLOW_BYTES} {digest.hexdigest()}"

    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(send, writer, 1, SLOW_BYTES)
        received = read_slowly()
        assert received == writing.result()
