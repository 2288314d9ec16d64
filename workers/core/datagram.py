"""Records of a port: how datagrams travel in UDP datagrams or in the payload of a fake TCP connection.

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-------------------------------+-------------------------------+
    |       length (in clear)       |                               |
    +-------------------------------+                               +
    |              counter (64 bits, in clear)                      |
    +                               +-------------------------------+
    |                               |                               |
    +-------------------------------+                               +
    |        inner: kind and what follows it, encrypted, 1.. bytes  |
    |                              ...                              |
    +---------------------------------------------------------------+
    |                       tag (16 bytes)                          |
    +---------------------------------------------------------------+

- Big-endian. Records stand back to back; none goes on in another segment or UDP datagram.
- Length: bytes that follow it, 25 to 16,384, so a record never begins like a handshake (F7 46). A record with another
  length, or one that reaches beyond the end, is rejected with all that follows it in its segment.
- Counter: of the record in its direction of its port, from 0. A record may be lost or overtaken; one that was opened
  before, or is 65,536 or more behind the highest opened, is dropped. Length and counter are the associated data.
- Nonce: 32 zero bits, then the counter: big-endian for AES-256-GCM, little-endian for ChaCha20-Poly1305.
- Keys: one per direction, from the handshake. A key is for 2^22 counters (the generation is counter >> 22) and then
  replaced by REKEY of Noise section 4.2. Taken are the generation of the highest counter opened, the one before and
  the one after it.

A record of the wrong size for its kind, or of an unknown kind, is rejected; see `core.inner` for the kinds.

Measured, in µs a datagram of 1300 bytes in runs of 44, of which AES alone takes 0.68:
- Sealing 0.85 (0.67 for 64 bytes): the prefix is written in front of each datagram where it lies, over the end of the
  one before if that is where it lies. A copy behind the prefix: 0.91 in a sketch that came to 0.90 this way; with fresh
  slices 1.07. One by itself: 1.3.
- Opening 0.87 (0.70 for 64 bytes): into scratch memory, whence one join takes the payloads. In place from the last to
  the first, each over the prefix of the next, 0.83 in a sketch that came to 0.79 this way; saving what a prefix covers
  0.89; with fresh slices 1.05. One by itself: 2.2.
"""

from collections.abc import Sequence
from sys import byteorder

from cryptography.exceptions import InvalidTag

from workers.core.cuts import WORD_BYTES, Datagrams, Inners, Records
from workers.core.generations import GENERATION_SHIFT, Generations
from workers.core.heads import (
    HEAD,
    HEAD_BYTES,
    LENGTH_BYTES,
    NONCE_ROWS,
    RECORD_OVERHEAD,
    RUN_MAX,
    counters_of,
    equal_records,
    write_heads,
)
from workers.core.inner import PREFIX_BYTES, Bytes, Gathered, Opened, opened_of
from workers.core.noise import NONCES, Aead, Suite
from workers.core.replay import ReplayWindow

LENGTH_MAX = 16_384
DATA_OVERHEAD = RECORD_OVERHEAD + PREFIX_BYTES
RECORD_MIN = RECORD_OVERHEAD + 1
RECORD_MAX = LENGTH_BYTES + LENGTH_MAX

# Below this, records opened one by one cost less than the preparations for a run.
_RUN_MIN = 4


def record_bytes(datagram_bytes: int) -> int:
    """Bytes of the DATA record of a datagram."""
    return datagram_bytes + DATA_OVERHEAD


