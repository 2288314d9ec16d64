"""Batches, on real sockets of the loopback interface: what is sent is there at once."""

import contextlib
import errno
import socket
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.io.batch import CAPACITY, ROOM, UDP_GRO, Batch, Run, Slots, enlarge_buffers, prepare_datagrams
from workers.io.run_sender import RunSender
from workers.io.sockaddr import key_of

FAMILIES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
families = pytest.mark.parametrize(("family", "host"), FAMILIES)
SOURCES = 3


def receive_run(batch: Batch, sock: socket.socket) -> Run | None:
    """One datagram, or one run that the kernel has merged; None if nothing waits."""
    runs = batch.runs() if batch.receive(sock, 1) else []
    return runs[0] if runs else None


class Bench:
    """A receiving socket and a few senders. `fill` makes the bytes of the datagrams differ."""

    def __init__(self, family: int, host: str, slots: Slots | None = None, sources: int = SOURCES) -> None:
        self.stack = contextlib.ExitStack()
        self.sock = self.bound(family, host)
        self.sock.setblocking(False)
        enlarge_buffers(self.sock)
        self.batch = Batch(family, slots)
        self.senders = [self.bound(family, host) for _ in range(sources)]
        for sender in self.senders:
            sender.connect(self.sock.getsockname())
        self.keys = [key_of(sender.getsockname()) for sender in self.senders]
        self.fill = 0

    def bound(self, family: int, host: str) -> socket.socket:
        sock = self.stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        sock.bind((host, 0))
        return sock

    def send(self, source: int, size: int) -> bytes:
        self.fill = self.fill % 255 + 1
        datagram = bytes((self.fill,)) * size
        self.senders[source].send(datagram)
        return datagram

    def payload(self, slot: int, length: int) -> bytes:
        return bytes(self.batch.slots.view(slot, length))

    def datagrams(self, runs: list[Run]) -> list[tuple[bytes, bytes]]:
        """(source, payload) of each datagram, as the runs say."""
        found = []
        for first, count, size, last, key in runs:
            lengths = [size] * (count - 1) + [min(last, size)]
            if last > size:
                whole = self.payload(first, last)
                found += [(key, whole[at : at + size]) for at in range(0, last, size)]
                continue
            found += [(key, self.payload(first + index, length)) for index, length in enumerate(lengths)]
        return found


