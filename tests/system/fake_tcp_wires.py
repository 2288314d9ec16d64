"""Both ends of fake-TCP wires in the namespaces of a lab, in this process and on one event loop."""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import gevent
import pytest

from tests.netlab import Lab, kernel
from tests.system.spray_pair import backend_in_use
from workers.core.cuts import Records
from workers.io import next_hop, packet, raw_device, tcp_wire
from workers.io.fake_handshake import prepare
from workers.io.packet import Device, PacketPort, find_device
from workers.io.pcap_port import PcapPort
from workers.io.raw_device import FramePort, Wanted
from workers.io.tcp_wire import TcpDiallers, TcpPorts
from workers.io.wire import Wire
from workers.settings import Address, SprayClientTunnel, SprayServerTunnel

Side = Literal["client", "server"]
PORTS = (443, 8443)


class Owner:
    """A wire's owner, and who dials it. opens: whether what comes counts as authentic."""

    def __init__(self) -> None:
        self.wire: Wire | None = None
        self.why = ""
        self.came = b""
        self.hints: set[int] = set()
        self.resets = self.writable = 0
        self.opens = True

    def on_wire(self, carrier: int, wire: Wire) -> None:
        self.wire = wire
        wire.owner = self

    def on_no_wire(self, carrier: int, why: str) -> None:
        self.why = why

    def on_payload(self, wire: Wire, records: Records, start: int, end: int, hint: int, now_us: int) -> None:
        self.came += bytes(records.view[start:end])
        self.hints.add(hint)
        if self.opens:
            wire.on_opened(now_us)

    def on_writable(self, wire: Wire) -> None:
        self.writable += 1

    def on_reset(self, wire: Wire) -> None:
        self.resets += 1


class Door:
    """Takes in whoever sends b"hello", and answers him."""

    def __init__(self) -> None:
        self.owners: list[Owner] = []
        self.strangers: list[tuple[int, bytes]] = []

    def on_stranger(self, wire: Wire, carrier: int, records: Records, start: int, end: int, now_us: int) -> None:
        said = bytes(records.view[start:end])
        self.strangers.append((carrier, said))
        if said == b"hello":
            owner = Owner()
            owner.on_wire(carrier, wire)
            self.owners.append(owner)
            wire.keep()
            wire.on_opened(now_us)
            wire.on_proven()
            wire.send_one(b"welcome", now_us)


class Host:
    """What a worker gets."""

    def __init__(self) -> None:
        self.loop = gevent.get_hub().loop
        self.workers, self.slot, self.seat = 1, 0, 0


def client_tunnel(host: str, **more: Any) -> SprayClientTunnel:
    return SprayClientTunnel(name="game", index=0, ports=PORTS, local=Address("::1", 1), hosts=(host,), **more)


def server_tunnel(**more: Any) -> SprayServerTunnel:
    return SprayServerTunnel(name="game", index=0, ports=PORTS, listen="::", target=Address("::1", 2), **more)


class PcapPortInside(PcapPort):
    """Opens its sockets in a namespace of the lab. Skips the test where this process may not go there."""

    def __init__(self, lab: Lab, side: Side, device: Device, program: bytes) -> None:
        self._namespace = lab.descriptor(side)
        super().__init__(device, program)

    def bind(self, device: Device, program: bytes) -> None:
        with inside(self._namespace):
            super().bind(device, program)


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """This thread is in that namespace while the block runs."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        kernel.setns(namespace)
    except PermissionError as error:
        os.close(own)
        pytest.skip(f"{error}: a capture can be opened in another namespace by root only")
    try:
        yield
    finally:
        kernel.setns(own)
        os.close(own)


class Wires:
    """Diallers in the client's namespace and ports in the server's."""

    def __init__(
        self, lab: Lab, version: int, monkeypatch: pytest.MonkeyPatch, *, server_backend: str = "", **tunnel: Any
    ) -> None:
        tunnel = {"backend": backend_in_use[0], **tunnel}
        server = tunnel | {"backend": server_backend or tunnel["backend"]}
        self.lab = lab
        self.address = lab.server_ip4 if version == 4 else lab.server_ip6
        self.door = Door()
        self.dialled: list[Owner] = []
        self.context: Any = Host()
        _enter(lab, monkeypatch)
        listeners = [(index, self._listener(port)) for index, port in enumerate(PORTS)]
        with _side("server"):
            self.ports = TcpPorts(self.context, server_tunnel(**server), listeners, self.door)
        with _side("client"):
            self.diallers = TcpDiallers(self.context, client_tunnel(self.address, **tunnel))

    def _listener(self, port: int) -> socket.socket:
        listener = self.lab.socket("server", socket.AF_INET6)
        prepare(listener)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", port))
        listener.listen(64)
        return listener

    def dial(self, carrier: int = 0, port: int = 0, **how: Any) -> Owner:
        owner = Owner()
        self.dialled.append(owner)
        self.diallers.dial(carrier, (self.address, port or PORTS[carrier]), how.get("source"), owner)
        return owner

    def meet(self, carrier: int = 0) -> tuple[Owner, Owner]:
        """A wire whose both ends have proven themselves."""
        known = len(self.door.owners)
        client = self.dial(carrier)
        until(lambda: client.wire is not None or client.why != "")
        assert client.wire is not None, client.why
        client.wire.send_one(b"hello", now_us())
        until(lambda: client.came == b"welcome")
        client.came = b""
        client.wire.on_proven()
        return client, self.door.owners[known]

    def close(self) -> None:
        for each in (self.diallers, self.ports):
            each.close()
        for owner in (*self.dialled, *self.door.owners):
            if owner.wire is not None:
                owner.wire.close()


_now_in: list[Side] = ["client"]


@contextmanager
def _side(side: Side) -> Iterator[None]:
    _now_in[0] = side
    yield
    _now_in[0] = "client"


def _enter(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each end open its sockets in its own namespace."""

    def open_port(name: str, wanted: Wanted) -> FramePort:
        sock = lab.socket(wanted.side, socket.AF_PACKET, socket.SOCK_RAW, 0)
        packet.prepare(sock)
        device = find_device(sock, name)
        if wanted.backend == "packet":
            return PacketPort(sock, device, wanted.program(device))
        sock.close()
        return PcapPortInside(lab, wanted.side, device, wanted.program(device))

    def open_netlink(*, watch: bool = False) -> socket.socket:
        sock = lab.socket(_now_in[0], socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        sock.bind((0, 0x555 if watch else 0))
        sock.setblocking(not watch)
        return sock

    def dial(family: int, address: Any, *, device: str | None = None, source: str | None = None) -> socket.socket:
        sock = lab.socket("client", family)
        prepare(sock)
        sock.setblocking(False)
        if source is not None:
            sock.bind((source, 0))
        number = sock.connect_ex(address)
        if number not in (0, errno.EINPROGRESS):
            sock.close()
            raise OSError(number, os.strerror(number))
        return sock

    for backend in raw_device.BACKENDS:
        monkeypatch.setitem(raw_device.BACKENDS, backend, open_port)
    monkeypatch.setattr(next_hop, "open_netlink", open_netlink)
    monkeypatch.setattr(next_hop, "usual_devices", lambda loopback: ["eth0"])
    monkeypatch.setattr(tcp_wire, "dial", dial)


def until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    """Run the event loop until that holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "not in time"
        gevent.sleep(0.005)


def now_us() -> int:
    return time.monotonic_ns() // 1000
