"""What fake TCP needs and does not have is one line and an exit code, before anything is opened."""

import errno
import socket
from pathlib import Path
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


@pytest.mark.parametrize(
    ("version", "error", "why"),
    [
        ((3, 11), ModuleNotFoundError("No module named 'pcap'"), "which is not installed"),
        ((3, 13), ModuleNotFoundError("No module named 'pcap'"), "which cannot be built for Python 3.12 or newer"),
        ((3, 11), ImportError("libpcap.so.0.8: no such file"), "which cannot be loaded: libpcap.so.0.8: no such file"),
    ],
)
def test_backend_without_its_library_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], error: ImportError, why: str
) -> None:
    def refuse(name: str) -> None:
        assert name == "pcap"
        raise error

    monkeypatch.setattr(raw.importlib, "import_module", refuse)
    monkeypatch.setattr(raw.sys, "version_info", (*version, 2, "final", 0))
    why += " (this is 3.13)" if version == (3, 13) else ""
    line = f'backend "pcap" needs pypcap, {why}: leave it at "packet"'
    assert_refused(settings(backend="pcap"), 69, line)
    check_raw(settings("udp", backend="pcap"))


def test_capture_without_a_directory_is_refused(tmp_path: Path) -> None:
    check_raw(settings("udp", capture=str(tmp_path / "kcp.pcap")))
    where = tmp_path / "nowhere"
    line = f"capture: no directory '{where}' on this host"
    assert_refused(settings("udp", capture=str(where / "kcp.pcap")), 69, line)


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
