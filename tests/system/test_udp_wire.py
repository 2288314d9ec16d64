"""UDP wires between two namespaces, by a device with an ordinary MTU and by one that is slow."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.io.small_loop import WRITE
from tests.io.test_udp_wire import NOW, Ends, Owner
from tests.netlab import Lab
from workers.io import udp_route, udp_wire
from workers.io.batch import prepare_datagrams
from workers.io.wire import Wire

PORT = 40_000


@contextmanager
def both(lab: Lab, version: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Ends, Wire, Owner, Wire, Owner]]:
    """A client's wire and its owner, and the server's, each in its namespace."""
    family, host = (socket.AF_INET, lab.server_ip4) if version == 4 else (socket.AF_INET6, lab.server_ip6)
    sock = lab.socket("server", family, socket.SOCK_DGRAM)
    sock.bind((host, PORT))
    prepare_datagrams(sock)
    monkeypatch.setattr(udp_wire, "open_socket", lambda family: lab.socket("client", family, socket.SOCK_DGRAM))

    def ask_in(namespace: str) -> None:
        monkeypatch.setattr(
            udp_route, "open_netlink", lambda: lab.socket(namespace, socket.AF_NETLINK, socket.SOCK_RAW)
        )

    with Ends(family, host, sockets=[sock]) as ends:
        ask_in("client")
        wire, owner = ends.dial(host, PORT)
        ask_in("server")
        answer, server = ends.meet(wire)
        wire.on_proven()
        yield ends, wire, owner, answer, server


@pytest.mark.parametrize("version", [4, 6])
def test_largest_record_fills_the_mtu_and_nothing_larger_leaves(
    lab: Lab, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with both(lab, version, monkeypatch) as (ends, wire, owner, answer, server):
        assert wire.most_bytes == (1472 if version == 4 else 1452)
        run = bytes(range(256)) * 200
        assert wire.send_run(memoryview(run), wire.most_bytes, NOW) == len(run)
        assert wire.send_one(run[: wire.most_bytes + 1], NOW)
        assert wire.send_one(b"the last", NOW)
        ends.loop.settle()
        assert b"".join(data for data, _ in server.came) == run + b"the last"
        assert max(hint for _, hint in server.came) == wire.most_bytes
        assert ends.diallers.routes.lost == (1, 0)
        assert answer.most_bytes == wire.most_bytes
        for surplus in (0, 1):
            assert answer.send_one(run[: wire.most_bytes + surplus], NOW)
        ends.loop.settle()
        assert owner.came == [(run[: wire.most_bytes], 0)]


def test_run_that_must_wait_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(emulate=False) as lab:
        lab.run(
            "client",
            [
                "tc",
                "qdisc",
                "add",
                "dev",
                "eth0",
                "root",
                "tbf",
                "rate",
                "400mbit",
                "burst",
                "130000",
                "limit",
                "20000000",
            ],
        )
        with both(lab, 4, monkeypatch) as (ends, wire, owner, _, server):
            runs = [bytes((number,)) * 60_000 for number in range(200)]
            waiting: list[memoryview] = []
            wait_count = 0

            def go_on() -> None:
                while waiting:
                    taken = wire.send_run(waiting[0], 1200, NOW)
                    assert taken % 1200 == 0
                    waiting[0] = waiting[0][taken:]
                    if waiting[0]:
                        return
                    waiting.pop(0)

            owner.on_room = go_on
            waiting += map(memoryview, runs)
            go_on()
            while waiting:
                wait_count += 1
                assert ends.loop.active(WRITE) == 1
                ends.loop.turn(1000)
            ends.loop.settle(200)
            assert wait_count > 0
            assert b"".join(data for data, _ in server.came) == b"".join(runs)


def test_other_host_without_that_port_resets(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with both(lab, 4, monkeypatch) as (ends, _, _, _, _):
        wire, owner = ends.dial(lab.server_ip4, PORT + 1, 1)
        assert wire.send_one(b"anybody?", NOW)
        ends.loop.settle(200)
        assert owner.resets == 1
