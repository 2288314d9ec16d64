"""Runs out of a socket: against a scripted kernel, and through the real one."""

import contextlib
import errno
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.io.run_sender import DATAGRAM_MAX, SEGMENTS_MAX, UDP_SEGMENT, RunSender
from workers.io.sockaddr import SocketAddress

PEER = ("192.0.2.1", 53)


class Kernel:
    """A socket that cuts runs as the kernel does. `refusals`: errors of the next calls, 0 for none.

    runs_refused: the error of every send of more than one datagram.
    """

    def __init__(self, *refusals: int, runs_refused: int = 0) -> None:
        self.refusals = deque(refusals)
        self.runs_refused = runs_refused
        self.calls = 0
        self.datagrams: list[bytes] = []
        self.addresses: set[SocketAddress | None] = set()

    def take(self, number: int) -> None:
        self.calls += 1
        number = (self.refusals.popleft() if self.refusals else 0) or number
        if number:
            raise OSError(number, "refused")

    def send(self, data: memoryview) -> int:
        return self.sendto(data, None)

    def sendto(self, data: memoryview, address: SocketAddress | None) -> int:
        self.take(0)
        self.addresses.add(address)
        self.datagrams.append(bytes(data))
        return len(data)

    def sendmsg(self, buffers: Any, ancillary: Any, flags: int = 0, address: SocketAddress | None = None) -> int:
        (data,) = buffers
        ((level, kind, value),) = ancillary
        (size,) = struct.unpack("=H", value)
        assert (level, kind, flags) == (socket.IPPROTO_UDP, UDP_SEGMENT, 0)
        assert len(data) <= min(DATAGRAM_MAX, SEGMENTS_MAX * size)
        self.take(self.runs_refused if len(data) > size else 0)
        self.addresses.add(address)
        self.datagrams += cut(bytes(data), size)
        return len(data)


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)] or [b""]


def send(kernel: Kernel, sender: RunSender, data: bytes, size: int, address: SocketAddress | None = None) -> int:
    return sender.send_run(cast(socket.socket, kernel), memoryview(data), size, address)


@pytest.mark.parametrize("address", [None, PEER])
def test_run_is_one_call(address: SocketAddress | None) -> None:
    kernel, data = Kernel(), bytes(range(210)) * 2
    assert send(kernel, RunSender(), data, 100, address) == 420
    assert (kernel.calls, kernel.datagrams) == (1, cut(data, 100))
    assert kernel.addresses == {address}


@pytest.mark.parametrize("address", [None, PEER])
@pytest.mark.parametrize("data", [b"", b"one"])
def test_single_datagram_is_sent_plainly_even_when_empty(address: SocketAddress | None, data: bytes) -> None:
    kernel, sender = Kernel(), RunSender()
    assert send(kernel, sender, data, len(data), address) == len(data)
    assert (kernel.calls, kernel.datagrams, kernel.addresses) == (1, [data], {address})


@given(st.integers(1, 65_507), st.integers(1, 200_000))
def test_run_of_any_length_goes_in_pieces_that_the_kernel_takes(size: int, total: int) -> None:
    kernel, data = Kernel(), bytes(range(256)) * 800
    assert send(kernel, RunSender(), data[:total], size) == total
    assert kernel.datagrams == cut(data[:total], size)


@given(
    st.integers(1, 40),
    st.integers(1, 400),
    st.lists(
        st.sampled_from([0, 0, errno.EAGAIN, errno.ENOBUFS, errno.ECONNREFUSED, errno.EIO, errno.EINVAL]), max_size=9
    ),
    st.sampled_from([0, errno.EIO, errno.EINVAL, errno.EMSGSIZE]),
)
def test_run_that_waits_goes_on_where_it_stopped(size: int, count: int, refusals: list[int], runs_refused: int) -> None:
    kernel, sender = Kernel(*refusals, runs_refused=runs_refused), RunSender()
    data = bytes(range(251)) * (size * count // 251 + 1)
    data = data[: size * count]
    position, waits = 0, 0
    while position < len(data):
        taken = send(kernel, sender, data[position:], size)
        assert taken == -1 or (taken > 0 and taken % size == 0)
        waits += taken != len(data) - position
        position += max(taken, 0)
    assert waits <= 2 * len(refusals)
    assert len(kernel.datagrams) + sender.undelivered == count
    if not sender.undelivered:
        assert kernel.datagrams == cut(data, size)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOBUFS])
@pytest.mark.parametrize("total", [100, 300])
def test_socket_that_would_block_takes_nothing(number: int, total: int) -> None:
    kernel, sender = Kernel(number), RunSender()
    assert send(kernel, sender, bytes(total), 100) == -1
    assert (kernel.datagrams, sender.undelivered, sender.too_large) == ([], 0, 0)


