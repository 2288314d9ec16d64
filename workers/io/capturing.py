"""The debug option `capture`: what one worker sends and receives on the ports of one tunnel, written to a file.

Ports and sockets that are to be recorded are wrapped when they are made; without the option there is nothing on the way
of a datagram. Writing blocks, and each run is one write, so that nothing is lost with the process.

The file is made anew, readable by its owner alone. At its largest size it becomes the older file, instead of the one
that was there, and so does a file that is there at the start.
"""

import errno
import logging
import os
import socket
import time
from collections import deque
from contextlib import suppress
from io import FileIO
from pathlib import Path
from struct import Struct
from typing import Any

from workers.core.capture_file import FILE_HEADER, entry, received_entries, run_entries
from workers.core.segmenting import head_bytes, udp_head
from workers.core.tcp_header import VNET_BYTES
from workers.io.batch import ROOM, Run
from workers.io.packet import Device
from workers.io.raw_device import FramePort
from workers.io.run_sender import UDP_SEGMENT
from workers.io.segment_key import packed
from workers.io.sockaddr import SocketAddress
from workers.io.udp_socket import PortSocket, UdpWire, Way
from workers.settings import SprayTunnel

BARE_BYTES_MAX = 40 + 60
"""IP and TCP header."""
REMEMBERED = 256
"""Acknowledgements that were sent and may still be seen."""
_GSO_SIZE, _SEGMENT = Struct("=4xH"), Struct("=H")

log = logging.getLogger("forwarder.capture")


def paths_of(name: str, slot: int) -> tuple[Path, Path]:
    """The file of the worker in that slot, and the older one: kcp.pcap -> kcp.0.pcap, kcp.0.old.pcap."""
    path = Path(name)
    suffix = path.suffix or ".pcap"
    return path.with_name(f"{path.stem}.{slot}{suffix}"), path.with_name(f"{path.stem}.{slot}.old{suffix}")


class Capture:
    """One tunnel's packets. Whatever fails is told once, and ends it."""

    def __init__(self, tunnel: SprayTunnel, slot: int) -> None:
        self._tunnel = tunnel
        self._paths = paths_of(str(tunnel.capture), slot)
        self._file: FileIO | None = None
        self._bytes = 0
        try:
            self._begin()
            log.info("capture begins tunnel=%s file=%s", tunnel.name, self._paths[0])
        except OSError as error:
            self._fail(error)

    def _begin(self) -> None:
        path, older = self._paths
        self._file = None
        with suppress(FileNotFoundError):
            os.replace(path, older)
        # No link that somebody else has put there is followed.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = FileIO(descriptor, "w")
        self._bytes = 0
        self._append(FILE_HEADER)

    def write(self, entries: bytes) -> None:
        """Add packets."""
        if self._file is None:
            return
        try:
            if self._bytes + len(entries) > self._tunnel.capture_max_bytes:
                self._begin()
            self._append(entries)
        except OSError as error:
            self._fail(error)

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        written = 0
        try:
            written = self._file.write(data)
        finally:
            if written < len(data):
                self._file.truncate(self._bytes)  # no half packet at the end
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._bytes += written

    def _fail(self, error: OSError) -> None:
        self._file = None
        reason = (error.strerror or str(error)).lower()
        log.warning("capture ends tunnel=%s file=%s reason=%s", self._tunnel.name, self._paths[0], reason)

    def datagrams(self, ends: tuple[str, str], payload: memoryview, size: int) -> None:
        """Add UDP datagrams of `size` bytes back to back, the last perhaps shorter. ends: source and target."""
        (source, port), (target, target_port) = map(_address_of, ends)
        now_us = _now_us()
        pieces = []
        for start in range(0, len(payload), size or 1):
            piece = payload[start : start + size]
            pieces.append(entry(now_us, udp_head(source, target, (port, target_port), piece) + piece))
        self.write(b"".join(pieces))


def open_capture(tunnel: SprayTunnel, slot: int) -> Capture | None:
    """The capture that the tunnel wants in the worker of that slot, if it wants one."""
    return Capture(tunnel, slot) if tunnel.capture is not None else None


