"""Memory that all spray tunnels of a worker share: where datagrams are received, sealed, opened and put together."""

from workers.core import inner
from workers.core.cuts import ROOM, Datagrams
from workers.core.deduplicate import SequenceWindow
from workers.core.fragment import Reassembler
from workers.io.batch import SLOTS, Batch, Run, Slots
from workers.io.port_carrier import SprayStaging

SCRATCH_BYTES = 1 << 17
"""The most that `SprayBuffers.load` takes: a run that was handed over, or a datagram of the largest size."""
MERGED_SLOTS, MERGED_BYTES = 8, 16 << 10
"""Slots of more than MERGED_BYTES hold runs that were sent with UDP_SEGMENT: half a MiB is enough for a turn."""


class Inbox:
    """A batch with what sealing needs of it. One for each address family of a worker, shared by all sockets."""

    def __init__(self, family: int) -> None:
        self.batch = Batch(family, Slots())
        slots = self.batch.slots
        self._slots = Datagrams(slots.memory, ROOM, slots.stride)
        self._merged: dict[int, Datagrams] = {}

    @property
    def most_next(self) -> int:
        """How many slots to fill next: few where the kernel merges runs, so that a turn stays short."""
        return MERGED_SLOTS if max(self.batch.lengths, default=0) > MERGED_BYTES else SLOTS

    def source_of(self, run: Run) -> tuple[Datagrams, int, int, int, int]:
        """Where a run stands: (memory, first datagram, how many, bytes of each, bytes of the last)."""
        first, slots, size, last, _ = run
        if last <= size:
            return self._slots, first, slots, size, last
        merged = self._merged.get(first)
        if merged is None:
            merged = self._merged[first] = Datagrams(self.batch.slots.region(first))
        count = -(-last // size)
        return merged, 0, count, size, last - (count - 1) * size


class SprayBuffers:
    """What all spray sessions of a worker share. `record_max`: bytes of the largest record."""

    def __init__(self, record_max: int) -> None:
        self.record_max = record_max
        self.staging = SprayStaging()
        self.reassembler = Reassembler()
        self._scratch = Datagrams(bytearray(SCRATCH_BYTES + ROOM))

    def load(self, payload: bytes) -> Datagrams:
        """A place with room in front for datagrams that stand elsewhere, until the next call."""
        scratch = self._scratch
        scratch.view[scratch.room : scratch.room + len(payload)] = payload
        return scratch


class Assembly:
    """What one session's worker puts together of its own conversations: copies become one, and pieces a datagram."""

    __slots__ = ("_number", "_reassembler", "_windows")

    def __init__(self, number: int, reassembler: Reassembler) -> None:
        """`number`: of the session, which tells its conversations from others in the worker's `reassembler`."""
        self._number = number
        self._reassembler = reassembler
        self._windows: dict[int, SequenceWindow] = {}

    def __len__(self) -> int:
        """How many conversations have had copies."""
        return len(self._windows)

    def receive(self, kind: int, conversation: int, payload: bytes, now_us: int) -> bytes | None:
        """Take the payload of an opened COPY or FRAGMENT; the datagram that is there now, if any."""
        if kind == inner.FRAGMENT:
            key = self._number << 32 | conversation
            return self._reassembler.receive(key, inner.unpack_fragment(payload), now_us)
        sequence, datagram = inner.unpack_copy(payload)
        window = self._windows.get(conversation)
        if window is None:
            window = self._windows[conversation] = SequenceWindow()
        return datagram if window.admit(sequence) else None

    def forget(self, conversation: int) -> None:
        """The conversation is closed."""
        self._windows.pop(conversation, None)
        self._reassembler.forget(self._number << 32 | conversation)