@pytest.fixture(params=FAMILIES, ids=["IPv4", "IPv6"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(*request.param)
    with made.stack:
        yield made


def test_nothing_waiting_is_no_run(bench: Bench) -> None:
    assert bench.batch.receive(bench.sock) == 0
    assert bench.batch.runs() == []
    assert receive_run(bench.batch, bench.sock) is None


def test_datagrams_of_one_source_and_size_are_one_run(bench: Bench) -> None:
    sent = [bench.send(0, 1300) for _ in range(64)]
    assert bench.batch.receive(bench.sock) == 64
    assert bench.batch.lengths == [1300] * 64
    assert bench.batch.runs() == [(0, 64, 1300, 1300, bench.keys[0])]
    assert [bench.payload(slot, 1300) for slot in range(64)] == sent


def test_more_than_the_slots_hold_is_for_the_next_time(bench: Bench) -> None:
    for _ in range(70):
        bench.send(1, 10)
    assert bench.batch.receive(bench.sock, most=4) == 4
    assert bench.batch.runs() == [(0, 4, 10, 10, bench.keys[1])]
    assert bench.batch.receive(bench.sock) == 64
    assert bench.batch.receive(bench.sock) == 2
    assert bench.batch.runs() == [(0, 2, 10, 10, bench.keys[1])]


def test_shorter_datagram_ends_the_run_before_it(bench: Bench) -> None:
    for size in (900, 900, 300, 300, 900, 40):
        bench.send(0, size)
    bench.batch.receive(bench.sock)
    key = bench.keys[0]
    assert bench.batch.runs() == [(0, 3, 900, 300, key), (3, 1, 300, 300, key), (4, 2, 900, 40, key)]


def test_empty_datagram_is_a_run_of_its_own(bench: Bench) -> None:
    for size in (900, 0, 0, 5):
        bench.send(0, size)
    bench.batch.receive(bench.sock)
    key = bench.keys[0]
    assert bench.batch.runs() == [(0, 1, 900, 900, key), (1, 2, 0, 0, key), (3, 1, 5, 5, key)]


def test_other_source_ends_the_run(bench: Bench) -> None:
    for source, size in ((0, 900), (1, 900), (1, 900), (2, 50)):
        bench.send(source, size)
    bench.batch.receive(bench.sock)
    first, second, third = bench.keys
    assert bench.batch.runs() == [(0, 1, 900, 900, first), (1, 2, 900, 900, second), (3, 1, 50, 50, third)]


def are_as_long_as_can_be(runs: list[Run]) -> bool:
    """No run could have taken the datagram behind it."""
    for (_, _, size, last, key), (_, _, following, _, following_key) in pairwise(runs):
        if key == following_key and last == size and (following == size or 0 < following < size):
            return False
    return True


@given(
    family=st.sampled_from(FAMILIES),
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, SOURCES - 1), st.sampled_from([0, 1, 20, 700, 1300])), max_size=20),
        max_size=4,
    ),
)
def test_any_datagrams_come_as_runs_in_order_and_with_nothing_of_batches_before(
    family: tuple[int, str], batches: list[list[tuple[int, int]]]
) -> None:
    bench = Bench(*family)
    with bench.stack:
        for batch in batches:
            sent = [(bench.keys[source], bench.send(source, size)) for source, size in batch]
            assert bench.batch.receive(bench.sock) == len(batch)
            runs = bench.batch.runs()
            assert bench.datagrams(runs) == sent
            assert are_as_long_as_can_be(runs)


@families
def test_datagram_larger_than_its_slot_is_counted_and_left_out(family: int, host: str) -> None:
    bench = Bench(family, host, Slots(8, capacity=100))
    with bench.stack:
        sent = [bench.send(0, size) for size in (100, 101, 100, 99)]
        assert bench.batch.receive(bench.sock) == 4
        key = bench.keys[0]
        runs = bench.batch.runs()
        assert runs == [(0, 1, 100, 100, key), (2, 2, 100, 99, key)]
        assert bench.datagrams(runs) == [(key, sent[0]), (key, sent[2]), (key, sent[3])]
        for _ in range(2):
            bench.send(0, 3000)
        assert bench.batch.receive(bench.sock) == 2
        assert bench.batch.runs() == []
        assert bench.batch.too_large == 3


@families
def test_largest_datagram_fits(family: int, host: str) -> None:
    bench = Bench(family, host, Slots(2))
    with bench.stack:
        sent = bench.send(0, 65_507)
        assert receive_run(bench.batch, bench.sock) == (0, 1, 65_507, 65_507, bench.keys[0])
        assert bench.payload(0, 65_507) == sent


def test_slots_have_room_in_front_and_do_not_overlap() -> None:
    slots = Slots(3, capacity=200)
    assert slots.stride >= ROOM + 200
    assert slots.stride % 64 == 0
    slots.memory[:] = bytes(len(slots.memory))
    for slot in range(3):
        slots.region(slot)[:] = bytes((slot + 1,)) * (ROOM + 200)
        slots.view(slot, 200)[:] = bytes((slot + 101,)) * 200
    for slot in range(3):
        start = slot * slots.stride
        assert bytes(slots.region(slot)) == bytes((slot + 1,)) * ROOM + bytes((slot + 101,)) * 200
        assert bytes(slots.memory[start + ROOM : start + ROOM + 200]) == bytes((slot + 101,)) * 200


def test_large_slots_cost_no_memory_before_a_large_datagram_came() -> None:
    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * 4096

    before = resident()
    slots = Slots()
    batch = Batch(socket.AF_INET, slots)
    assert len(slots.memory) > 64 * CAPACITY
    assert resident() - before < 1 << 20
    assert batch.count == 0


def merging(bench: Bench) -> RunSender:
    if not prepare_datagrams(bench.sock):
        pytest.skip("no UDP_GRO")
    return RunSender()


