"""Workers that follow each other, tunnels that come and go, keys that change: real workers of both ends, told what to
do by `tests.system.generations`."""

import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.free_ports import free_port, free_ports
from tests.system.generations import Generations
from workers.settings import (
    Address,
    Key,
    Settings,
    SprayClientTunnel,
    SprayServerTunnel,
    StripeClientTunnel,
    StripeServerTunnel,
)

HOST = "127.0.0.1"
KEY = Key("laptop", bytes(range(32)))
BLOB = random.Random(7).randbytes(1 << 20)
LONG = pytest.mark.skipif("FORWARDER_TEST_LONG" not in os.environ, reason="a minute: set FORWARDER_TEST_LONG=1")
GAP_S = 1.5
"""Without an answer: 0.04 s were seen on an idle machine, 0.9 s where 30 processes wanted two cores."""
FEWER_BLOCKS = 4
"""What the kernel's buffers take differs by a tenth from one connection to the next."""
LATE_S = 5.0
"""Longer than a worker lingers."""
changed = msgspec.structs.replace


class Target:
    """A service: the first 4 bytes of a connection say how many blocks it sends, then it echoes to the end."""

    def __init__(self, block: bytes = BLOB) -> None:
        self._block = block
        self._listener = socket.create_server((HOST, 0), backlog=512)
        self.address = Address(*self._listener.getsockname())
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=(self._listener.accept()[0],), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):
            for _ in range(int.from_bytes(sock.recv(4))):
                sock.sendall(self._block)
            while data := sock.recv(65536):
                sock.sendall(data)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def target() -> Iterator[Target]:
    with closing(Target()) as made:
        yield made


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Generations]:
    with Generations(tmp_path / "log") as made:
        yield made


class Stripes:
    """Settings of both ends with one stripe tunnel; `port` is for applications."""

    def __init__(self, target: Target, **options: Any) -> None:
        self.port, there = free_port(), Address(HOST, free_port())
        client = StripeClientTunnel(
            name="web", index=0, local=Address(HOST, self.port), remote_end=there, somaxconn=6, **options
        )
        server = StripeServerTunnel(name="web", index=0, listen=there, target=target.address)
        times: Any = {"workers": 2, "keys": (KEY,), "drain_timeout_s": 1.5}
        self.client = Settings(role="client", client_tunnels=(client,), **times)
        self.server = Settings(role="server", server_tunnels=(server,), **times)

    def start(self, program: Generations, client: int = 2, server: int = 2) -> None:
        program.do("start", "server", settings=self.server, workers=server)
        program.do("start", "client", settings=self.client, workers=client)

    def connect(self, megabytes: int = 0) -> socket.socket:
        sock = socket.create_connection((HOST, self.port), 10)
        sock.settimeout(20)
        sock.sendall(megabytes.to_bytes(4))
        return sock


def echo(sock: socket.socket, data: bytes = b"data") -> None:
    sock.sendall(data)
    assert sock.recv(len(data), socket.MSG_WAITALL) == data


class Arrivals(threading.Thread):
    """Short connections, one after the other, until `stop`. `failures`: why some did not work."""

    def __init__(self, stripes: Stripes) -> None:
        super().__init__(daemon=True)
        self.stripes = stripes
        self.done = 0
        self.failures: list[str] = []
        self._going = True
        self.start()

    def run(self) -> None:
        while self._going:
            try:
                with self.stripes.connect() as sock:
                    echo(sock)
                    sock.shutdown(socket.SHUT_WR)
                    assert sock.recv(1) == b""
                self.done += 1
            except (OSError, AssertionError) as error:
                self.failures.append(repr(error))
            time.sleep(0.003)

    def stop(self) -> None:
        self._going = False
        self.join()
        assert not self.failures and self.done > 20, (self.done, self.failures[:5])


class Download(threading.Thread):
    """One large transfer; `check` waits for it."""

    def __init__(self, stripes: Stripes, megabytes: int) -> None:
        super().__init__(daemon=True)
        self.megabytes = megabytes
        self._sock = stripes.connect(megabytes)
        self._sum = hashlib.sha256()
        self.bytes = 0
        self.start()

    def run(self) -> None:
        with self._sock as sock:
            while self.bytes < self.megabytes << 20 and (data := sock.recv(1 << 18)):
                self._sum.update(data)
                self.bytes += len(data)

    def check(self) -> None:
        self.join(60)
        expected = hashlib.sha256()
        for _ in range(self.megabytes):
            expected.update(BLOB)
        assert self.bytes == self.megabytes << 20 and self._sum.digest() == expected.digest()


