"""Listening and datagram sockets: families, options, whose they are, and addresses that cannot be had."""

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from forwarder import listeners
from forwarder.doors import Doors
from forwarder.errors import BootError
from forwarder.listeners import DATAGRAM_BUFFER_BYTES, Listeners, share_of
from tests.free_ports import free_ports
from workers.settings import (
    Address,
    Settings,
    SprayClientTunnel,
    SprayServerTunnel,
    StripeClientTunnel,
    StripeServerTunnel,
)


def client(*locals_: Address) -> Settings:
    tunnels = tuple(
        StripeClientTunnel(name=f"t{index}", index=index, local=local, remote_end=Address("server", 1))
        for index, local in enumerate(locals_)
    )
    return Settings(role="client", workers=1, keys=(), client_tunnels=tunnels)


def server(listen: Address) -> Settings:
    tunnel = StripeServerTunnel(name="web", index=3, listen=listen, target=Address("127.0.0.1", 80))
    return Settings(role="server", workers=1, keys=(), server_tunnels=(tunnel,))


def spray_client(local: Address, workers: int = 3) -> Settings:
    tunnel = SprayClientTunnel(name="kcp", index=2, ports=(80,), local=local, hosts=("server",))
    return Settings(role="client", workers=workers, keys=(), spray_client_tunnels=(tunnel,))


def spray_server(listen: str, type_: Literal["tcp", "udp", "all"], *ports: int) -> Settings:
    tunnel = SprayServerTunnel(
        name="kcp", index=5, ports=ports, type=type_, listen=listen, target=Address("127.0.0.1", 80)
    )
    return Settings(role="server", workers=2, keys=(), spray_server_tunnels=(tunnel,))


def datagrams_in(sock: socket.socket) -> list[bytes]:
    found = []
    try:
        while True:
            found.append(sock.recv(100))
    except BlockingIOError:
        return found


@pytest.fixture
def opened() -> Iterator[Callable[[Settings], Listeners]]:
    made: list[Doors] = []

    def open_(settings: Settings) -> Listeners:
        made.append(Doors())
        made[-1].open_missing(settings, settings.workers)
        return made[-1].listeners(settings)

    yield open_
    for each in made:
        each.close()


def open_listeners(settings: Settings, patience_s: float = 0.0) -> Doors:
    doors = Doors()
    doors.open_missing(settings, settings.workers, patience_s)
    return doors


def test_wildcard_takes_both_families(opened: Callable[[Settings], Listeners]) -> None:
    ((index, (sock,)),) = opened(server(Address("::", 0))).items()
    assert index == 3 and sock.family == socket.AF_INET6 and not sock.getblocking()
    for host in ("127.0.0.1", "::1"):
        socket.create_connection((host, sock.getsockname()[1])).close()


