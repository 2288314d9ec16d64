"""Pages of statistics: what each worker, and the supervisor, has to say, for a process that only reads.

One sparse memfd, of PAGES pages of PAGE_BYTES each, in native byte order. The supervisor makes it before the first
fork; every process inherits the descriptor and writes its own page alone:

    page        0 .. 127                        128                   129
    holds       WorkerTotals of that slot       InstanceTotals        PastTotals
    writer      the worker in the slot; once    supervisor            supervisor
                it is reaped, the supervisor

A page (writer of every field: the page's):

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------------------------------------------------------+
  0 |                        sequence (64)                          |
    |                                                               |
    +---------------------------------------------------------------+
  8 |                          length                               |
    +---------------------------------------------------------------+
 12 |                           CRC                                 |
    +---------------------------------------------------------------+
 16 |                 body, `length` bytes, msgpack                 |
    |                             ...                               |
    +---------------------------------------------------------------+

    sequence  of this report, from 1 with each writer; 0: nothing was written, or it was cleared
    length    of the body, 1..BODY_MAX; anything else is rejected
    CRC       CRC-32 of sequence, length and body. A reader that meets a report which is just being written finds
              another, and reads again

Nobody maps it: a report is one `pwrite`, a look at it one or two `pread`s. Where memory is short these fail with an
error, while touching a mapping would be a SIGBUS.

When a worker was reaped its counters go on in PastTotals, so that no sum goes backwards: the supervisor adds them there
(`fold`), with the worker's serial, and then clears the page. A reader takes the workers' pages first and PastTotals
last, and leaves out a worker whose serial stands there: whenever it looks, it counts each of them once.
"""

import contextlib
import os
import struct
import zlib
from typing import TypeVar

import msgspec

from workers.shm.totals import FORMAT, InstanceTotals, PastTotals, TunnelTotals, WorkerTotals, add_by_name

SLOTS = 128
INSTANCE_PAGE, PAST_PAGE = SLOTS, SLOTS + 1
PAGES = SLOTS + 2
PAGE_BYTES = 1 << 20
HEADER = struct.Struct("=QII")
BODY_MAX = PAGE_BYTES - HEADER.size
NAMED_MAX = 1024
"""Tunnels that a page tells apart: of 1024 with the longest names and largest numbers it is not half full."""
OTHERS = "(others)"
"""The name of all the rest together, which no tunnel can have."""

FIRST_BYTES = 8192
"""Read at once; what is longer takes a second look."""
TRIES = 16

_CHECKED = struct.Struct("=QI")
_ENCODER = msgspec.msgpack.Encoder()

Report = TypeVar("Report", WorkerTotals, InstanceTotals, PastTotals)


def create_pages() -> int:
    """The memfd; the caller owns the descriptor. Raises OSError."""
    memory = os.memfd_create("forwarder-stats", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, PAGES * PAGE_BYTES)
    except OSError:
        os.close(memory)
        raise
    return memory


class PageWriter:
    """The one writer of a page. Goes on with the sequence that it finds, so that a reader sees each report as new."""

    def __init__(self, memory: int, page: int) -> None:
        """`memory` stays the caller's."""
        assert 0 <= page < PAGES
        self._memory = memory
        self._page = page
        self._sequence = HEADER.unpack(os.pread(memory, HEADER.size, page * PAGE_BYTES))[0]

    def write(self, report: WorkerTotals | InstanceTotals | PastTotals) -> None:
        """Replaces the page's report. One that is too long is not written. Raises OSError."""
        body = _ENCODER.encode(report)
        if len(body) > BODY_MAX:
            return
        self._sequence += 1
        checked = zlib.crc32(body, zlib.crc32(_CHECKED.pack(self._sequence, len(body))))
        os.pwrite(self._memory, HEADER.pack(self._sequence, len(body), checked) + body, self._page * PAGE_BYTES)


def clear_page(memory: int, page: int) -> None:
    """The page says nothing any more, as its writer is gone."""
    with contextlib.suppress(OSError):
        os.pwrite(memory, bytes(HEADER.size), page * PAGE_BYTES)


def read_page(memory: int, page: int, kind: type[Report]) -> Report | None:
    """What the page says, whole and as it was written; None if that is nothing, or nothing of this format."""
    body = _read_body(memory, page * PAGE_BYTES)
    if body is None:
        return None
    try:
        report = msgspec.msgpack.decode(body, type=kind)
    except (ValueError, RecursionError):
        return None
    return report if report.format == FORMAT else None


def _read_body(memory: int, at: int) -> bytes | None:
    for _ in range(TRIES):
        data = os.pread(memory, FIRST_BYTES, at)
        sequence, length, checksum = HEADER.unpack_from(data)
        if not sequence:
            return None
        if not 0 < length <= BODY_MAX:
            continue
        body = data[HEADER.size : HEADER.size + length]
        if len(body) < length:
            body += os.pread(memory, length - len(body), at + len(data))
        if zlib.crc32(body, zlib.crc32(_CHECKED.pack(sequence, length))) == checksum:
            return body
    return None


def read_workers(memory: int) -> list[WorkerTotals]:
    """The reports of all workers there are, by slot. Skips what was never written, so that few pages are looked at."""
    found, at = [], 0
    while at < SLOTS * PAGE_BYTES:
        try:
            at = os.lseek(memory, at, os.SEEK_DATA)
        except OSError:  # there is none further on
            break
        slot = at // PAGE_BYTES
        report = read_page(memory, slot, WorkerTotals) if slot < SLOTS else None
        if report is not None:
            found.append(report)
        at = (slot + 1) * PAGE_BYTES
    return found


class Past:
    """What workers that are gone have counted, as the supervisor keeps it. `memory` stays the caller's."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        found = read_page(memory, PAST_PAGE, PastTotals)
        self._folded = found.folded if found else {}
        self._tunnels = {tunnel.name: tunnel for tunnel in found.tunnels} if found else {}
        self._writer = PageWriter(memory, PAST_PAGE)

    def fold(self, slot: int) -> None:
        """The worker of that slot was reaped: take its last report in and clear its page. Raises OSError."""
        last = read_page(self._memory, slot, WorkerTotals)
        if last is None or self._folded.get(slot) == last.serial:
            return
        self._folded[slot] = last.serial
        for share in last.tunnels:
            name = share.name
            if name not in self._tunnels and len(self._tunnels) >= NAMED_MAX:
                name = OTHERS
            add_by_name(self._tunnels, msgspec.structs.replace(share.past(), name=name))
        self._writer.write(PastTotals(FORMAT, self._folded, list(self._tunnels.values())))
        clear_page(self._memory, slot)


def named(shares: list[TunnelTotals]) -> list[TunnelTotals]:
    """As many as a page tells apart, the first ones of the list, and the rest in one."""
    if len(shares) <= NAMED_MAX:
        return shares
    others = TunnelTotals(OTHERS, "")
    for share in shares[NAMED_MAX:]:
        others.add(share)
    return [*shares[:NAMED_MAX], others]