def test_merged_run_stands_in_one_slot(bench: Bench) -> None:
    sender = merging(bench)
    data = b"".join(bytes((index,)) * 1000 for index in range(10)) + b"end"
    sender.send_run(bench.senders[0], memoryview(data), 1000)
    assert receive_run(bench.batch, bench.sock) == (0, 1, 1000, 10_003, bench.keys[0])
    assert bench.payload(0, 10_003) == data


def test_merged_runs_and_single_datagrams_keep_their_order(bench: Bench) -> None:
    sender = merging(bench)
    data = memoryview(bytes(range(250)) * 10)
    sent = [(bench.keys[0], bench.send(0, 100)), (bench.keys[0], bench.send(0, 100))]
    for source, size in ((0, 1000), (1, 500)):
        sender.send_run(bench.senders[source], data, size)
        sent += [(bench.keys[source], bytes(data[at : at + size])) for at in range(0, len(data), size)]
        sent.append((bench.keys[2], bench.send(2, 7)))
    assert bench.batch.receive(bench.sock) == 6
    runs = bench.batch.runs()
    assert [run[:4] for run in runs] == [
        (0, 2, 100, 100),
        (2, 1, 1000, 2500),
        (3, 1, 7, 7),
        (4, 1, 500, 2500),
        (5, 1, 7, 7),
    ]
    assert bench.datagrams(runs) == sent
    assert bench.batch.runs() == runs


def test_merged_size_is_not_taken_for_that_of_the_next_batch(bench: Bench) -> None:
    sender = merging(bench)
    for _ in range(2):
        sender.send_run(bench.senders[0], memoryview(bytes(2000)), 1000)
        bench.batch.receive(bench.sock)
        assert bench.batch.runs() == [(0, 1, 1000, 2000, bench.keys[0])]
        bench.send(0, 2000)
        bench.batch.receive(bench.sock)
        assert bench.batch.runs() == [(0, 1, 2000, 2000, bench.keys[0])]


def test_merged_batch_whose_runs_nobody_asked_for_leaves_nothing_behind(bench: Bench) -> None:
    sender = merging(bench)
    sender.send_run(bench.senders[0], memoryview(bytes(2000)), 1000)
    bench.batch.receive(bench.sock)
    bench.send(0, 2000)
    bench.batch.receive(bench.sock)
    assert bench.batch.runs() == [(0, 1, 2000, 2000, bench.keys[0])]


def test_ipv4_source_at_a_socket_for_both_families_has_a_mapped_key() -> None:
    with (
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out,
    ):
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", 0))
        out.connect(("127.0.0.1", sock.getsockname()[1]))
        out.send(b"abc")
        run = receive_run(Batch(socket.AF_INET6, Slots(2)), sock)
        assert run == (0, 1, 3, 3, key_of(("::ffff:127.0.0.1", out.getsockname()[1], 0, 0)))


@families
def test_refusal_by_the_target_is_counted_and_what_came_is_received(family: int, host: str) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as sock, socket.socket(family, socket.SOCK_DGRAM) as target:
        target.bind((host, 0))
        sock.connect(target.getsockname())
        sock.send(b"first")
        name = target.recvfrom(100)[1]
        target.sendto(b"answer", name)
        target.close()
        sock.send(b"second")
        batch = Batch(family, Slots(2))
        assert receive_run(batch, sock) is not None
        assert batch.undelivered == 1
        assert batch.receive(sock) == 0


def test_socket_that_is_closed_is_an_error() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.close()
    with pytest.raises(OSError) as caught:
        Batch(socket.AF_INET, Slots(2)).receive(sock)
    assert caught.value.errno == errno.EBADF


def test_buffers_are_larger_than_the_default_and_the_socket_does_not_block() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        default = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        merges = prepare_datagrams(sock)
        assert sock.gettimeout() == 0
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > default
        assert not merges or sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO) == 1
        assert enlarge_buffers(sock, 1 << 16, 1 << 15) == (1 << 17, 1 << 16)