def test_wildcard_without_ipv6_takes_ipv4(
    opened: Callable[[Settings], Listeners], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = listeners._listen

    def without_ipv6(family: int, where: tuple[object, ...], applications: bool) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        return real(family, where, applications)

    monkeypatch.setattr(listeners, "_listen", without_ipv6)
    (sock,) = opened(server(Address("::", 0)))[3]
    assert sock.getsockname()[0] == "0.0.0.0"
    (named,) = opened(server(Address("localhost", 0)))[3]
    assert named.getsockname()[0] == "127.0.0.1"


def test_application_sockets_are_born_to_end_in_a_reset(opened: Callable[[Settings], Listeners]) -> None:
    (sock,) = opened(client(Address("127.0.0.1", 0)))[0]
    with socket.create_connection(sock.getsockname()) as near:
        far, _ = sock.accept()
        assert struct.unpack("ii", far.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == (1, 0)
        assert far.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        far.close()
        with pytest.raises(ConnectionResetError):
            near.recv(1)


def test_taken_port_names_tunnel_address_and_reason_and_leaves_nothing_open() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(BootError) as refused:
            open_listeners(client(Address("127.0.0.1", 0), Address("127.0.0.1", port)))
        assert len(os.listdir("/proc/self/fd")) == before
    assert refused.value.code == 69
    assert refused.value.message == f"tunnel 't1': cannot listen on 127.0.0.1:{port}: address already in use"


def test_address_of_another_host_is_refused() -> None:
    with pytest.raises(BootError, match="cannot assign requested address") as refused:
        open_listeners(client(Address("192.0.2.1", 80)))
    assert refused.value.code == 69


def test_unknown_name_is_refused() -> None:
    with pytest.raises(BootError, match=r"tunnel 't0': cannot listen on no\.invalid:80: ") as refused:
        open_listeners(client(Address("no.invalid", 80)))
    assert refused.value.code == 69


def test_missing_rights_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(family: int, where: tuple[object, ...], applications: bool) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listeners, "_listen", refuse)
    with pytest.raises(BootError, match="permission denied") as refused:
        open_listeners(client(Address("127.0.0.1", 80)))
    assert refused.value.code == 77


def test_port_that_a_killed_predecessor_still_holds_is_waited_for() -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    threading.Timer(0.15, taken.close).start()
    open_listeners(client(Address(*taken.getsockname())), patience_s=5).close()


def test_each_worker_of_a_spray_client_has_a_socket_of_its_own(opened: Callable[[Settings], Listeners]) -> None:
    settings = spray_client(Address("127.0.0.1", 0))
    everything = opened(settings)
    group = everything[2]
    assert [share_of(everything, settings, slot, settings.workers) for slot in range(3)] == [
        {2: [sock]} for sock in group
    ]
    (address,) = {sock.getsockname() for sock in group}
    for sock in group:
        assert sock.type == socket.SOCK_DGRAM and not sock.getblocking() and not sock.get_inheritable()
        assert sock.getsockopt(socket.IPPROTO_UDP, listeners.UDP_GRO) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= min(DATAGRAM_BUFFER_BYTES, 200_000)
    for _ in range(100):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as application:
            application.sendto(b"x", address)
    assert all(datagrams_in(sock) for sock in group)


def test_what_waits_for_a_dead_worker_is_its_successors(opened: Callable[[Settings], Listeners]) -> None:
    settings = spray_client(Address("127.0.0.1", 0), workers=2)
    everything = opened(settings)
    address = everything[2][0].getsockname()
    dead = [sock.dup() for sock in share_of(everything, settings, 0, settings.workers)[2]]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as application:
        application.bind(("127.0.0.1", 0))
        application.sendto(b"first", address)
        for sock in dead:
            sock.close()
        application.sendto(b"second", address)
    arrived = [datagrams_in(share_of(everything, settings, slot, settings.workers)[2][0]) for slot in range(2)]
    assert sorted(arrived) == [[], [b"first", b"second"]]


def test_group_at_the_wildcard_takes_both_families(opened: Callable[[Settings], Listeners]) -> None:
    group = opened(spray_client(Address("::", 0)))[2]
    port = group[0].getsockname()[1]
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        for _ in range(50):
            with socket.socket(family, socket.SOCK_DGRAM) as application:
                application.sendto(host.encode(), (host, port))
    arrived = [datagrams_in(sock) for sock in group]
    assert all(set(each) == {b"127.0.0.1", b"::1"} for each in arrived) and sum(map(len, arrived)) == 100


def test_spray_client_joins_nobody_elses_group() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(BootError) as refused:
            open_listeners(spray_client(Address("127.0.0.1", port)))
        assert len(os.listdir("/proc/self/fd")) == before
    assert refused.value.code == 69
    assert refused.value.message == f"tunnel 'kcp': cannot listen on 127.0.0.1:{port}/udp: address already in use"


def test_udp_ports_of_a_spray_server_stand_in_the_order_of_carriers(opened: Callable[[Settings], Listeners]) -> None:
    ports = free_ports(3)
    sockets = opened(spray_server("127.0.0.1", "udp", *ports))[5]
    assert [sock.getsockname()[1] for sock in sockets] == ports
    assert {sock.type for sock in sockets} == {socket.SOCK_DGRAM}
    assert all(sock.getsockopt(socket.IPPROTO_UDP, listeners.UDP_GRO) == 1 for sock in sockets)


def test_udp_port_at_the_wildcard_takes_both_families(opened: Callable[[Settings], Listeners]) -> None:
    (port,) = free_ports(1)
    (sock,) = opened(spray_server("::", "udp", port))[5]
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as near:
            near.sendto(host.encode(), (host, port))
    assert datagrams_in(sock) == [b"127.0.0.1", b"::1"]


def test_several_addresses_give_each_carrier_several_sockets(
    opened: Callable[[Settings], Listeners], monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = [(socket.AF_INET, 0, 0, "", (host, 0)) for host in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: infos)
    first, second = free_ports(2)
    sockets = opened(spray_server("name", "udp", first, second))[5]
    hosts = ("127.0.0.1", "127.0.0.2")
    assert [sock.getsockname() for sock in sockets] == [(host, port) for port in (first, second) for host in hosts]


def test_ports_of_both_kinds_take_turns(opened: Callable[[Settings], Listeners]) -> None:
    first, second = free_ports(2)
    settings = spray_server("127.0.0.1", "all", first, second)
    sockets = opened(settings)[5]
    kinds = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}
    found = tuple((kinds[sock.type], sock.getsockname()[1]) for sock in sockets)
    assert found == settings.spray_server_tunnels[0].carriers
    assert not any(sock.getblocking() for sock in sockets)


def test_taken_fake_tcp_port_is_named_and_leaves_nothing_open() -> None:
    first, second = free_ports(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", second))
        taken.listen()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(BootError) as refused:
            open_listeners(spray_server("127.0.0.1", "all", first, second))
        assert len(os.listdir("/proc/self/fd")) == before
    assert refused.value.code == 69
    assert refused.value.message == f"tunnel 'kcp': cannot listen on 127.0.0.1:{second}/tcp: address already in use"


def test_port_that_needs_a_right_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(family: int, where: tuple[object, ...], shared: bool = False) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listeners, "_bind_udp", refuse)
    for port, words in (
        (443, r"denied \(a port below 1024 needs root or .* CAP_NET_BIND_SERVICE\)"),
        (5000, "denied$"),
    ):
        with pytest.raises(BootError, match=words) as refused:
            open_listeners(spray_server("::", "udp", port))
        assert refused.value.code == 77
