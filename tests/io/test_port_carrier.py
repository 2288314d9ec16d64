"""One port: what it seals, opens, counts and answers. Its owner and its wire are the test's."""

from typing import Any

import pytest

from tests.io.spray_net import FakeWire
from workers.core import inner
from workers.core.cuts import ROOM, Datagrams, Records
from workers.core.datagram import DATA_OVERHEAD, DatagramOpener, DatagramSealer
from workers.core.heads import RECORD_OVERHEAD, RUN_MAX
from workers.core.inner import Opened
from workers.core.noise import Suite
from workers.core.port import Port, PortSettings
from workers.core.port_state import State
from workers.io import port_carrier
from workers.io.port_carrier import PortCarrier, SprayStaging

KEYS = bytes(range(32)), bytes(range(32, 64))
SUITE = Suite.AES256GCM
PREFIX = inner.data_prefix(7)


class Side:
    """One end of a port, its session and its wire; `came`: what it was given, `events`: what it was told."""

    def __init__(self, clock: "Clock", accepted: bool) -> None:
        self.wire = FakeWire(clock, "udp", "a:1", "b:2")  # type: ignore[arg-type]
        self.staging = SprayStaging()
        ours, theirs = KEYS[::-1] if accepted else KEYS
        keys = DatagramSealer(ours, SUITE), DatagramOpener(theirs, SUITE, self.staging.inners)
        self.port = Port(3, PortSettings(most_bytes=1472), clock.now_us, lambda: 1.0, accepted=True)
        self.carrier = PortCarrier(3, self.wire, self.port, keys, self.staging, self)
        self.wire.owner = self.carrier
        self.came: list[Opened] = []
        self.events: list[str] = []

    def on_opened(self, carrier: PortCarrier, opened: Opened, now_us: int) -> None:
        self.came.append(opened)

    def on_room(self, carrier: PortCarrier) -> None:
        self.events.append("room")

    def on_up(self, carrier: PortCarrier) -> None:
        self.events.append("up")

    def on_lost(self, carrier: PortCarrier) -> None:
        self.events.append("lost")

    def on_unknown(self, carrier: PortCarrier, records: Records, start: int, end: int, now_us: int) -> None:
        self.events.append(f"unknown {end - start}")


class Clock:
    """The time, and what stands for a net: nothing arrives by itself."""

    def __init__(self) -> None:
        self.now_us = 50_000_000
        self.queue: list[Any] = []
        self.loses = lambda wire, payload: True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(port_carrier, "clock_us", lambda: clock.now_us)
    return clock


@pytest.fixture
def ends(clock: Clock) -> tuple[Side, Side]:
    return Side(clock, False), Side(clock, True)


def deliver(payload: bytes, there: Side, now_us: int, hint: int = 0) -> None:
    records = Records(bytearray(ROOM) + payload)
    there.carrier.on_payload(there.wire, records, ROOM, ROOM + len(payload), hint, now_us)


def pass_all(here: Side, there: Side, now_us: int) -> None:
    """What `here` has sent arrives."""
    sent, here.wire.sent = here.wire.sent, []
    for payload in sent:
        deliver(payload, there, now_us)


def run(count: int, size: int) -> Datagrams:
    return Datagrams(bytearray(ROOM) + b"".join(b"%c" % number * size for number in range(count)))


def test_first_record_proves_the_port_and_a_run_arrives_as_one(ends: tuple[Side, Side], clock: Clock) -> None:
    here, there = ends
    left = here.carrier.send_datagrams(PREFIX, run(5, 100), 0, 5, 100, 40, clock.now_us)
    assert left == (5, 4 * (100 + DATA_OVERHEAD) + 40 + DATA_OVERHEAD)
    pass_all(here, there, clock.now_us)
    pass_all(here, there, clock.now_us)
    payload = b"".join(b"%c" % number * 100 for number in range(5))[:440]
    assert there.came == [Opened(inner.DATA, 7, 100, payload)]
    assert there.events == ["up"] and there.wire.calls == ["opened", "proven"] and there.carrier.proven
    assert (here.carrier.bytes_out, there.carrier.bytes_in) == (440, 440)
    assert (there.port.received_records, there.port.highest) == (5, 4)


