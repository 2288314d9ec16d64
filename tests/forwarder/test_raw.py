"""What fake TCP needs and does not have is one line and an exit code, before anything is opened."""

import errno
import socket
from typing import Any, Literal

import pytest

from forwarder import raw
from forwarder.errors import BootError
from forwarder.raw import check_raw
from workers.settings import Address, Settings, SprayServerTunnel


def settings(type_: Literal["tcp", "udp", "all"] = "tcp", **more: Any) -> Settings:
    tunnel = SprayServerTunnel(
        name="kcp", index=0, ports=(80,), type=type_, listen="::", target=Address("127.0.0.1", 1), **more
    )
    return Settings(role="server", workers=1, keys=(), spray_server_tunnels=(tunnel,))


def refuse_packet_sockets(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def refuse(*_: object) -> socket.socket:
        raise error

    monkeypatch.setattr(raw.socket, "socket", refuse)


def assert_refused(wanted: Settings, code: int, line: str) -> None:
    with pytest.raises(BootError) as refused:
        check_raw(wanted)
    assert (refused.value.code, refused.value.message) == (code, f"tunnel 'kcp': {line}")


def test_missing_device_is_named() -> None:
    assert_refused(settings(device="nosuch0"), 69, "no device 'nosuch0' on this host")


def test_missing_right_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_packet_sockets(monkeypatch, PermissionError(errno.EPERM, "Operation not permitted"))
    line = 'fake TCP needs root or the capability CAP_NET_RAW (type = "udp" does without)'
    assert_refused(settings("all", device="lo"), 77, line)


def test_kernel_without_packet_sockets_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_packet_sockets(monkeypatch, OSError(errno.EAFNOSUPPORT, "unsupported"))
    line = "cannot open a packet socket: address family not supported by protocol"
    assert_refused(settings(), 69, line)


def test_backend_that_is_still_to_come_is_refused() -> None:
    line = 'backend "pcap" is not in this version: leave it at "packet"'
    assert_refused(settings(backend="pcap"), 69, line)
    check_raw(settings("udp", backend="pcap"))


def test_system_without_packet_sockets_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(raw.socket, "AF_PACKET")
    assert_refused(settings(device=None), 69, 'backend "packet" is for Linux only')


def test_udp_alone_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_packet_sockets(monkeypatch, PermissionError(errno.EPERM, "Operation not permitted"))
    check_raw(settings("udp", device="nosuch0"))
    check_raw(Settings(role="server", workers=1, keys=()))


def test_packet_socket_that_can_be_had_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[object, ...]] = []

    class Opened:
        def __init__(self, *kind: object) -> None:
            opened.append(kind)

        def close(self) -> None:
            opened.append(("closed",))

    monkeypatch.setattr(raw.socket, "socket", Opened)
    check_raw(settings(device="lo"))
    assert opened == [(socket.AF_PACKET, socket.SOCK_RAW, 0), ("closed",)]