def sessions(program: Generations, end: str) -> list[dict[str, Any]]:
    """What each worker of that end says of the only tunnel's sessions."""
    return [
        session
        for report in program.do("status", end)
        for tunnel in report["tunnels"]
        for session in tunnel["sessions"]
    ]


def wait_up(program: Generations, end: str, count: int) -> None:
    deadline = time.monotonic() + 15
    while sum(session["carriers_up"] for session in sessions(program, end)) < count:
        assert time.monotonic() < deadline, program.log_file.read_text()
        time.sleep(0.05)


def follow(program: Generations, target: Target, steps: list[tuple[str, int]], megabytes: int, pause_s: float) -> None:
    """Generations follow each other under traffic: nobody notices, and the older ones leave."""
    stripes = Stripes(target)
    stripes.start(program)
    kept, download, arrivals = stripes.connect(), Download(stripes, megabytes), Arrivals(stripes)
    for end, workers in steps:
        time.sleep(pause_s)
        program.replace(end, workers)
        echo(kept)
    download.check()
    arrivals.stop()
    for end in ("client", "server"):
        wait_up(program, end, 6)
    echo(kept)
    kept.close()
    for end in ("client", "server"):
        started = 2 + sum(workers for other, workers in steps if other == end)
        newest = next(workers for other, workers in reversed(steps) if other == end)
        assert program.wait_exits(end, started - newest) == [0] * (started - newest) + [None] * newest


def test_generations_of_other_sizes_follow_each_other_and_no_connection_notices(
    program: Generations, target: Target
) -> None:
    follow(program, target, [("server", 3), ("client", 1), ("server", 1), ("client", 2)], 200, 0.3)


@LONG
@pytest.mark.deadline(500)
def test_fifty_generations_follow_each_other(program: Generations, target: Target) -> None:
    follow(program, target, [("server", 2), ("client", 2)] * 25, 1000, 0.1)


def late(stripes: Stripes, blocks: int) -> socket.socket:
    """An application that asks for so much, says that it asks for no more, and reads no more than the first byte yet:
    its stream is there."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 10)
    sock.settimeout(20)
    sock.connect((HOST, stripes.port))
    sock.sendall(blocks.to_bytes(4))
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1)
    return sock


def has_ended(program: Generations) -> bool:
    """Whether all streams end soon."""
    deadline = time.monotonic() + 0.5
    while any(tunnel["flows_open"] for report in program.do("status", "client") for tunnel in report["tunnels"]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def late_and_ended(program: Generations, stripes: Stripes) -> tuple[socket.socket, int]:
    """An application that is `late` for so many blocks that its stream could just end: the last wait in the worker."""
    most, too_many = 1, 512
    while too_many - most > 1:
        blocks = (most + too_many) // 2
        with late(stripes, blocks):
            most, too_many = (blocks, too_many) if has_ended(program) else (most, blocks)
    while True:
        sock = late(stripes, most)
        if has_ended(program):
            return sock, most
        sock.close()
        most -= FEWER_BLOCKS
        assert most > 0, "no stream ends"


def test_application_that_reads_late_gets_all_from_a_worker_that_has_followers(program: Generations) -> None:
    with closing(Target(bytes(64 << 10))) as target:
        stripes = Stripes(target)
        stripes.start(program)
        sock, blocks = late_and_ended(program, stripes)
        with sock:
            program.replace("client", 2)
            time.sleep(LATE_S)
            received = 1
            while data := sock.recv(1 << 20):
                received += len(data)
    assert received == blocks * (64 << 10)
    assert program.wait_exits("client", 2) == [0, 0, None, None]


def test_drain_in_the_middle_of_a_change_ends(program: Generations, target: Target) -> None:
    stripes = Stripes(target)
    stripes.start(program)
    with stripes.connect() as kept:
        echo(kept)
        program.do("add", "client", workers=2)
        program.replace("server", 2)
        echo(kept)
        for end in ("client", "server"):
            program.do("drain", end, timeout_s=10.0)
        time.sleep(0.5)
        echo(kept)
    assert program.wait_exits("client", 4, 5) == [0] * 4
    assert program.wait_exits("server", 4, 5) == [0] * 4


def test_older_worker_that_dies_leaves_the_new_ones_in_charge(program: Generations, target: Target) -> None:
    stripes = Stripes(target)
    stripes.start(program)
    program.do("add", "client", workers=2)
    program.do("kill", "client", worker=0)
    program.do("kill", "client", worker=0)
    program.do("retire", "client")
    assert program.wait_exits("client", 2)[:2] != [0, 0]
    with stripes.connect() as sock:
        echo(sock)
    wait_up(program, "client", 6)


class Datagrams(threading.Thread):
    """One source of datagrams, echoed by `target`: `lost` are the times when those that got no answer were sent."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.connect((HOST, port))
        self._sock.setblocking(False)
        self.sent: list[float] = []
        self.answered: set[int] = set()
        self.going = True
        self.start()

    def run(self) -> None:
        while self.going:
            self.sent.append(time.monotonic())
            with suppress(OSError):
                self._sock.send((len(self.sent) - 1).to_bytes(4) + bytes(100))
            self._receive()
            time.sleep(0.005)
        time.sleep(0.3)
        self._receive()
        self._sock.close()

    def _receive(self) -> None:
        with suppress(OSError):
            while True:
                self.answered.add(int.from_bytes(self._sock.recv(2048)[:4]))

    def longest_gap_s(self) -> float:
        """Without any answer."""
        self.going = False
        self.join()
        times = [self.sent[number] for number in sorted(self.answered)]
        return max(after - before for before, after in pairwise(times))


