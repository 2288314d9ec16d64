import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from workers.shm.stats import (
    BODY_MAX,
    HEADER,
    INSTANCE_PAGE,
    NAMED_MAX,
    OTHERS,
    PAGE_BYTES,
    PAGES,
    PAST_PAGE,
    PageWriter,
    Past,
    clear_page,
    create_pages,
    named,
    read_page,
    read_workers,
)
from workers.shm.totals import FORMAT, CarrierTotals, InstanceTotals, PastTotals, TunnelTotals, WorkerTotals


@pytest.fixture
def memory() -> Iterator[int]:
    memory = create_pages()
    yield memory
    os.close(memory)


def worker(slot: int = 0, serial: int = 1, tunnels: list[TunnelTotals] | None = None, **values: Any) -> WorkerTotals:
    report = WorkerTotals(
        format=FORMAT,
        slot=slot,
        serial=serial,
        pid=100 + serial,
        state="up",
        at_s=1.0,
        every_s=1.0,
        cpu_s=0.5,
        resident_bytes=1,
        shared_bytes=1,
        arena_used_bytes=0,
        arena_bytes=1,
        lags=[0] * 12,
        lag_sum_s=0.0,
        dropped_descriptors=0,
        dropped_frames=0,
        fragments={},
        tunnels=tunnels or [],
    )
    return msgspec.structs.replace(report, **values)


def tunnel(name: str = "web", **values: Any) -> TunnelTotals:
    return TunnelTotals(name, "stripe", **values)


def total(memory: int, name: str = "web") -> int:
    """What a reader counts, in the order that the specification asks for."""
    found = read_workers(memory)
    past = read_page(memory, PAST_PAGE, PastTotals)
    folded = past.folded if past else {}
    live = [each for each in found if folded.get(each.slot) != each.serial]
    shares = [share for each in live for share in each.tunnels] + (past.tunnels if past else [])
    return sum(share.bytes_in for share in shares if share.name == name)


def test_fresh_pages_say_nothing_and_take_no_memory(memory: int) -> None:
    assert all(read_page(memory, page, WorkerTotals) is None for page in range(PAGES))
    assert (os.fstat(memory).st_size, os.fstat(memory).st_blocks) == (PAGES * PAGE_BYTES, 0)


@pytest.mark.parametrize("tunnels", [0, 1, 40, NAMED_MAX])
def test_report_is_read_as_it_was_written(memory: int, tunnels: int) -> None:
    carriers = [CarrierTotals("tcp", up=3, rtt_us=1 << 40), CarrierTotals("udp", loss=0.25)]
    shares = [tunnel(f"tunnel-{number:0>56}", bytes_in=1 << 62, carriers=carriers) for number in range(tunnels)]
    report = worker(3, 9, shares)
    PageWriter(memory, 3).write(report)
    assert read_page(memory, 3, WorkerTotals) == report
    assert read_page(memory, 2, WorkerTotals) is None and read_page(memory, 4, WorkerTotals) is None


def test_page_holds_twice_what_it_is_to_tell_apart() -> None:
    large = {field: (1 << 63) - 1 for field in TunnelTotals.__struct_fields__[2:-2]}
    kinds = [CarrierTotals(kind, *[(1 << 63) - 1] * 10, 0.1, 0.1) for kind in ("tcp", "udp")]
    dropped = dict.fromkeys(("no_port", "receiver", "exchange", "too_large", "unknown", "device"), (1 << 63) - 1)
    shares = [TunnelTotals("n" * 64, "stripe", **large, dropped=dropped, carriers=kinds)] * (NAMED_MAX + 1)
    size = len(msgspec.msgpack.encode(worker(tunnels=shares)))
    assert size < BODY_MAX, size


def test_report_that_is_too_long_is_not_written(memory: int) -> None:
    writer = PageWriter(memory, 0)
    writer.write(worker(serial=5))
    writer.write(worker(serial=6, tunnels=[tunnel(str(number) * 60) for number in range(20_000)]))
    found = read_page(memory, 0, WorkerTotals)
    assert found is not None and found.serial == 5
    assert os.pread(memory, 16, PAGE_BYTES) == bytes(16)


@pytest.mark.parametrize("at", [0, 8, 12, HEADER.size, HEADER.size + 30])
def test_damaged_page_says_nothing(memory: int, at: int) -> None:
    PageWriter(memory, 0).write(worker())
    byte = os.pread(memory, 1, at)[0]
    os.pwrite(memory, bytes([byte ^ 0x41]), at)
    assert read_page(memory, 0, WorkerTotals) is None


def test_page_of_another_format_or_kind_says_nothing(memory: int) -> None:
    PageWriter(memory, 0).write(worker(format=FORMAT + 1))
    PageWriter(memory, INSTANCE_PAGE).write(worker())
    assert read_page(memory, 0, WorkerTotals) is None
    assert read_page(memory, INSTANCE_PAGE, InstanceTotals) is None


