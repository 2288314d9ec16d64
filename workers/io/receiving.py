"""The receiving half of a stripe: bytes become records, and these frames.

`_on_readable` receives what there is, cuts it into records, opens each into a slot and hands it on. Memory is held
only for a record that has come in part, and when that is short, the kernel keeps such a record until it is whole.
"""

import socket

from workers.core.errors import RemoteProtocolError
from workers.core.record import LENGTH, RECORD_HEADER, SEALED_MAX_UNPROVEN, SEALED_MIN, TAG, Opener, whole_records
from workers.io.memory import SCRATCH_BYTES, Memory
from workers.shm.arena import Side


class Receiving:
    """What a stripe has received of a record. `more`: behind the frame opened last, there is more of what came."""

    __slots__ = (
        "_body",
        "_filled",
        "_head",
        "_low_water",
        "_memory",
        "_opener",
        "bytes_in",
        "closed",
        "more",
        "sock",
    )

    def __init__(self, sock: socket.socket, opener: Opener, memory: Memory) -> None:
        self.sock = sock
        self.closed = self.more = False
        self.bytes_in = 0
        self._opener = opener
        self._memory = memory
        self._low_water = 1
        self._filled = 0
        self._head = b""
        self._body: memoryview | None = None

    # Of the stripe

    def fail(self, why: str) -> None:
        """Close, because the peer or the network made it so."""
        raise NotImplementedError

    def _on_frame(self, slot: int, view: memoryview) -> None:
        """See StripeOwner.on_frame."""
        raise NotImplementedError

    def _on_turn_end(self) -> None:
        """All that was received is opened."""
        raise NotImplementedError

    # Bytes, records, frames

    def _on_readable(self) -> None:
        inbound = self._memory.inbound
        body = self._body
        if body is None and self._memory.partial_left <= 0 and self._read_whole_records():
            return
        try:
            if body is None:
                count = self.sock.recv_into(inbound)
            else:
                count = self.sock.recvmsg_into((body[self._filled :], inbound))[0]
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(str(error))
            return
        if not count:
            self._on_end()
            return
        self.bytes_in += count
        if body is not None:
            missing = len(body) - self._filled
            if count < missing:
                self._filled += count
                self._await_bytes(missing - count)
                return
            self._body = None
            count -= missing
        elif not self._head and self._low_water == 1 and self._take_alone(inbound, count):
            return
        self._take(inbound[:count], body)

    def _on_end(self) -> None:
        """The peer has ended its direction."""
        self.fail("closed by the peer")

    def _read_whole_records(self) -> bool:
        """Leave a record in the kernel until it is whole; False if the kernel cannot, or it has ended."""
        inbound = self._memory.inbound
        try:
            count = self.sock.recv_into(inbound, 0, socket.MSG_PEEK)
        except OSError:
            return False
        whole, needed = whole_records(self._head, inbound[:count], self._opener.max_sealed_bytes)
        if whole:
            try:
                self.bytes_in += self.sock.recv_into(inbound[:whole])
            except OSError as error:
                self.fail(str(error))
                return True
            self._take(inbound[:whole])
        elif not count or not needed or needed == self._low_water:
            return False
        if not self.closed:
            self._await_bytes(max(needed - whole, 1))
        return True

    def _take_alone(self, data: memoryview, count: int) -> bool:
        """Open a small record that came whole and alone, as requests and answers do; False if that is not what came.

        What `_take` does, in half the time.
        """
        length = count - RECORD_HEADER
        if not SEALED_MIN <= length <= SEALED_MAX_UNPROVEN or LENGTH.unpack_from(data)[0] != length:
            return False
        self.more = False
        view = self._memory.scratch[: length - TAG]
        try:
            self._opener.open_into(data[RECORD_HEADER:count], data[:RECORD_HEADER], view)
            self._on_frame(-1, view)
        except RemoteProtocolError as error:
            self.fail(str(error))
        self._on_turn_end()
        return True

    def _take(self, data: memoryview, body: memoryview | None = None) -> None:
        """Open all whole records: `body`, which is complete, then those in `data`; keep what is left."""
        try:
            if body is not None:
                self.more = len(data) > 0
                head, self._head = self._head, b""
                try:
                    self._open(body, head)
                finally:
                    self._memory.give_back_partial(body)
            self._take_records(data)
        except RemoteProtocolError as error:
            self.fail(str(error))
        self._on_turn_end()

    def _take_records(self, data: memoryview) -> None:
        position, count = 0, len(data)
        head, self._head = self._head, b""
        while not self.closed:
            if position == count and not head:
                self._await_bytes(1)
                return
            if len(head) < RECORD_HEADER:
                need = RECORD_HEADER - len(head)
                head += bytes(data[position : position + need])
                position += need
                if len(head) < RECORD_HEADER:
                    self._head = head
                    self._await_bytes(1)
                    return
            (length,) = LENGTH.unpack(head)
            self._opener.check_length(length)
            end = position + length
            if end > count:
                self._head = head
                self._body = self._memory.take_partial(length)
                self._filled = count - position
                self._body[: self._filled] = data[position:]
                self._await_bytes(end - count)
                return
            self.more = end < count
            self._open(data[position:end], head)
            position, head = end, b""

    def _await_bytes(self, missing: int) -> None:
        """Wake up for what completes a record, not for every segment of it: a third less CPU on a slow stripe."""
        if missing != self._low_water:
            self._low_water = missing
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, missing)
            except OSError as error:
                self.fail(str(error))

    def _open(self, body: memoryview, head: bytes) -> None:
        memory = self._memory
        length = len(body) - TAG
        slot = -1
        if length <= SCRATCH_BYTES:
            view = memory.scratch[:length]
        else:
            slot = memory.arena.allocate(length, Side.INGRESS)
            view = memory.arena.view(slot, length) if slot >= 0 else memory.spare[:length]
        try:
            self._opener.open_into(body, head, view)
        except RemoteProtocolError:
            if slot >= 0:
                memory.arena.release(slot)
            raise
        if slot < 0 and length > SCRATCH_BYTES:
            memory.dropped_frames += 1  # no slot: the sender keeps the frame and sends it again
            return
        self._on_frame(slot, view)

    def _drop_partial(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            self._memory.give_back_partial(body)