def test_socket_that_blocks_later_has_taken_the_first_piece() -> None:
    kernel, sender = Kernel(0, errno.EAGAIN), RunSender()
    assert send(kernel, sender, bytes(100 * 100), 100) == 6400


def test_socket_that_blocks_among_single_sends_has_taken_those_before() -> None:
    kernel, sender = Kernel(errno.EIO, 0, 0, errno.EAGAIN), RunSender()
    assert send(kernel, sender, bytes(500), 100) == 200
    assert sender.segment_max == 0


def test_eio_ends_sending_many_at_a_time_for_good() -> None:
    kernel, sender = Kernel(runs_refused=errno.EIO), RunSender()
    assert send(kernel, sender, bytes(300), 100) == 300
    assert kernel.calls == 4
    assert send(kernel, sender, bytes(300), 10) == 300
    assert kernel.calls == 34


def test_einval_ends_it_for_that_size_and_above() -> None:
    kernel, sender = Kernel(runs_refused=errno.EINVAL), RunSender()
    assert send(kernel, sender, bytes(300), 100) == 300
    kernel.runs_refused = 0
    kernel.calls = 0
    for size, calls in ((100, 3), (150, 2), (99, 1)):
        assert send(kernel, sender, bytes(300), size) == 300
        assert kernel.calls == calls
        kernel.calls = 0


def test_refusal_of_single_datagrams_too_says_nothing_about_runs() -> None:
    kernel, sender = Kernel(*[errno.EINVAL] * 7), RunSender()
    before = sender.segment_max
    assert send(kernel, sender, bytes(300), 100, ("192.0.2.1", 0)) == 300
    assert (kernel.datagrams, sender.undelivered, sender.segment_max) == ([], 3, before)


def test_run_too_large_for_the_mtu_is_tried_singly_and_counted() -> None:
    kernel, sender = Kernel(*[errno.EMSGSIZE] * 3), RunSender()
    before = sender.segment_max
    assert send(kernel, sender, bytes(250), 100) == 250
    assert (kernel.datagrams, sender.too_large, sender.segment_max) == ([bytes(50)], 2, before)


@pytest.mark.parametrize("total", [100, 300])
def test_error_of_a_datagram_before_costs_nothing(total: int) -> None:
    kernel, sender = Kernel(errno.ECONNREFUSED), RunSender()
    assert send(kernel, sender, bytes(total), 100) == total
    assert (len(kernel.datagrams), sender.undelivered) == (total // 100, 0)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENETUNREACH])
def test_run_that_cannot_be_delivered_is_counted_and_taken(number: int) -> None:
    kernel, sender = Kernel(number, number), RunSender()
    assert send(kernel, sender, bytes(250), 100) == 250
    assert (kernel.calls, kernel.datagrams, sender.undelivered) == (2, [], 3)


@pytest.mark.parametrize("numbers", [(errno.EBADF,), (errno.ECONNREFUSED, errno.EBADF)])
@pytest.mark.parametrize("total", [100, 300])
def test_socket_unfit_for_use_is_an_error(numbers: tuple[int, ...], total: int) -> None:
    with pytest.raises(OSError) as caught:
        send(Kernel(*numbers), RunSender(), bytes(total), 100)
    assert caught.value.errno == errno.EBADF


@pytest.fixture(params=[(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["IPv4", "IPv6"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    family, host = request.param
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(2)]
        for end in ends:
            end.bind((host, 0))
            end.setblocking(False)
        yield ends[0], ends[1]


@pytest.mark.parametrize("connected", [True, False])
def test_run_arrives_as_datagrams(pair: tuple[socket.socket, socket.socket], connected: bool) -> None:
    out, into = pair
    address = into.getsockname()
    if connected:
        out.connect(address)
    sender, data = RunSender(), bytes(range(250)) * 20
    for size in (1000, 700, 5000):
        assert sender.send_run(out, memoryview(data), size, None if connected else address) == len(data)
        assert [into.recv(6000) for _ in cut(data, size)] == cut(data, size)
    with pytest.raises(BlockingIOError):
        into.recv(6000)
    assert (sender.too_large, sender.undelivered) == (0, 0)


def test_two_of_the_largest_datagrams_that_fit_one_call_arrive(pair: tuple[socket.socket, socket.socket]) -> None:
    out, into = pair
    out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    into.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    size = DATAGRAM_MAX // 2
    assert RunSender().send_run(out, memoryview(bytes(2 * size)), size, into.getsockname()) == 2 * size
    assert [len(into.recv(65_536)) for _ in range(2)] == [size, size]


def test_other_sender_on_the_same_socket_is_not_cut(pair: tuple[socket.socket, socket.socket]) -> None:
    out, into = pair
    RunSender().send_run(out, memoryview(bytes(300)), 100, into.getsockname())
    out.sendto(bytes(300), into.getsockname())
    assert [len(into.recv(400)) for _ in range(4)] == [100, 100, 100, 300]
