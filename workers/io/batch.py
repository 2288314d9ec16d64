"""Datagrams in batches: many received by one call, and sorted into runs.

`Batch.receive` fills slots and `Batch.runs` says what stands in them. The caller watches the sockets, which are
non-blocking.

Slots, in bytes; the room lets whoever seals a datagram write a header in front of it without a copy:

    0        64                                  stride     stride + 64
    +--------+----------------------------+------+----------+-----
    |  room  | payload, up to `capacity`  | skew |   room   | ...
    +--------+----------------------------+------+----------+-----

The memory is private and anonymous, so a page exists once a datagram has reached it: a capacity of 64 KiB, which no
datagram exceeds, merged or not, costs nothing while datagrams are small.

Measured with datagrams of 1300 bytes on the loopback interface, µs each: 0.48 to receive 64 in a call, 0.58 of 16, 2.0
of one; then 0.013 for the runs of one source and size, 0.17 to 0.20 if each is of another source or size. Slots of
2 KiB are not quicker. recvfrom_into takes 1.3.
"""

import ctypes
import errno
import mmap
import os
import socket
from collections.abc import Callable
from itertools import compress, pairwise
from operator import ne
from struct import Struct
from typing import Any

from workers.io.sockaddr import key_bytes
from workers.io.sockets import ICMP_ERRORS

ROOM = 64
CAPACITY = 65536
SLOTS = 64
UDP_GRO = 104
RECEIVE_BUFFER_BYTES = 8 << 20
"""The default of 212,992 holds 99 datagrams of 1300 bytes; a worker may be away for longer than they take."""
SEND_BUFFER_BYTES = 2 << 20

Run = tuple[int, int, int, int, bytes]
"""(first slot, slots, size, bytes in the last slot, key of the source). See Batch.runs."""

_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

# struct mmsghdr of socket.h: name, its length, iovec, count, control, its length, flags; then the received length.
# 0P pads to the alignment of a pointer, as the compiler does.
_HEADER = Struct("@PIPNPNi0PI0P")
_LENGTH_AT = Struct("@PIPNPNi0P").size
_IOVEC = Struct("@PN")
# struct cmsghdr with the int of UDP_GRO.
_CONTROL = Struct("@Niii0P")
_KEY_STRIDE = 32
# With MSG_TRUNC the length is the datagram's own even when it exceeds the slot.
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_TRUNC

_WOULD_BLOCK = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.ENOBUFS, errno.ENOMEM})
_UNDELIVERED = ICMP_ERRORS | {errno.EMSGSIZE}


def _address(buffer: Any) -> int:
    """Where a buffer stands in memory. The caller keeps the buffer for as long as it uses the address."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class Slots:
    """Memory for `count` datagrams of at most `capacity` bytes. The payload of slot i begins at i * stride + ROOM."""

    __slots__ = ("capacity", "count", "memory", "stride")

    def __init__(self, count: int = SLOTS, capacity: int = CAPACITY) -> None:
        self.count = count
        self.capacity = capacity
        # An odd number of cache lines past a multiple of 4 KiB, so that slots do not share the same few cache sets.
        self.stride = (ROOM + capacity + 4095) // 4096 * 4096 + 2112
        size = self.stride * count
        self.memory = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def view(self, slot: int, length: int) -> memoryview:
        """The first `length` bytes of a slot's payload."""
        start = slot * self.stride + ROOM
        return self.memory[start : start + length]

    def region(self, slot: int) -> memoryview:
        """A whole slot: room, then payload."""
        start = slot * self.stride
        return self.memory[start : start + ROOM + self.capacity]