class DatagramSealer:
    """Seals the records of one direction of a port. `next_counter`: records so far."""

    __slots__ = ("_generations", "_nonces", "_pack_nonce", "_rekey_at", "next_counter")

    def __init__(self, key: bytes, suite: Suite, generation_shift: int = GENERATION_SHIFT) -> None:
        self._nonces = NONCE_ROWS[suite]
        self._pack_nonce = NONCES[suite].pack
        self._generations = Generations(key, suite, generation_shift)
        self._rekey_at = 1 << generation_shift
        self.next_counter = 0

    def seal_into(self, inner: Bytes, out: memoryview) -> int:
        """Write the record of `inner` (1 byte or more) to the start of `out`; return its length.

        The two may not overlap. Neither is kept.
        """
        counter = self.next_counter
        if counter == self._rekey_at:
            self._rekey_at += 1 << self._generations.shift
            self._generations.advance()
        self.next_counter = counter + 1
        record = len(inner) + RECORD_OVERHEAD
        assert RECORD_MIN <= record <= RECORD_MAX
        head = HEAD.pack(record - LENGTH_BYTES, counter)
        out[:HEAD_BYTES] = head
        self._generations.aead.encrypt_into(self._pack_nonce(counter), inner, head, out[HEAD_BYTES:record])
        return record

    def seal_run(
        self, prefix: bytes, run: Datagrams, length: int, size: int, out: Records, start: int = 0, first: int = 0
    ) -> int:
        """Seal `length` bytes of datagrams of `size` bytes back to back, the last as long as is left; return the bytes.

        prefix: `inner.data_prefix`. out: takes the records, from `start` on. A length of 0 is one empty datagram.
        first: the datagram to begin with, where a run is sealed in parts, which has to be in order.
        """
        if length <= size:
            return self._seal_one(prefix, run.view, run.position(size, first), length, out, start)
        count, last = divmod(length, size)
        sealed = self._seal_equal(prefix, run, first, count, size, out, start)
        if last:
            sealed += self._seal_one(prefix, run.view, run.position(size, first + count), last, out, start + sealed)
        return sealed

    def seal_slots(
        self,
        prefix: bytes,
        slots: Datagrams,
        first: int,
        count: int,
        size: int,
        last: int,
        out: Records,
        start: int = 0,
    ) -> int:
        """Seal the datagrams in `count` slots from `first` on, of `size` bytes each but for `last` in the last one.

        As `seal_run` otherwise.
        """
        assert last <= size <= slots.stride - WORD_BYTES
        if last == size:
            return self._seal_equal(prefix, slots, first, count, size, out, start)
        sealed = self._seal_equal(prefix, slots, first, count - 1, size, out, start)
        position = slots.position(size, first + count - 1)
        return sealed + self._seal_one(prefix, slots.view, position, last, out, start + sealed)

    def _seal_equal(
        self, prefix: bytes, source: Datagrams, first: int, count: int, size: int, out: Records, start: int
    ) -> int:
        """Seal datagrams of one size."""
        record = size + DATA_OVERHEAD
        end = start + count * record
        assert record <= RECORD_MAX
        assert end <= len(out.view)
        done = 0
        while done < count:
            if count - done == 1:
                self._seal_one(prefix, source.view, source.position(size, first + done), size, out, end - record)
                break
            taken = self._take(min(count - done, RUN_MAX))
            position = start + done * record
            self._nonces.pack(range(self.next_counter - taken, self.next_counter))
            write_heads(out.view, position, record, self.next_counter - taken, taken)
            heads, bodies = out.columns(start, record, done + taken)
            fronts, plains = source.columns(0, size, first + done + taken)
            if done:
                heads, bodies = heads[done:], bodies[done:]
            begin, done = first + done, done + taken
            self._seal_rows(prefix, fronts[begin : begin + taken], plains[begin:], heads, bodies)
        return end - start

    def _seal_rows(
        self,
        prefix: bytes,
        fronts: Sequence[memoryview],
        plains: Sequence[memoryview],
        heads: Sequence[memoryview],
        bodies: Sequence[memoryview],
    ) -> None:
        """Seal as many datagrams as there are fronts, with the nonces packed last."""
        word = int.from_bytes(bytes(WORD_BYTES - PREFIX_BYTES) + prefix, byteorder)
        encrypt_into = self._generations.aead.encrypt_into
        # In this order: each prefix but the first may go over the end of the datagram before it.
        for front, plain, nonce, head, body in zip(fronts, plains, self._nonces.rows, heads, bodies, strict=False):
            front[0] = word
            encrypt_into(nonce, plain, head, body)

    def _seal_one(self, prefix: bytes, view: memoryview, position: int, size: int, out: Records, start: int) -> int:
        """Seal the datagram at `position` of `view`, in front of which there is room for the prefix."""
        plain = view[position - PREFIX_BYTES : position + size]
        plain[:PREFIX_BYTES] = prefix
        return self.seal_into(plain, out.view[start:])

    def _take(self, most: int) -> int:
        """Use up to `most` counters, as many as are left under one key: how many, the last being next_counter - 1."""
        counter = self.next_counter
        if counter == self._rekey_at:
            self._rekey_at += 1 << self._generations.shift
            self._generations.advance()
        taken = min(most, self._rekey_at - counter)
        # Before they are used: none is used twice, whatever happens.
        self.next_counter = counter + taken
        return taken