def test_slots_are_sealed_where_they_stand(ends: tuple[Side, Side], clock: Clock) -> None:
    here, there = ends
    stride = 512
    memory = bytearray(stride * 3)
    for slot in range(3):
        memory[slot * stride + ROOM : slot * stride + ROOM + 10] = b"%d" % slot * 10
    here.carrier.send_datagrams(PREFIX, Datagrams(memory, ROOM, stride), 1, 2, 10, 4, clock.now_us)
    pass_all(here, there, clock.now_us)
    assert there.came == [Opened(inner.DATA, 7, 10, b"1" * 10 + b"2" * 4)]


@pytest.mark.parametrize("room", range(0, 700, 65))
def test_run_that_the_wire_takes_in_part_leaves_whole_and_once(clock: Clock, room: int) -> None:
    here, there = Side(clock, False), Side(clock, True)
    record = 100 + DATA_OVERHEAD
    here.wire.room = room
    records, taken = here.carrier.send_datagrams(PREFIX, run(5, 100), 0, 5, 100, 100, clock.now_us)
    assert (records, taken) == (min(room // record, 5), min(room // record, 5) * record)
    assert here.carrier.is_blocked == (records < 5)
    if here.carrier.is_blocked:
        here.staging.out.view[:2000] = bytes(2000)  # the next port's run
        here.wire.unblock(record)
        here.wire.unblock()
        assert here.events == ["room"] * here.events.count("room") and not here.carrier.is_blocked
        assert here.port.sent_records == 5 - records
    pass_all(here, there, clock.now_us)
    assert b"".join(each.payload for each in there.came) == b"".join(b"%c" % number * 100 for number in range(5))
    assert (there.carrier.counts, there.port.highest) == ((0, 0), 4)


def test_control_goes_past_what_waits(ends: tuple[Side, Side], clock: Clock) -> None:
    here, there = ends
    here.wire.room = 0
    here.carrier.send_datagrams(PREFIX, run(1, 100), 0, 1, 100, 100, clock.now_us)
    here.carrier.ping(clock.now_us)
    pings = len(here.wire.sent)
    pass_all(here, there, clock.now_us)
    here.wire.unblock()
    pass_all(here, there, clock.now_us)
    assert len(there.came) == 1 and pings >= 1 and there.carrier.counts == (0, 0)
    assert len(there.wire.sent) == pings


def test_run_is_no_longer_than_quantum_wire_and_sealer_allow(ends: tuple[Side, Side]) -> None:
    carrier, port, wire = ends[0].carrier, ends[0].port, ends[0].wire
    assert carrier.datagrams_max(1000) == port.quantum_bytes // (1000 + DATA_OVERHEAD)
    assert carrier.datagrams_max(1) == RUN_MAX
    port.quantum_bytes, wire.run_max_bytes = 1 << 16, 5000
    assert carrier.datagrams_max(1000) == 4 and carrier.datagrams_max(60_000) == 1
    assert carrier.payload_max == port.mtu.size - DATA_OVERHEAD
    wire.most_bytes = 700
    assert (carrier.payload_max, carrier.piece_max) == (700 - DATA_OVERHEAD, 700 - RECORD_OVERHEAD)


def test_ping_is_answered_and_the_answer_measures(ends: tuple[Side, Side], clock: Clock) -> None:
    here, there = ends
    here.port.on_sent(1, 100, clock.now_us)
    clock.now_us += 2_000_000
    here.carrier.on_time(clock.now_us)
    assert here.wire.sent
    clock.now_us += 15_000
    pass_all(here, there, clock.now_us)
    clock.now_us += 15_000
    pass_all(there, here, clock.now_us)
    assert here.port.rtt.srtt_us == 30_000 and here.came == there.came == []
    assert here.carrier.status(4, clock.now_us).rtt_ms == 30.0
    assert here.carrier.bytes_in == here.carrier.bytes_out == 0


def test_payload_of_which_nothing_opens_is_counted_and_told(ends: tuple[Side, Side], clock: Clock) -> None:
    here, there = ends
    here.carrier.send_inner(PREFIX + b"once", clock.now_us)
    (record,) = here.wire.sent
    for payload in (b"", b"x", bytes(500), record[:-1], record[:-1] + b"?", record + b"?"):
        deliver(payload, there, clock.now_us)
    assert [each.payload for each in there.came] == [b"once"]  # the last one, with something behind it
    assert there.events == [f"unknown {size}" for size in (0, 1, 500, len(record) - 1, len(record))] + ["up"]
    assert there.carrier.refused_bytes == 501 + 2 * len(record) - 1
    deliver(record, there, clock.now_us)
    assert len(there.came) == 1 and there.carrier.counts[1] == 1 and there.events[-1] == f"unknown {len(record)}"


def test_bad_record_amid_good_ones_costs_only_itself(ends: tuple[Side, Side], clock: Clock) -> None:
    here, there = ends
    here.carrier.send_datagrams(PREFIX, run(5, 100), 0, 5, 100, 100, clock.now_us)
    payload = bytearray(here.wire.sent[0])
    payload[2 * (100 + DATA_OVERHEAD) + 50] ^= 1
    deliver(bytes(payload), there, clock.now_us, 100 + DATA_OVERHEAD)
    assert sum(len(each.payload) for each in there.came) == 400 and there.carrier.counts == (1, 0)


def test_close_is_sealed_and_believed(ends: tuple[Side, Side], clock: Clock) -> None:
    here, there = ends
    here.wire.room = 0
    here.carrier.send_inner(PREFIX + b"waits", clock.now_us)
    here.carrier.close(clock.now_us)
    here.carrier.close(clock.now_us)
    assert here.wire.closed and len(here.wire.sent) == 1 and here.events == []
    pass_all(here, there, clock.now_us)
    assert there.port.state is State.DEAD and there.events == ["up", "lost"]
    there.carrier.close(clock.now_us)
    assert there.wire.closed and there.wire.sent == []
    assert there.carrier.status(0, clock.now_us).state == "down"


def test_forged_reset_does_not_end_the_port_and_a_true_one_does(ends: tuple[Side, Side], clock: Clock) -> None:
    here, there = ends
    here.carrier.on_reset(here.wire)
    assert here.carrier.status(0, clock.now_us).state == "degraded"
    for _ in range(5):
        clock.now_us += 10_000
        here.carrier.on_time(clock.now_us)
        pass_all(here, there, clock.now_us)
        pass_all(there, here, clock.now_us)
    assert here.port.state is State.UP and here.events == ["up"] and here.port.forged_resets == 1
    clock.now_us += 11_000_000
    here.carrier.on_reset(here.wire)
    for _ in range(200):
        clock.now_us += 10_000
        here.carrier.on_time(clock.now_us)
    assert here.events == ["up", "lost"]


def test_port_that_is_not_answered_dies(ends: tuple[Side, Side], clock: Clock) -> None:
    here = ends[0]
    here.port.on_sent(1, 100, clock.now_us)
    began_us = clock.now_us
    while "lost" not in here.events:
        clock.now_us += 20_000
        here.carrier.on_time(clock.now_us)
        assert clock.now_us - began_us < 4_000_000
    assert here.wire.sent and not here.wire.closed


def test_moved_port_sends_what_waited_by_its_new_wire(ends: tuple[Side, Side], clock: Clock) -> None:
    here, there = ends
    here.wire.room = 0
    here.carrier.send_datagrams(PREFIX, run(3, 50), 0, 3, 50, 50, clock.now_us)
    old, here.wire = here.wire, FakeWire(clock, "udp", "a:1", "c:9")  # type: ignore[arg-type]
    here.carrier.move(here.wire)
    assert old.closed and here.wire.calls == ["keep", "proven"] and here.wire.owner is here.carrier
    assert not here.carrier.is_blocked and here.events == ["room"]
    pass_all(here, there, clock.now_us)
    assert len(there.came) == 1 and len(there.came[0].payload) == 150


def test_port_whose_wire_another_has_taken_lets_it_live(ends: tuple[Side, Side], clock: Clock) -> None:
    here = ends[0]
    here.carrier.abandon()
    here.carrier.close(clock.now_us)
    assert here.events == ["lost"] and not here.wire.closed and here.wire.sent == []


def test_what_opens_elsewhere_is_told_apart(ends: tuple[Side, Side], clock: Clock) -> None:
    here, there = ends
    here.carrier.send_inner(PREFIX + b"moved", clock.now_us)
    payload = here.wire.sent[0]
    records = Records(bytearray(ROOM) + payload)
    found, count = there.carrier.try_open(records, ROOM, ROOM + len(payload))
    assert count == 1 and [each.payload for each in found] == [b"moved"]
    assert there.carrier.try_open(records, ROOM, ROOM + len(payload)) == ([], 0)
    assert there.came == [] and there.events == []