class Batch:
    """Receives datagrams of sockets of one address family. What it holds is valid until it receives again.

    count: how many slots the last `receive` filled; lengths: the bytes in each of them.
    too_large: datagrams left out because they exceed a slot; undelivered: errors that the kernel reported instead of
    datagrams, such as a target's port that is closed.
    """

    __slots__ = (
        "_control_view",
        "_controls",
        "_fresh_headers",
        "_header_view",
        "_headers",
        "_headers_at",
        "_iovecs",
        "_key",
        "_key_bytes",
        "_key_structs",
        "_length_view",
        "_names",
        "_no_controls",
        "_padded_key",
        "_receive",
        "count",
        "lengths",
        "slots",
        "too_large",
        "undelivered",
    )

    def __init__(self, family: int, slots: Slots | None = None) -> None:
        self.slots = slots or Slots()
        self.count = self.too_large = self.undelivered = 0
        self.lengths: list[int] = []
        self._key_bytes = key_bytes(family)
        self._key = self._padded_key = b""
        self._key_structs: dict[int, Struct] = {}
        # PyDLL keeps the interpreter's lock: these calls do not block.
        receive = ctypes.PyDLL(None, use_errno=True).recvmmsg
        receive.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
        self._receive: Callable[[int, int, int, int, None], int] = receive
        self._lay_out()

    def _lay_out(self) -> None:
        """The kernel's structures: one header, buffer, name and control message for each slot."""
        slots = self.slots
        count = slots.count
        self._names = bytearray(_KEY_STRIDE * count)
        self._controls = bytearray(_CONTROL.size * count)
        self._no_controls = bytes(self._controls)
        self._iovecs = bytearray(_IOVEC.size * count)
        self._headers = bytearray(_HEADER.size * count)
        names, controls, iovecs = _address(self._names), _address(self._controls), _address(self._iovecs)
        memory = _address(slots.memory)
        for slot in range(count):
            _IOVEC.pack_into(self._iovecs, _IOVEC.size * slot, memory + slots.stride * slot + ROOM, slots.capacity)
            name, control = names + _KEY_STRIDE * slot, controls + _CONTROL.size * slot
            iovec = iovecs + _IOVEC.size * slot
            header = (name, self._key_bytes, iovec, 1, control, _CONTROL.size, 0, 0)
            _HEADER.pack_into(self._headers, _HEADER.size * slot, *header)
        self._headers_at = _address(self._headers)
        self._fresh_headers = bytes(self._headers)
        self._header_view = memoryview(self._headers)
        self._length_view = self._header_view.cast("I")[_LENGTH_AT // 4 :: _HEADER.size // 4]
        self._control_view = memoryview(self._controls)

    def receive(self, sock: socket.socket, most: int = SLOTS) -> int:
        """Fill up to `most` slots with what waits; return how many. 0: nothing waits. Raises OSError.

        An error that belongs to a datagram sent earlier is counted and is not raised.
        """
        most = min(most, self.slots.count)
        # The kernel overwrites lengths that it also reads, and leaves alone what it has no control message for.
        self._header_view[:] = self._fresh_headers
        self._control_view[:] = self._no_controls
        count = self._receive(sock.fileno(), self._headers_at, most, _FLAGS, None)
        if count < 0:
            count = self._receive_after_error(sock, most)
        self.count = count
        self.lengths = self._length_view[:count].tolist()
        return count

    def _receive_after_error(self, sock: socket.socket, most: int) -> int:
        """Receive again, since a reported error is gone once it was read."""
        while (number := ctypes.get_errno()) not in _WOULD_BLOCK:
            if number not in _UNDELIVERED:
                raise OSError(number, os.strerror(number))
            self.undelivered += 1
            count = self._receive(sock.fileno(), self._headers_at, most, _FLAGS, None)
            if count >= 0:
                return count
        return 0

    def runs(self) -> list[Run]:
        """What was received, in order, as runs of one source and size. To be called once, since it counts `too_large`.

        (first slot, slots, size, last, key): a run of `slots` slots with a datagram of `size` bytes in each, but the
        last has `last` bytes: `size`, or fewer and at least 1, as in a send with UDP_SEGMENT. Where `last` exceeds
        `size`, there is one slot and the kernel has merged a run in it (UDP_GRO): datagrams of `size` bytes back to
        back, the last perhaps shorter, `last` bytes in all.
        """
        count = self.count
        if not count:
            return []
        names, lengths = self._names, self.lengths
        if not names.startswith(self._padded_key) or not self._key:
            self._padded_key = bytes(names[:_KEY_STRIDE])
            self._key = self._padded_key[: self._key_bytes]
        if not self._controls.startswith(self._no_controls):
            return self._merged_runs()
        size = lengths[0]
        # One memory comparison and one C loop for what is by far the most common.
        if lengths.count(size) == count and names.startswith(self._padded_key * count) and size <= self.slots.capacity:
            return [(0, count, size, size, self._key)]
        return self._plain_runs(0, count)

    def _keys(self) -> tuple[bytes, ...]:
        """The source of each slot."""
        count = self.count
        struct = self._key_structs.get(count)
        if struct is None:
            struct = Struct(f"{self._key_bytes}s{_KEY_STRIDE - self._key_bytes}x" * count)
            self._key_structs[count] = struct
        return struct.unpack_from(self._names)

    def _plain_runs(self, start: int, stop: int, keys: tuple[bytes, ...] = ()) -> list[Run]:
        """The runs of the slots from `start` to `stop`, in which nothing is merged."""
        sorts = [*zip(self.lengths, keys or self._keys(), strict=True)][start:stop]
        firsts = compress(range(start + 1, stop), map(ne, sorts[1:], sorts))
        runs: list[Run] = []
        whole, whole_end, whole_key = 0, -1, b""
        for begin, end in pairwise((start, *firsts, stop)):
            first = begin
            size, key = sorts[first - start]
            if size > self.slots.capacity:
                self.too_large += end - first
                continue
            if first == whole_end and 0 < size < whole and key == whole_key:
                begun, slots, *_ = runs[-1]
                runs[-1] = (begun, slots + 1, whole, size, key)
                first += 1
                if first == end:
                    continue  # a run with a shorter end takes no more, and `whole_end` is behind us
            runs.append((first, end - first, size, size, key))
            whole, whole_end, whole_key = size, end, key
        return runs

    def _merged_runs(self) -> list[Run]:
        """The runs where the kernel has merged some (UDP_GRO), each of which stands alone in its slot."""
        keys = self._keys()
        runs: list[Run] = []
        start = 0
        for slot in range(self.count):
            _, level, kind, size = _CONTROL.unpack_from(self._controls, _CONTROL.size * slot)
            length = self.lengths[slot]
            if level != socket.IPPROTO_UDP or kind != UDP_GRO or not 0 < size < length <= self.slots.capacity:
                continue
            if start < slot:
                runs += self._plain_runs(start, slot, keys)
            runs.append((slot, 1, size, length, keys[slot]))
            start = slot + 1
        if start < self.count:
            runs += self._plain_runs(start, self.count, keys)
        return runs


def enlarge_buffers(
    sock: socket.socket, receive_bytes: int = RECEIVE_BUFFER_BYTES, send_bytes: int = SEND_BUFFER_BYTES
) -> tuple[int, int]:
    """Ask for buffers of the kernel; return the bytes given (receive, send), which it doubles for its bookkeeping.

    Beyond net.core.rmem_max and wmem_max this takes CAP_NET_ADMIN; without it the limit is what we get.
    """
    for force, plain, size in (
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF, receive_bytes),
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF, send_bytes),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, size)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, plain, size)
    option = sock.getsockopt
    return option(socket.SOL_SOCKET, socket.SO_RCVBUF), option(socket.SOL_SOCKET, socket.SO_SNDBUF)


def prepare_datagrams(sock: socket.socket) -> bool:
    """Make a UDP socket fit for batches: non-blocking, large buffers. Whether it merges runs (UDP_GRO, Linux 5.0)."""
    sock.setblocking(False)
    enlarge_buffers(sock)
    try:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    except OSError:
        return False
    return True
