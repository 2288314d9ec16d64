"""Listening sockets: families, options, and addresses that cannot be had."""

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from forwarder import listeners
from forwarder.errors import BootError
from forwarder.listeners import Listeners, close_listeners, open_listeners
from workers.settings import Address, Settings, StripeClientTunnel, StripeServerTunnel


def client(*locals_: Address) -> Settings:
    tunnels = tuple(
        StripeClientTunnel(name=f"t{index}", index=index, local=local, remote_end=Address("server", 1))
        for index, local in enumerate(locals_)
    )
    return Settings(role="client", workers=1, keys=(), client_tunnels=tunnels)


def server(listen: Address) -> Settings:
    tunnel = StripeServerTunnel(name="web", index=3, listen=listen, target=Address("127.0.0.1", 80))
    return Settings(role="server", workers=1, keys=(), server_tunnels=(tunnel,))


@pytest.fixture
def opened() -> Iterator[Callable[[Settings], Listeners]]:
    made: list[Listeners] = []

    def open_(settings: Settings) -> Listeners:
        made.append(open_listeners(settings))
        return made[-1]

    yield open_
    for each in made:
        close_listeners(each)


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
    close_listeners(open_listeners(client(Address(*taken.getsockname())), patience_s=5))