@pytest.fixture
def echoing() -> Iterator[tuple[Address, set[Any]]]:
    """A UDP service that echoes, and the sources that it has seen."""
    seen: set[Any] = set()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((HOST, 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                data, source = sock.recvfrom(2048)
                seen.add(source)
                sock.sendto(data, source)

    threading.Thread(target=serve, daemon=True).start()
    yield Address(*sock.getsockname()), seen
    sock.close()


def test_conversations_go_on_with_their_source_over_generations_of_both_ends(
    program: Generations, echoing: tuple[Address, set[Any]]
) -> None:
    service, seen = echoing
    port = free_port()
    ports = tuple(free_ports(6))
    both: Any = {"name": "k", "index": 0, "type": "udp", "ports": ports}
    client = SprayClientTunnel(local=Address(HOST, port), hosts=(HOST,), **both)
    server = SprayServerTunnel(listen=HOST, target=service, **both)
    settings: Any = {"workers": 2, "keys": (KEY,)}
    program.do(
        "start", "server", workers=2, settings=Settings(role="server", spray_server_tunnels=(server,), **settings)
    )
    program.do(
        "start", "client", workers=2, settings=Settings(role="client", spray_client_tunnels=(client,), **settings)
    )
    wait_up(program, "client", len(ports))
    flows = [Datagrams(port) for _ in range(4)]
    time.sleep(0.5)
    for end, workers in (("server", 3), ("client", 1)):
        program.replace(end, workers)
        time.sleep(1.6)
    wait_up(program, "client", len(ports))
    gaps_s = [flow.longest_gap_s() for flow in flows]
    assert max(gaps_s) < GAP_S, gaps_s
    assert len(seen) == len(flows)
    lost = sum(len(flow.sent) - len(flow.answered) for flow in flows)
    assert lost < 0.05 * sum(len(flow.sent) for flow in flows)


def open_counts(program: Generations) -> list[dict[str, int]]:
    names = ("descriptors", "watchers", "greenlets", "slots", "slots_lent", "credit_reserved_bytes", "endpoints")
    return [
        {name: report["open"][name] for name in names}
        for end in ("client", "server")
        for report in program.do("status", end)
    ]


def with_more(stripes: Stripes, target: Target, number: int) -> tuple[Stripes, int, int]:
    """The same and two tunnels more, which have not been there before, and their ports for applications."""
    port, there, datagrams, ports = free_port(), Address(HOST, free_port()), free_port(), (free_port(),)
    more: Any = {"name": f"more-{number}", "index": 2 * number}
    spray: Any = {"name": "k", "index": 2 * number + 1, "type": "udp", "ports": ports}
    local = Address(HOST, port)
    ends = Stripes(target)
    ends.client = changed(
        stripes.client,
        client_tunnels=(
            *stripes.client.client_tunnels,
            StripeClientTunnel(local=local, remote_end=there, somaxconn=4, **more),
        ),
        spray_client_tunnels=(SprayClientTunnel(local=Address(HOST, datagrams), hosts=(HOST,), **spray),),
    )
    ends.server = changed(
        stripes.server,
        server_tunnels=(
            *stripes.server.server_tunnels,
            StripeServerTunnel(listen=there, target=target.address, **more),
        ),
        spray_server_tunnels=(SprayServerTunnel(listen=HOST, target=target.address, **spray),),
    )
    ends.port = port
    return ends, port, datagrams


def test_tunnels_come_and_go_and_leave_nothing(program: Generations, target: Target) -> None:
    stripes = Stripes(target)
    stripes.start(program)
    wait_up(program, "client", 6)
    with stripes.connect() as kept:
        counts = []
        for number in range(1, 13):
            ends, _, datagrams = with_more(stripes, target, number)
            program.do("reconfigure", "server", settings=ends.server)
            program.do("reconfigure", "client", settings=ends.client)
            with ends.connect() as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
                source.sendto(b"x", (HOST, datagrams))
                echo(sock)
                for end in ("client", "server")[:: 1 if number % 2 else -1]:
                    program.do("reconfigure", end, settings=getattr(stripes, end))
                echo(sock)  # it may finish
            echo(kept)
            if number in (2, 12):
                time.sleep(2)
                counts.append(open_counts(program))
        assert counts[0] == counts[1]


def test_tunnel_that_stays_takes_new_settings_and_keeps_its_connections(program: Generations, target: Target) -> None:
    stripes = Stripes(target)
    stripes.start(program)
    wait_up(program, "client", 6)
    with stripes.connect() as kept, closing(Target()) as other:
        echo(kept)
        (client,), (server,) = stripes.client.client_tunnels, stripes.server.server_tunnels
        program.do(
            "reconfigure",
            "client",
            settings=changed(stripes.client, client_tunnels=(changed(client, somaxconn=9, dial_rate_per_s=300.0),)),
        )
        program.do(
            "reconfigure",
            "server",
            settings=changed(stripes.server, server_tunnels=(changed(server, target=other.address),)),
        )
        wait_up(program, "client", 9)
        target.close()
        with stripes.connect() as sock:
            echo(sock)
        echo(kept)


def test_connection_in_a_removed_tunnel_is_reset_at_the_deadline(program: Generations, target: Target) -> None:
    stripes = Stripes(target)
    stripes.start(program)
    ends, _, _ = with_more(stripes, target, 1)
    for end in ("server", "client"):
        program.do("reconfigure", end, settings=getattr(ends, end))
    with ends.connect() as sock, stripes.connect() as kept:
        echo(sock)
        began = time.monotonic()
        program.do("reconfigure", "client", settings=stripes.client)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert 1.0 < time.monotonic() - began < 3.0
        with pytest.raises(ConnectionRefusedError):
            ends.connect()
        echo(kept)


def test_revoked_key_ends_no_session_and_begins_none_and_a_new_secret_does(
    program: Generations, target: Target
) -> None:
    stripes = Stripes(target)
    stripes.start(program, 1, 1)
    wait_up(program, "client", 6)
    other = Key("laptop", bytes(reversed(range(32))))
    with stripes.connect() as kept:
        echo(kept)
        program.do("reconfigure", "server", settings=changed(stripes.server, keys=(changed(KEY, revoked=True), other)))
        program.replace("client", 1)  # which has the old secret
        time.sleep(0.7)
        assert [each["carriers_up"] for each in sessions(program, "client")] == [6, 0]
        echo(kept)
        program.do("reconfigure", "client", settings=changed(stripes.client, keys=(other,)))
        deadline = time.monotonic() + 10
        while [each["carriers_up"] for each in sessions(program, "client")] != [0, 6]:
            assert time.monotonic() < deadline, program.log_file.read_text()
            time.sleep(0.1)
        echo(kept)
