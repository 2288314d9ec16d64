"""Faults of the link while it runs: what breaks, what does not, and what the lab tells about it."""

import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.netlab import Lab, Link, RunVoid, rerun_if_void
from tests.netlab.probe import send_numbered, tcp, udp

FAMILIES = pytest.mark.parametrize("family", [4, 6])


def idle(_client: socket.socket, _server: socket.socket) -> None:
    pass


def busy(client: socket.socket, server: socket.socket) -> None:
    """More is under way than the receiver takes."""
    client.settimeout(0)
    with suppress(BlockingIOError):
        while client.send(bytes(65536)):
            pass
    client.settimeout(10)
    server.recv(1)


def unacknowledged(client: socket.socket, server: socket.socket) -> None:
    """The server has a byte that it has not acknowledged yet: after a dialogue, it waits 40 ms with that."""
    for _ in range(5):
        client.sendall(b"question")
        server.sendall(server.recv(8))
        client.recv(8)
    client.sendall(b"x")
    server.recv(1)


@FAMILIES
@pytest.mark.parametrize("before", [idle, busy, unacknowledged])
def test_reset_reaches_both_ends_and_no_other_connection(
    family: int, before: Callable[[socket.socket, socket.socket], None]
) -> None:
    with Lab(Link(delay_ms=10)) as lab, tcp(lab, family) as (client, server), tcp(lab, family) as other:
        before(client, server)
        assert lab.reset(lab.connections()[0]) == 1
        for end in (client, server):
            with pytest.raises(ConnectionResetError):
                while end.recv(1 << 20):
                    pass
        other[0].sendall(b"still")
        assert other[1].recv(5) == b"still"
        assert [connection.index for connection in lab.connections()] == [1]


@rerun_if_void()
def test_blackhole_holds_one_connection_until_restored() -> None:
    with Lab() as lab, tcp(lab) as (client, server), tcp(lab) as other:
        assert lab.blackhole(lab.connections()[0]) == 1
        client.sendall(b"later")
        other[0].sendall(b"now")
        assert other[1].recv(5) == b"now"
        server.settimeout(0.4)
        with pytest.raises(TimeoutError):
            server.recv(5)
        assert [connection.blackholed for connection in lab.connections()] == [True, False]
        assert lab.restore(lab.connections()[0]) == 1
        server.settimeout(5)
        assert server.recv(5) == b"later"
        assert lab.report().up.dropped["blackholed"] >= 1


def test_blackhole_of_everything_takes_new_connections_too() -> None:
    with Lab() as lab, tcp(lab) as (client, server):
        port = server.getsockname()[1]
        lab.blackhole(direction="up")
        server.sendall(b"down is open")
        assert client.recv(100) == b"down is open"
        with pytest.raises(TimeoutError):
            lab.connect("client", lab.server_ip4, port, timeout=0.3)
        lab.restore()
        with pytest.raises(ConnectionRefusedError):  # nobody listens there, and says so
            lab.connect("client", lab.server_ip4, 9, timeout=2)


def test_link_can_be_changed_while_it_runs() -> None:
    with Lab() as lab, udp(lab) as (sender, received):
        lab.change("up", loss=1.0)
        send_numbered(sender, 10)
        time.sleep(0.05)
        lab.change("up", loss=0.0)
        sender.send(struct.pack("!I", 10))
        assert received() == [10]


def test_connections_are_listed_with_their_bytes() -> None:
    with Lab() as lab:
        with tcp(lab, 6) as (client, server):
            client.sendall(bytes(10_000))
            server.recv(10_000, socket.MSG_WAITALL)
            deadline = time.monotonic() + 2
            (connection,) = lab.connections()
            while not connection.bytes[0] > 10_000 > connection.bytes[1] > 0 and time.monotonic() < deadline:
                time.sleep(0.02)
                (connection,) = lab.connections()
            assert (connection.protocol, connection.client) == ("tcp", client.getsockname()[:2])
            assert connection.server == server.getsockname()[:2]
            assert connection.bytes[0] > 10_000 > connection.bytes[1] > 0
        assert lab.connections() == []
        assert [entry.closed for entry in lab.connections(closed=True)] == [True]


def test_starved_emulator_voids_the_run() -> None:
    with Lab(Link(delay_ms=20)) as lab, tcp(lab) as (client, server):
        client.sendall(b"x")
        server.recv(1)
        lab.clear_report()
        client.sendall(b"y")
        os.kill(lab.emulator_pid, signal.SIGSTOP)
        time.sleep(0.08)
        os.kill(lab.emulator_pid, signal.SIGCONT)
        server.recv(1)
        with pytest.raises(RunVoid, match="late"):
            lab.check()
