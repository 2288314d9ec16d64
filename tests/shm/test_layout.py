"""The layout of descriptors, rings and arenas: golden bytes, and every size in its class."""

import sys

import pytest

from workers.shm.layout import (
    CLASS_OF_PAGES,
    DESCRIPTOR,
    PAGE_BYTES,
    RING_BYTES,
    RING_CAPACITY,
    SLOT_BYTES,
    SLOT_MAX_BYTES,
    region_slots,
)

# Field, offset and bytes as the diagram draws them.
FIELDS = [
    ("kind", 0, 1),
    ("flags", 1, 1),
    ("tunnel", 2, 2),
    ("slot", 4, 4),
    ("session", 8, 8),
    ("flow", 16, 8),
    ("offset", 24, 8),
    ("length", 32, 4),
    ("carrier", 36, 4),
    ("value", 40, 8),
    ("value2", 48, 8),
]


def test_descriptor_is_64_bytes_and_ring_256_kib() -> None:
    assert (DESCRIPTOR.size, RING_CAPACITY, RING_BYTES) == (64, 4096, 256 << 10)


@pytest.mark.parametrize(("index", "field"), list(enumerate(FIELDS)), ids=[name for name, _, _ in FIELDS])
def test_descriptor_field_lies_where_the_diagram_says(index: int, field: tuple[str, int, int]) -> None:
    _, offset, size = field
    values = [0] * len(FIELDS)
    values[index] = (1 << 8 * size) - 1
    packed = DESCRIPTOR.pack(*values)
    assert packed == b"\0" * offset + b"\xff" * size + b"\0" * (64 - offset - size)
    assert list(DESCRIPTOR.unpack(packed)) == values


@pytest.mark.skipif(sys.byteorder != "little", reason="the vector is little-endian")
def test_descriptor_golden_vector() -> None:
    packed = DESCRIPTOR.pack(1, 2, 3, 4, 5 << 56, 6, 7 << 32, 8, 9, 10, 11)
    assert packed.hex(" ", 4) == (
        "01020300 04000000 00000000 00000005 06000000 00000000 00000000 07000000 "
        "08000000 09000000 0a000000 00000000 0b000000 00000000 00000000 00000000"
    )


@pytest.mark.parametrize("pages", range(SLOT_MAX_BYTES // PAGE_BYTES + 1))
def test_size_class_is_the_smallest_that_fits(pages: int) -> None:
    fitting = [size for size in SLOT_BYTES if size >= pages * PAGE_BYTES]
    assert SLOT_BYTES[CLASS_OF_PAGES[pages]] == fitting[0]


@pytest.mark.parametrize("payload", [4 << 10 << shift for shift in range(7)])
def test_payload_of_a_power_of_two_and_its_header_waste_less_than_a_page(payload: int) -> None:
    frame = payload + 24
    size = SLOT_BYTES[CLASS_OF_PAGES[-(-frame // PAGE_BYTES)]]
    assert frame <= size < frame + PAGE_BYTES


def test_region_holds_what_each_side_could_hold_alone() -> None:
    slots = region_slots(3 * SLOT_MAX_BYTES - 1, SLOT_MAX_BYTES)
    assert slots[7] == 2 + 1
    assert slots[0] == 3 * 65 - 1 + 65
