"""The `packet` backend of fake-TCP ports: frames of one device, written and read with AF_PACKET.

Each frame is preceded by a `struct virtio_net_hdr` (10 bytes, native byte order), so a run of segments passes as one
frame: the kernel or the card cuts it on the way out, and receive offload merges it on the way in.

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------+---------------+-------------------------------+
    |     flags     |   gso_type    |            hdr_len            |
    +---------------+---------------+-------------------------------+
    |           gso_size            |          csum_start           |
    +-------------------------------+-------------------------------+
    |          csum_offset          | link, IP and TCP headers, ... |
    +-------------------------------+-------------------------------+

A device's link header has 14 bytes (Ethernet) or none (tun, WireGuard, IP tunnels).
"""

import errno
import fcntl
import socket
import struct
from typing import NamedTuple

from workers.io.socket_filter import attach_filter

VNET_HEADER_BYTES = 10
FRAME_BYTES_MAX = VNET_HEADER_BYTES + 18 + 65_575
"""A run with all of its headers: a link header with one VLAN tag, and an IPv6 header before what its length counts."""

SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_VNET_HDR = 15
ETH_P_ALL = 3
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33

RECEIVE_BUFFER_BYTES = 8 << 20
"""Doubled by the kernel: some 270 runs of 60 KB, where the default of 212,992 bytes holds 7."""
SEND_BUFFER_BYTES = 1 << 20
"""What may wait for the device, of all ports together: 1 ms at 10 Gbit/s."""

_SIOCGIFFLAGS, _SIOCGIFMTU, _SIOCGIFHWADDR, _SIOCGIFINDEX = 0x8913, 0x8921, 0x8927, 0x8933
_IFF_UP = 1
_NAME_BYTES_MAX = 15
_REQUEST = struct.Struct("=16s24x")  # struct ifreq
_FLAGS, _INT = struct.Struct("=16xH"), struct.Struct("=16xi")
_COUNTS = struct.Struct("=II")

# Link types (linux/if_arp.h), and the bytes of their headers as AF_PACKET shows them.
_LINK_BYTES = {
    1: 14,  # Ethernet
    772: 14,  # loopback
    0xFFFE: 0,  # none: tun, WireGuard
    519: 0,  # raw IP
    768: 0,  # IPIP
    769: 0,  # IPv6 in IPv6
    776: 0,  # SIT
}


class Device(NamedTuple):
    """A network device. number: its index. mtu: bytes of the largest IP packet. link_bytes: of its link header."""

    name: str
    number: int
    mtu: int
    link_bytes: int


def open_socket() -> socket.socket:
    """A packet socket that sees nothing yet, for `PacketPort`, which needs no right then. Raises OSError.

    It needs CAP_NET_RAW, and CAP_NET_ADMIN for buffers past net.core.rmem_max and wmem_max.
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    prepare(sock)
    return sock


def prepare(sock: socket.socket) -> None:
    """Enlarge a packet socket's buffers, which whoever has the rights does. Raises OSError."""
    _enlarge(sock, SO_RCVBUFFORCE, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    _enlarge(sock, SO_SNDBUFFORCE, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def _enlarge(sock: socket.socket, force: int, option: int, size: int) -> None:
    """Past the system's limit where that is permitted, else up to it."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, option, size)


def find_device(sock: socket.socket, name: str, *, any_link: bool = False) -> Device:
    """The device of that name, in the network namespace of `sock`. `any_link`: one with a link header that is not
    spoken here counts as one without, which is how it looks to a socket that leaves that header to the kernel.

    Raises OSError: ENODEV if there is none, ENETDOWN if it is down, EPROTONOSUPPORT for a link that is not spoken here.
    """
    if len(name.encode()) > _NAME_BYTES_MAX:
        raise OSError(errno.ENODEV, f"no device {name}")
    request = _REQUEST.pack(name.encode())
    try:
        answers = [
            fcntl.ioctl(sock.fileno(), code, request)
            for code in (_SIOCGIFINDEX, _SIOCGIFFLAGS, _SIOCGIFHWADDR, _SIOCGIFMTU)
        ]
    except OSError as error:
        raise OSError(error.errno, f"device {name}: {error.strerror}") from None
    (number,), (mtu,) = _INT.unpack_from(answers[0]), _INT.unpack_from(answers[3])
    (flags,), (link_type,) = (_FLAGS.unpack_from(answer) for answer in answers[1:3])
    if not flags & _IFF_UP:
        raise OSError(errno.ENETDOWN, f"device {name} is down")
    if link_type not in _LINK_BYTES and not any_link:
        raise OSError(errno.EPROTONOSUPPORT, f"device {name} has a link of type {link_type}, not Ethernet or plain IP")
    return Device(name, number, mtu, _LINK_BYTES.get(link_type, 0))


class PacketPort:
    """One worker's frames on one device. It never sees what it sends itself.

    link_bytes: of the link header of each frame, sent or received. truncated: frames that did not fit into the caller's
    buffer.
    """

    __slots__ = ("_recv_into", "_send", "_sock", "device", "link_bytes", "truncated")

    def __init__(self, sock: socket.socket, device: Device, program: bytes) -> None:
        """Take the socket over (`open_socket`), to see what `program` (bpf.capture) keeps. Raises OSError."""
        self._sock = sock
        self.truncated = 0
        sock.setblocking(False)
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._send = sock.sendmsg
        self._recv_into = sock.recv_into
        self.bind(device, program)

    def bind(self, device: Device, program: bytes) -> None:
        """Go over to another device, or the same after it was made anew. Raises OSError."""
        self.set_filter(program)
        # Bound last, so that nothing is seen but what passes the filter. With ETH_P_ALL the kernel takes each sent
        # frame's EtherType from the frame; with a certain one it loses the other family's runs without an error.
        self._sock.bind((device.name, ETH_P_ALL))
        self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # the end of the device before would be told again
        self.device = device
        self.link_bytes = device.link_bytes

    def fileno(self) -> int:
        return self._sock.fileno()

    def set_filter(self, program: bytes) -> None:
        """See what `program` keeps instead, from the next frame on. Raises OSError."""
        attach_filter(self._sock, program)

    def send(self, header: bytes | bytearray, payload: bytes | memoryview) -> int:
        """Send one frame or run; return the bytes of payload that were taken, -1 if it must wait, and be sent again.

        It waits for the socket to be writable, or, if it is, for a queue that is full behind it: for a millisecond.
        header: of `struct virtio_net_hdr`, link, IP and TCP.
        Raises OSError: EMSGSIZE above the device's MTU, ENETDOWN when it is down, ENXIO when it is gone (`bind` then),
        EINVAL or ENOMEM for a header that does not fit the payload.
        """
        try:
            self._send((header, payload))
        except BlockingIOError:
            return -1
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return -1
            raise
        return len(payload)

    def receive_into(self, view: memoryview) -> int:
        """Read one frame or run with its `struct virtio_net_hdr`; return its length, 0 if there is none.

        A view of FRAME_BYTES_MAX holds any; what is longer is cut.
        Raises OSError: ENETDOWN once when the device has gone down, unless `send` did; it goes on by itself when the
        device is up again.
        """
        try:
            length = self._recv_into(view, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            return 0
        if length > len(view):
            self.truncated += 1
            return len(view)
        return length

    def take_dropped(self) -> int:
        """How many frames found the receive buffer full since the last call."""
        _, dropped = _COUNTS.unpack(self._sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, _COUNTS.size))
        return int(dropped)

    def close(self) -> None:
        self._sock.close()
