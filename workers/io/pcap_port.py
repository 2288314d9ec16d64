"""The `pcap` backend of fake-TCP ports: frames of one device captured with libpcap, and sent through raw sockets.

Captured frames are handed on as from a device without link headers, behind ten zero bytes where the `packet` backend
has its `struct virtio_net_hdr`: libpcap does not tell the size of the segments that a run was merged from. On devices
whose link it does not know, a header of its own stands in front (LINUX_SLL).

pypcap is optional, and imported when a port is opened.
"""

import errno
import importlib
import os
import select
import socket
import stat
from struct import Struct
from typing import Any

from workers.core.bpf import ETHERNET_BYTES
from workers.core.segmenting import IPV6_BYTES
from workers.core.tcp_header import VNET_BYTES
from workers.io.packet import Device
from workers.io.raw_socket import RawSocket
from workers.io.socket_filter import attach_filter

SNAPLEN = 65_440
"""With what the kernel writes in front, a frame takes 64 KiB in its ring; a larger one would take 128. Of a run that is
longer than this, the last record is lost."""
BUFFER_BYTES = 32 << 20
"""512 frames of any size, since each has a place for the longest."""

LOOPBACK = "lo"
_ETHERNET, _RAW, _LINUX_SLL = 1, 12, 113
_HEADER_BYTES = {_ETHERNET: ETHERNET_BYTES, _RAW: 0, _LINUX_SLL: 16}
"""By link type (pcap-linktype(7), as DLT_ values on Linux)."""
_RUN_SIZE = Struct("=4xH")
_NO_VNET = bytes(VNET_BYTES)


class PcapPort:
    """See `workers.io.raw_device.FramePort`.

    truncated: frames that did not fit into the caller's buffer.
    """

    link_bytes = 0

    __slots__ = ("_by_version", "_capture", "_frame", "_skip", "_waiting", "device", "truncated")

    def __init__(self, device: Device, program: bytes) -> None:
        """`program`: see bpf.capture, with `loops` for the loopback device. Raises OSError."""
        self.truncated = 0
        self._frame = b""
        self._capture: Any = None
        self._by_version: dict[int, RawSocket] = {}
        # A descriptor that stays the same when the device is opened anew.
        self._waiting = select.epoll()
        try:
            self.bind(device, program)
        except OSError:
            self.close()
            raise

    def bind(self, device: Device, program: bytes) -> None:
        """Go over to another device, or the same after it was made anew or got another MTU. Raises OSError."""
        self._let_go()
        # Whatever libpcap opens is nobody's until it is known to be in order.
        capture = _open(device.name)
        try:
            link = capture.datalink()
            if link not in _HEADER_BYTES:
                raise OSError(errno.EPROTONOSUPPORT, f"device {device.name} has a link of type {link} to libpcap")
            _filter(capture.fileno(), program)
            capture.dispatch(-1, _forget)  # what came before the filter
            name = "" if device.name == LOOPBACK else device.name
            self._by_version[4] = RawSocket(socket.AF_INET, name, device.number)
            if socket.has_dualstack_ipv6():
                self._by_version[6] = RawSocket(socket.AF_INET6, name, device.number)
            self._waiting.register(capture.fileno(), select.EPOLLIN)
        except OSError:
            capture.close()
            raise
        self._capture, self._skip, self.device = capture, _HEADER_BYTES[link], device

    def fileno(self) -> int:
        return self._waiting.fileno()

    def set_filter(self, program: bytes) -> None:
        """See PacketPort."""
        if self._capture is not None:
            _filter(self._capture.fileno(), program)

    def send(self, header: bytes | bytearray, payload: bytes | memoryview) -> int:
        """See PacketPort. What is taken of a run is whole segments."""
        sock = self._by_version.get(header[VNET_BYTES] >> 4)
        if sock is None:
            raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
        (size,) = _RUN_SIZE.unpack_from(header)
        return sock.send(bytes(header[VNET_BYTES:]), payload, size or len(payload))

    def receive_into(self, view: memoryview) -> int:
        """See PacketPort."""
        capture = self._capture
        if capture is None:
            return 0
        count = capture.dispatch(1, self._take)
        if count <= 0:
            if count < 0:
                raise OSError(errno.ENETDOWN, _text(capture.geterr()))
            return 0
        packet = memoryview(self._frame)[self._skip :]
        length = min(VNET_BYTES + len(packet), len(view))
        view[:VNET_BYTES] = _NO_VNET
        view[VNET_BYTES:length] = packet[: length - VNET_BYTES]
        if len(self._frame) >= SNAPLEN or length < VNET_BYTES + len(packet):
            self.truncated += 1
            _shorten(view[VNET_BYTES:length])
        return length

    def _take(self, time_s: float, frame: bytes) -> None:
        self._frame = frame

    def take_dropped(self) -> int:
        """How many frames found the buffer full since the device was opened."""
        return int(self._capture.stats()[1]) if self._capture is not None else 0

    def _let_go(self) -> None:
        if self._capture is not None:
            self._waiting.unregister(self._capture.fileno())
            self._capture.close()
            self._capture = None
        for sock in self._by_version.values():
            sock.close()
        self._by_version.clear()

    def close(self) -> None:
        self._let_go()
        self._waiting.close()


def _open(name: str) -> Any:
    """Begin to capture. Raises OSError."""
    try:
        pcap = importlib.import_module("pcap")
    except ImportError as error:
        raise OSError(errno.ENOSYS, f"pypcap is not installed ({error})") from None
    try:
        capture = pcap.pcap(name, snaplen=SNAPLEN, promisc=False, immediate=True, buffer_size=BUFFER_BYTES)
    except OSError as error:  # its text alone: pypcap tells no number
        raise OSError(errno.EIO, f"device {name}: {' '.join(str(error).split())}") from None
    if not stat.S_ISSOCK(os.fstat(capture.fileno()).st_mode):
        capture.close()
        raise OSError(errno.EINVAL, f"pypcap takes the file {name} in the working directory for the device")
    os.set_inheritable(capture.fileno(), False)
    capture.setnonblock(True)
    return capture


def _forget(time_s: float, frame: bytes) -> None:
    """Nobody wants it."""


def _filter(fd: int, program: bytes) -> None:
    """Give the capture's socket the filter itself: it is exact for a thousand ports and both directions, where what
    libpcap compiles from an expression compares port by port."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        attach_filter(sock, program)


def _shorten(packet: memoryview) -> None:
    """Make a packet say that it is as long as what there is of it."""
    length = len(packet)
    if packet[0] >> 4 == 4 and int.from_bytes(packet[2:4]) > length:
        packet[2:4] = length.to_bytes(2)
    elif packet[0] >> 4 == 6 and int.from_bytes(packet[4:6]) > length - IPV6_BYTES:
        packet[4:6] = (length - IPV6_BYTES).to_bytes(2)


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode(errors="replace")