def _now_us() -> int:
    return time.time_ns() // 1000


def _address_of(end: str) -> tuple[bytes, int]:
    """Of an address as status shows it."""
    host, _, port = end.rpartition(":")
    return packed(host.strip("[]")), int(port)


def _likeness(packet: bytes | memoryview) -> bytes:
    """All of a bare segment that stays on its way through the kernel: addresses, numbers and options."""
    start, tcp = (12, 20) if packet[0] >> 4 == 4 else (8, 40)
    return bytes(packet[start : tcp + 16]) + bytes(packet[tcp + 20 :])


class CapturingPort:
    """A frame port, and what passes it is recorded. See FramePort.

    A capture of libpcap's shows an acknowledgement that a raw socket has sent as it does those of the kernel: it is
    recorded once.
    """

    def __init__(self, port: FramePort, capture: Capture) -> None:
        self._port = port
        self._capture = capture
        self._bare: deque[bytes] = deque(maxlen=REMEMBERED)
        self.fileno, self.set_filter, self.close = port.fileno, port.set_filter, port.close

    @property
    def device(self) -> Device:
        """See FramePort."""
        return self._port.device

    @property
    def link_bytes(self) -> int:
        """See FramePort."""
        return self._port.link_bytes

    def bind(self, device: Device, program: bytes) -> None:
        """See FramePort."""
        self._port.bind(device, program)

    def send(self, header: bytes, payload: bytes | memoryview) -> int:
        """See FramePort."""
        taken = self._port.send(header, payload)
        if taken >= 0:
            (size,) = _GSO_SIZE.unpack_from(header)
            head = header[VNET_BYTES + self.link_bytes :]
            self._capture.write(run_entries(_now_us(), head, payload[:taken], size or taken))
            if not taken:
                self._bare.append(_likeness(head))
        return taken

    def receive_into(self, view: memoryview) -> int:
        """See FramePort."""
        length = self._port.receive_into(view)
        if length:
            (size,) = _GSO_SIZE.unpack_from(view)
            packet = view[VNET_BYTES + self.link_bytes : length]
            if size or not self._is_own(packet):
                self._capture.write(received_entries(_now_us(), packet, size))
        return length

    def _is_own(self, packet: memoryview) -> bool:
        if len(packet) <= BARE_BYTES_MAX and head_bytes(packet) and (found := _likeness(packet)) in self._bare:
            self._bare.remove(found)
            return True
        return False


def captured(port: FramePort, capture: Capture | None) -> FramePort:
    """The port, and with a capture what records what passes it."""
    return port if capture is None else CapturingPort(port, capture)


class CapturingWay(Way):
    """The way to one peer, and what goes there is recorded. ends: this one and the peer's."""

    __slots__ = ("_capture", "_ends")

    def __init__(
        self, sock: socket.socket, address: SocketAddress | None, local: bytes, capture: Capture, ends: tuple[str, str]
    ) -> None:
        super().__init__(sock, address, local)
        self._capture = capture
        self._ends = ends

    def sendmsg(
        self, buffers: Any, ancillary: list[tuple[int, int, bytes]], flags: int = 0, address: object = None
    ) -> int:
        """See socket.sendmsg."""
        sent = super().sendmsg(buffers, ancillary, flags, address)
        sizes = [_SEGMENT.unpack(data)[0] for level, kind, data in ancillary if kind == UDP_SEGMENT]
        data = memoryview(b"".join(buffers))
        self._capture.datagrams(self._ends, data, sizes[0] if sizes else len(data))
        return sent


class CapturingSocket(PortSocket):
    """A port's socket, and what comes by it is recorded: a base of the sockets of either end."""

    capture: Capture

    def _hand(self, wire: UdpWire, run: Run, now_us: int) -> None:
        first, count, size, last, _ = run
        ends = wire.peer, wire.local
        start = first * self._stride + ROOM
        if last > size:
            self.capture.datagrams(ends, self._records.view[start : start + last], size)
        else:
            for length in (*(size,) * (count - 1), last):
                self.capture.datagrams(ends, self._records.view[start : start + length], length)
                start += self._stride
        super()._hand(wire, run, now_us)
