"""Listening sockets over reloads: what stays open is the same socket, what is refused has changed nothing."""

import os
import socket
from collections.abc import Iterator

import pytest

from forwarder.doors import Doors
from forwarder.errors import BootError
from forwarder.listeners import own_share, share_of
from tests.forwarder.test_listeners import client, datagrams_in, spray_client
from tests.free_ports import free_ports
from workers.settings import Address


@pytest.fixture
def doors() -> Iterator[Doors]:
    made = Doors()
    yield made
    made.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_port_that_stays_keeps_its_socket_under_another_index(doors: Doors) -> None:
    one, two, three = (Address("127.0.0.1", port) for port in free_ports(3))
    doors.open_missing(client(one, two), 1)
    before = doors.listeners(client(one, two))
    after = client(three, one)
    doors.open_missing(after, 1)
    doors.close_unwanted(after)
    assert doors.listeners(after)[1] == before[0] and before[1][0].fileno() == -1
    socket.create_connection((three.host, three.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((two.host, two.port))


def test_refused_port_opens_nothing(doors: Doors) -> None:
    one, two, three = (Address("127.0.0.1", port) for port in free_ports(3))
    doors.open_missing(client(one), 1)
    before = descriptors()
    with socket.socket() as taken:
        taken.bind((three.host, three.port))
        taken.listen()
        with pytest.raises(BootError, match=r"address already in use$"):
            doors.open_missing(client(two, three), 1)
    assert descriptors() == before and doors.listeners(client(one))[0][0].fileno() >= 0


def test_address_that_overlaps_with_ours_says_so(doors: Doors) -> None:
    (port,) = free_ports(1)
    doors.open_missing(client(Address("127.0.0.1", port)), 1)
    with pytest.raises(BootError, match=r"in use, by this instance's 127\.0\.0\.1:\d+: changing that takes a restart$"):
        doors.open_missing(client(Address("0.0.0.0", port)), 1)


def test_group_grows_and_is_shared_out_as_a_whole(doors: Doors) -> None:
    (port,) = free_ports(1)
    settings = spray_client(Address("localhost", port))
    doors.open_missing(settings, 2)
    before = doors.listeners(settings)[2]
    doors.open_missing(settings, 3)
    every = doors.listeners(settings)[2]
    assert set(before) < set(every) and len(every) * 2 == len(before) * 3
    for workers in (3, 2, 1):
        shares = [own_share(every, seat, workers) for seat in range(workers)]
        assert sorted((sock for share in shares for sock in share), key=id) == sorted(every, key=id)
        families = {sock.family for sock in every}
        assert all({sock.family for sock in share} == families for share in shares)
    for _ in range(60):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as application:
            application.sendto(b"x", ("127.0.0.1", port))
    arrived = [sum(len(datagrams_in(sock)) for sock in own_share(every, seat, 3)) for seat in range(3)]
    assert sum(arrived) == 60 and all(arrived)


def test_child_keeps_only_its_own(doors: Doors) -> None:
    one, two = (Address("127.0.0.1", port) for port in free_ports(2))
    settings = spray_client(one)
    doors.open_missing(settings, 3)
    doors.open_missing(client(two), 3)
    every = doors.listeners(settings)[2]
    kept = share_of(doors.listeners(settings), settings, 1, 3)
    doors.close_in_child(kept)
    assert [sock for sock in every if sock.fileno() >= 0] == kept[2] == [every[1]]
    assert doors.listeners(client(two))[0][0].fileno() == -1


def test_saved_and_restored_sockets_are_the_same(doors: Doors) -> None:
    settings = client(*(Address("127.0.0.1", port) for port in free_ports(2)))
    doors.open_missing(settings, 1)
    other = Doors()
    other.restore([(wanted, [os.dup(fd) for fd in fds]) for wanted, fds in doors.saved()])
    names = [sock.getsockname() for sockets in doors.listeners(settings).values() for sock in sockets]
    assert [sock.getsockname() for sockets in other.listeners(settings).values() for sock in sockets] == names
    other.open_missing(settings, 1)  # nothing is
    other.close()
