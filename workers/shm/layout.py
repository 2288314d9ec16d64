"""What lies where in shared memory: the specification of arenas and rings.

Everything is in native byte order and never leaves the machine. Network-order `struct` formats write byte by byte.

Ring: one per ordered pair of workers
-------------------------------------
A memfd of RING_CAPACITY descriptors, used in a circle from index 0. The producer alone writes the memory; the consumer
maps it read-only. Neither position is in shared memory: each side keeps its own, and two eventfds carry the
differences.

    memory       64 bytes each: | 0 | 1 | 2 | ... | 4095 |            writer: producer
    published    eventfd: descriptors written and not yet noticed      adds: producer, takes: consumer
    freed        eventfd: descriptors read, which may be overwritten   adds: consumer, takes: producer

At birth both eventfds are 0 and the producer holds all descriptors. At any moment

    producer's space + pending + published + consumer's untaken + taken and not yet told + freed = RING_CAPACITY,

so a count that would make the sum larger proves that the other side is broken.

A descriptor (writer of every field: the producer, before it adds to `published`):

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------+---------------+-------------------------------+
  0 |     kind      |     flags     |            tunnel             |
    +---------------+---------------+-------------------------------+
  4 |                             slot                              |
    +---------------------------------------------------------------+
  8 |                           session (64)                        |
    +---------------------------------------------------------------+
 16 |                            flow (64)                          |
    +---------------------------------------------------------------+
 24 |                           offset (64)                         |
    +---------------------------------------------------------------+
 32 |                            length                             |
    +---------------------------------------------------------------+
 36 |                            carrier                            |
    +---------------------------------------------------------------+
 40 |                            value (64)                         |
    +---------------------------------------------------------------+
 48 |                           value2 (64)                         |
    +---------------------------------------------------------------+
 56 |                    not used, never written (64)               |
    +---------------------------------------------------------------+

    kind      what the descriptor asks for; it decides which other fields, and which flags, mean anything
    tunnel    index of the tunnel in the configuration
    slot      handle of a slot, in the arena that `kind` implies; rejected by ArenaView.view if outside
    session   session id
    flow      flow id
    offset    a byte's place in the stream
    length    bytes in the slot, 0..SLOT_MAX_BYTES; rejected by ArenaView.view if beyond the arena
    carrier   carrier index
    value     two numbers for the kind to use
    value2

Arena: one per worker
---------------------
A sparse memfd: a page takes memory from the first write until it is punched out. Only the owner allocates. A slot
belongs to one of eight size classes for ever, and every class has a region of its own, in this order:

    class             0      1      2      3      4      5      6      7
    slot, pages       1      2      3      5      9     17     33     65
    fits, KiB         4      4+     8+    16+    32+    64+   128+   256+      (+: and a header)
    region, slots     ingress_bytes // slot_bytes + egress_bytes // slot_bytes

A payload of a power of two with a frame header in front costs one page more than the payload, not twice as much.
A slot's handle is its offset in pages of 4096 bytes, so slots never share a page and can be punched out.

    slot's bytes         writer: the owner; once lent, nobody until all borrowers gave it back
    all bookkeeping      private memory of the owner
"""

import struct
from typing import Final

PAGE_BYTES: Final = 4096
PAGE_SHIFT: Final = 12

INGRESS_BYTES: Final = 1 << 30
EGRESS_BYTES: Final = 512 << 20
"""Quotas of an arena. They bound what slots may occupy, not what does: unused memory has no pages."""

RING_CAPACITY: Final = 4096
DESCRIPTOR: Final = struct.Struct("=BBHIQQQIIQQ8x")
RING_BYTES: Final = RING_CAPACITY * DESCRIPTOR.size

# kind, flags, tunnel, slot, session, flow, offset, length, carrier, value, value2
Descriptor = tuple[int, int, int, int, int, int, int, int, int, int, int]

SLOT_PAGES: Final = (1, 2, 3, 5, 9, 17, 33, 65)
SLOT_BYTES: Final = tuple(pages * PAGE_BYTES for pages in SLOT_PAGES)
SLOT_MAX_BYTES: Final = SLOT_BYTES[-1]

# Size class by pages needed, 0..65.
CLASS_OF_PAGES: Final = bytes(
    next(index for index, pages in enumerate(SLOT_PAGES) if pages >= needed) for needed in range(SLOT_PAGES[-1] + 1)
)


def region_slots(ingress_bytes: int, egress_bytes: int) -> tuple[int, ...]:
    """How many slots each class has under these quotas: as many as both sides could ever hold at once."""
    return tuple(ingress_bytes // size + egress_bytes // size for size in SLOT_BYTES)