def test_fields_of_a_later_version_are_left_out(memory: int) -> None:
    """A reader outlives an upgrade by a moment."""
    fields = [*msgspec.to_builtins(worker(serial=8)), "more", 7]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=WorkerTotals).serial == 8


def test_reader_never_takes_a_torn_report(memory: int) -> None:
    """Reports of changing length, whose numbers all say the same."""
    ended = threading.Event()

    def write() -> None:
        writer, number = PageWriter(memory, 1), 0
        while not ended.is_set():
            number += 1
            shares = [tunnel(f"t{place}", bytes_in=number, bytes_out=number) for place in range(number % 97)]
            writer.write(worker(1, number, shares, cpu_s=float(number)))

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            found = read_page(memory, 1, WorkerTotals)
            if found is not None:
                assert {found.serial, *(each.bytes_in for each in found.tunnels)} == {int(found.cpu_s)}
                assert len(found.tunnels) == found.serial % 97
                seen.add(found.serial)
    finally:
        ended.set()
        thread.join()
    assert len(seen) > 5


def test_next_worker_of_a_slot_goes_on_with_the_sequence(memory: int) -> None:
    PageWriter(memory, 0).write(worker(serial=1))
    PageWriter(memory, 0).write(worker(serial=2))
    assert HEADER.unpack(os.pread(memory, HEADER.size, 0))[0] == 2


def test_total_does_not_go_back_when_a_worker_is_reaped(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything counted twice in between."""
    past = Past(memory)
    for slot in (0, 1):
        PageWriter(memory, slot).write(worker(slot, 10 + slot, [tunnel(bytes_in=100, flows_open=4)]))
    seen = []
    monkeypatch.setattr("workers.shm.stats.clear_page", lambda *page: (seen.append(total(memory)), clear_page(*page)))
    past.fold(1)
    assert [*seen, total(memory)] == [200, 200]
    assert read_page(memory, 1, WorkerTotals) is None
    PageWriter(memory, 1).write(worker(1, 12, [tunnel(bytes_in=7)]))
    assert total(memory) == 207
    past.fold(1)
    past.fold(1)
    assert total(memory) == 207
    found = read_page(memory, PAST_PAGE, PastTotals)
    assert found is not None and [share.flows_open for share in found.tunnels] == [0]


def test_all_workers_are_found(memory: int) -> None:
    assert read_workers(memory) == []
    PageWriter(memory, INSTANCE_PAGE).write(worker())
    for slot in (127, 3, 4):
        PageWriter(memory, slot).write(worker(slot))
    assert [each.slot for each in read_workers(memory)] == [3, 4, 127]
    clear_page(memory, 4)
    assert [each.slot for each in read_workers(memory)] == [3, 127]


def test_worker_that_never_reported_leaves_nothing(memory: int) -> None:
    Past(memory).fold(5)
    assert read_page(memory, PAST_PAGE, PastTotals) is None


def test_past_goes_on_in_another_process_that_takes_the_memory_over(memory: int) -> None:
    PageWriter(memory, 0).write(worker(0, 1, [tunnel(bytes_in=5)]))
    Past(memory).fold(0)
    PageWriter(memory, 0).write(worker(0, 2, [tunnel(bytes_in=6)]))
    Past(memory).fold(0)
    assert total(memory) == 11


def test_tunnels_beyond_the_most_are_one() -> None:
    shares = [tunnel(f"t{number}", bytes_in=1, sessions=2) for number in range(NAMED_MAX + 9)]
    kept = named(shares)
    assert kept[:-1] == shares[:NAMED_MAX]
    assert (kept[-1].name, kept[-1].bytes_in, kept[-1].sessions) == (OTHERS, 9, 2)
    assert named(shares[:NAMED_MAX]) == shares[:NAMED_MAX]


def test_kinds_of_carriers_add_up() -> None:
    one, other = tunnel(), tunnel(dropped={"device": 2})
    one.kind("tcp").see(2000, 0.5, 10)
    one.kind("tcp").see(0, 0.0, 1)
    other.kind("tcp").see(1000, 0.25, 0)
    other.kind("udp").see(9, 0.0, 0)
    one.add(other)
    tcp, udp = one.carriers
    assert (tcp.up, tcp.timed, tcp.rtt_us, tcp.rtt_min_us, tcp.rtt_max_us) == (3, 2, 3000, 1000, 2000)
    assert (tcp.loss, tcp.loss_max, tcp.in_flight_bytes) == (0.75, 0.5, 11)
    assert (udp.kind, udp.up, one.dropped) == ("udp", 1, {"device": 2})
    past = one.past()
    assert [(each.kind, each.up, each.timed) for each in past.carriers] == [("tcp", 0, 0), ("udp", 0, 0)]
