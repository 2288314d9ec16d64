"""Batches with the address that was asked, on real sockets of the loopback interface."""

import contextlib
import ctypes
import errno
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workers.io.batch import Slots, prepare_datagrams
from workers.io.port_batch import PortBatch, leave_from, take_destinations
from workers.io.run_sender import RunSender
from workers.io.sockaddr import key_of

HOSTS = [f"127.0.0.{number}" for number in (1, 2, 3)]
CAPACITY = 65_536


class Bench:
    """A socket bound to all addresses, and three senders, each to another of them."""

    def __init__(self, family: int) -> None:
        self.stack = contextlib.ExitStack()
        self.sock = self.stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        if family == socket.AF_INET6:
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        assert prepare_datagrams(self.sock)
        take_destinations(self.sock)
        self.batch = PortBatch(family, Slots(16, CAPACITY), is_addressed=True)
        self.senders = []
        self.keys = []
        for host in HOSTS:
            sender = self.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sender.connect((host, self.sock.getsockname()[1]))
            self.senders.append(sender)
            source, port = sender.getsockname()
            local = socket.inet_aton(host)
            if family == socket.AF_INET6:
                self.keys.append(key_of((f"::ffff:{source}", port, 0, 0)) + bytes(10) + b"\xff\xff" + local)
            else:
                self.keys.append(key_of((source, port)) + local)

    def receive(self, most: int = 16) -> list[tuple[bytes, bytes, int]]:
        """(key, payload, size if it is a merged run) of what waits."""
        found = []
        self.batch.receive(self.sock, most)
        for first, count, size, last, key in self.batch.runs():
            if last > size:
                found.append((key, bytes(self.batch.slots.view(first, last)), size))
                continue
            lengths = (*(size,) * (count - 1), last)
            found += [(key, bytes(self.batch.slots.view(first + at, n)), 0) for at, n in enumerate(lengths)]
        return found


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "both"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    with made.stack:
        yield made


def test_nothing_waiting_is_no_run(bench: Bench) -> None:
    assert bench.receive() == []


def test_datagrams_to_one_address_are_one_run(bench: Bench) -> None:
    for _ in range(5):
        bench.senders[1].send(b"x" * 700)
    assert bench.batch.receive(bench.sock) == 5
    assert bench.batch.runs() == [(0, 5, 700, 700, bench.keys[1])]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 1400), st.sampled_from([1, 1, 1, 2, 30])), max_size=16))
def test_everything_comes_with_its_source_and_the_address_that_was_asked(
    bench: Bench, runs: list[tuple[int, int, int]]
) -> None:
    sent, run_sender = [], RunSender()
    for number, (sender, size, count) in enumerate(runs):
        data = bytes((number,)) * (size * count)
        assert run_sender.send_run(bench.senders[sender], memoryview(data), size) == len(data)
        sent.append((bench.keys[sender], data, size if count > 1 else 0))
    received = bench.receive()
    assert received == sent
    assert bench.receive() == []


def test_batch_in_parts_does_not_mix_old_control_messages_with_new_ones(bench: Bench) -> None:
    run = memoryview(bytes(3000))
    for _ in range(4):
        RunSender().send_run(bench.senders[0], run, 1000)
    for _ in range(4):
        bench.senders[2].send(b"plain")
    assert bench.receive(4) == [(bench.keys[0], bytes(run), 1000)] * 4
    assert bench.receive(4) == [(bench.keys[2], b"plain", 0)] * 4


@pytest.mark.parametrize("index", [0, 1, 2])
def test_answer_leaves_from_the_address_that_was_asked(bench: Bench, index: int) -> None:
    sender = bench.senders[index]
    sender.send(b"question")
    ((key, _, _),) = bench.receive()
    source = sender.getsockname()
    if bench.batch.source_bytes > 16:
        source = (f"::ffff:{source[0]}", source[1], 0, 0)
    bench.sock.sendmsg((b"answer",), [leave_from(key[bench.batch.source_bytes :])], 0, source)
    sender.settimeout(5)
    assert sender.recv(100) == b"answer"  # it is connected, and hears nobody else


def test_icmp_error_is_a_reset() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, socket.socket(type=socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        sock.connect(gone.getsockname())
        gone.close()
        sock.send(b"anybody?")
        batch = PortBatch(socket.AF_INET, Slots(2))
        assert batch.receive(sock) == 0
        assert (batch.resets, batch.undelivered) == (1, 1)
        assert batch.receive(sock) == 0
        assert batch.resets == 1


@pytest.mark.parametrize(
    ("number", "resets"), [(errno.ECONNREFUSED, 1), (errno.EHOSTUNREACH, 1), (errno.EMSGSIZE, 0), (errno.EAGAIN, 0)]
)
def test_datagram_that_was_too_large_is_no_reset(number: int, resets: int) -> None:
    batch = PortBatch(socket.AF_INET, Slots(2))
    numbers = [number, errno.EAGAIN]

    def receive(*_: object) -> int:
        ctypes.set_errno(numbers.pop(0))
        return -1

    batch._receive = receive
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert batch.receive(sock) == 0
    assert batch.resets == resets