class DatagramOpener:
    """Opens the records of one direction of a port. It raises for nothing that a peer or a forger may send.

    opened: records with a good tag. highest: the highest counter of those, -1 before the first.
    rejected: pieces that are no record, or have a bad tag or a malformed inner. replayed: opened before, or too old.
    """

    __slots__ = ("_generations", "_inners", "_nonces", "_pack_nonce", "_window", "opened", "rejected", "replayed")

    def __init__(self, key: bytes, suite: Suite, inners: Inners, generation_shift: int = GENERATION_SHIFT) -> None:
        """`inners`: scratch memory, which all openers of a worker may share."""
        self._nonces = NONCE_ROWS[suite]
        self._pack_nonce = NONCES[suite].pack
        self._inners = inners
        self._generations = Generations(key, suite, generation_shift)
        self._window = ReplayWindow()
        self.opened = self.rejected = self.replayed = 0

    @property
    def highest(self) -> int:
        """The highest counter opened."""
        return self._window.highest

    def open_run(self, records: Records, start: int, end: int, hint: int = 0) -> list[Opened]:
        """What the records from `start` to `end` carry; those that do not open are counted and passed over.

        hint: size of the segments that were merged to this (gso_size), 0 if unknown. After a record that does not open,
        the next segment is a place to go on.
        """
        view = records.view
        if RECORD_MIN <= end - start <= RECORD_MAX:
            length, counter = HEAD.unpack_from(view, start)
            if length == end - start - LENGTH_BYTES and (not hint or end - start <= hint):
                return self._open_only(view, start, end - start, counter)
        gathered = Gathered(RUN_MAX)
        position = start
        while end - position >= RECORD_MIN:
            length, counter = HEAD.unpack_from(view, position)
            record = length + LENGTH_BYTES
            border = min(end, position - (position - start) % hint + hint) if hint else end
            if not RECORD_MIN <= record <= min(RECORD_MAX, end - position):
                self.rejected += 1
                position = border
                continue
            limit = end if record == hint else border
            count = min((limit - position) // record, RUN_MAX, len(self._inners.view) // record)
            if count >= _RUN_MIN:
                count = equal_records(view, position, record, count)
            if count >= _RUN_MIN:
                self._open_equal(records, start, position, record, counters_of(view, position, record, count), gathered)
                position += count * record
            elif self._open_into(gathered, view, position, record, counter):
                position += record
            else:
                position = min(position + record, border)
        if position < end:
            self.rejected += 1
        gathered.flush()
        return gathered.opened

    def _open_only(self, view: memoryview, start: int, record: int, counter: int) -> list[Opened]:
        """Open what is a single record, without the means for many."""
        inner = self._open_one(view, start, record, counter)
        if inner is None:
            return []
        opened = opened_of(inner, record)
        if opened is None:
            self.rejected += 1
            return []
        return [opened]

    def _open_into(self, gathered: Gathered, view: memoryview, position: int, record: int, counter: int) -> bool:
        """Open one record and gather its inner; whether it had a good tag."""
        inner = self._open_one(view, position, record, counter)
        if inner is None:
            return False
        if not gathered.take(inner, record):
            self.rejected += 1
        return True

    def _open_one(self, view: memoryview, position: int, record: int, counter: int) -> bytes | None:
        """The inner of a record; None, and counted, if it has none for us."""
        if not self._window.is_fresh(counter):
            self.replayed += 1
            return None
        generations = self._generations
        ahead = (counter >> generations.shift) - generations.generation
        aead = generations.aead_of(ahead)
        if aead is None:
            self.rejected += 1
            return None
        body = position + HEAD_BYTES
        try:
            inner = aead.decrypt(self._pack_nonce(counter), view[body : position + record], view[position:body])
        except InvalidTag:
            self.rejected += 1
            return None
        self.opened += 1
        self._window.mark(counter)
        if ahead > 0:
            generations.advance()
        return inner

    def _open_equal(
        self, records: Records, start: int, position: int, record: int, counters: Sequence[int], gathered: Gathered
    ) -> None:
        """Open the records at `position`, all of one size, with these counters."""
        count = len(counters)
        ahead = self._ahead_of_all(counters)
        aead = None if ahead is None else self._generations.aead_of(ahead)
        if ahead is None or aead is None:
            for index, counter in enumerate(counters):
                self._open_into(gathered, records.view, position + index * record, record, counter)
            return
        # The run at hand is of views into the memory that is about to be written.
        gathered.flush()
        if (position - start) % record:
            start = position
        skipped = (position - start) // record
        heads, bodies = records.columns(start, record, skipped + count)
        inners, prefixes, payloads = self._inners.columns(0, record - RECORD_OVERHEAD, count)
        self._nonces.pack(counters)
        failed = _open_rows(aead, self._nonces.rows, inners[:count], heads[skipped:], bodies[skipped:])
        self._mark(counters, failed)
        if ahead > 0 and len(failed) < count:
            self._generations.advance()
        if failed:
            kept = [index for index in range(count) if index not in failed]
            inners, prefixes, payloads = ([column[i] for i in kept] for column in (inners, prefixes, payloads))
            count = len(kept)
        self.rejected += gathered.take_equal(inners[:count], prefixes[:count], payloads[:count])

    def _mark(self, counters: Sequence[int], failed: set[int]) -> None:
        self.opened += len(counters) - len(failed)
        self.rejected += len(failed)
        if isinstance(counters, range) and not failed:
            self._window.mark_run(counters[0], len(counters))
            return
        for index, counter in enumerate(counters):
            if index not in failed:
                self._window.mark(counter)

    def _ahead_of_all(self, counters: Sequence[int]) -> int | None:
        """By how many generations the counters are ahead; None if they are of two, or if any is not fresh."""
        if isinstance(counters, range):
            low, high = counters[0], counters[-1]
            fresh = self._window.fresh_run(low, len(counters))
        else:
            low, high = min(counters), max(counters)
            fresh = len(set(counters)) == len(counters) and all(map(self._window.is_fresh, counters))
        generations = self._generations
        generation = low >> generations.shift
        return generation - generations.generation if fresh and generation == high >> generations.shift else None


def _open_rows(
    aead: Aead,
    nonces: Sequence[memoryview],
    inners: Sequence[memoryview],
    heads: Sequence[memoryview],
    bodies: Sequence[memoryview],
) -> set[int]:
    """Open as many records as there are inners; which of them have a bad tag."""
    failed = set()
    decrypt_into = aead.decrypt_into
    for inner, nonce, head, body in zip(inners, nonces, heads, bodies, strict=False):
        try:
            decrypt_into(nonce, body, head, inner)
        except InvalidTag:
            failed.add(next(index for index, other in enumerate(inners) if other is inner))
    return failed
