"""Fake-TCP wires over a device that does as told, with timers that the test fires itself."""

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from workers.core.bpf import DROP_ALL
from workers.core.cuts import Records
from workers.core.tcp_header import ACK, FIN, RST, SYN, Header, Segment, Template, parse
from workers.io import raw_device, raw_wire
from workers.io.fake_handshake import TcpFacts
from workers.io.packet import Device
from workers.io.raw_device import RawDevice, Wanted
from workers.io.raw_wire import RawWire, RawWires, Seen
from workers.io.segment_key import connection_key, packed, reversed_key

SIZE = 1000
WINDOW = 8
"""The peer's window is this shifted by SCALE, until told otherwise."""
SCALE = 10
FACTS = TcpFacts(
    established=True,
    timestamps=True,
    timestamp=1000,
    send_scale=SCALE,
    receive_scale=SCALE,
    send_mss=1448,
    receive_mss=1448,
    path_mtu=1500,
    rtt_us=25_000,
)
LINK = bytes([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0])


class Watcher:
    """A watcher that the test fires."""

    def __init__(self) -> None:
        self.callback: Callable[[], None] | None = None

    def start(self, callback: Callable[[], None]) -> None:
        self.callback = callback

    def stop(self) -> None:
        self.callback = None

    def close(self) -> None:
        pass

    def fire(self) -> None:
        assert self.callback is not None
        self.callback()


class Loop:
    def __init__(self) -> None:
        self.watchers: list[Watcher] = []

    def timer(self, after: float, repeat: float) -> Watcher:
        self.watchers.append(Watcher())
        return self.watchers[-1]

    def io(self, fd: int, events: int) -> Watcher:
        return self.timer(0, 0)


class FakePort:
    """A frame port: `sent` goes out while `open`, `coming` comes in."""

    def __init__(self) -> None:
        self.device = Device("eth0", 2, 1500, 14)
        self.link_bytes = 14
        self.sent: list[tuple[Segment, bytes]] = []
        self.headers: list[bytes] = []
        self.coming: list[bytes] = []
        self.open = True
        self.error: OSError | None = None
        self.programs: list[bytes] = []
        self.closed = False

    def fileno(self) -> int:
        return 0

    def bind(self, device: Device, program: bytes) -> None:
        self.device = device
        self.programs.append(program)

    def set_filter(self, program: bytes) -> None:
        self.programs.append(program)

    def send(self, header: bytes, payload: bytes | memoryview) -> int:
        if self.error is not None:
            raise self.error
        if self.open:
            segment = parse(header + bytes(payload), 14)
            assert segment is not None
            self.headers.append(header)
            self.sent.append((segment, bytes(payload)))
        return len(payload) if self.open else -1

    def receive_into(self, view: memoryview) -> int:
        if not self.coming:
            return 0
        frame = self.coming.pop(0)
        view[: len(frame)] = frame
        return len(frame)

    def close(self) -> None:
        self.closed = True


class Place:
    """One wire at a client, its owner, and what its peer sends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, side: Any = "client", **tunnel: Any) -> None:
        self.now_us = 1_000_000
        for module in (raw_wire, raw_device):
            monkeypatch.setattr(module, "clock_us", lambda: self.now_us)
        self.silent: list[Any] = []
        self.muted: list[Any] = []
        monkeypatch.setattr(raw_wire, "close_silently", self.silent.append)
        monkeypatch.setattr(raw_wire, "mute", self.muted.append)
        self.port = FakePort()
        monkeypatch.setitem(raw_device.BACKENDS, "packet", lambda name, wanted: self.port)
        self.loop = Loop()
        self.unknown: list[Segment] = []
        settings: Any = SimpleNamespace(**{"mtu": None, "backend": "packet", **tunnel})
        context: Any = SimpleNamespace(loop=self.loop)
        self.wires = RawWires(context, settings, side, (443,), self._on_unknown, self._on_ownerless, lambda now: None)
        self.ack_timer, self.tick = self.loop.watchers
        self.device = self.wires.device("eth0")
        self.wait_timer, self.readable = self.loop.watchers[2:]
        self.template = Template(
            link=LINK,
            key=connection_key("192.0.2.1", 40_000, "192.0.2.2", 443),
            hop_limit=64,
            traffic_class=0,
            flow_label=0,
            identification=1,
            next_sequence=100,
            acknowledged=500,
            tsecr=7,
        )
        self.wire = self.make()
        self.wire.owner = self
        self.opens, self.again = True, False
        self.came: list[bytes] = []
        self.ownerless: list[bytes] = []
        self.resets = self.writable = 0
        self.peer_next = 500

    def make(self) -> RawWire:
        sock: Any = SimpleNamespace(
            getpeername=lambda: ("192.0.2.2", 443), getsockname=lambda: ("192.0.2.1", 40_000), family=socket.AF_INET
        )
        wire = RawWire(self.wires, 3, sock, Seen(self.device, self.template, 1001), FACTS, self.now_us)
        self.wires.add(wire)
        return wire

    def _on_unknown(self, device: RawDevice, segment: Segment, frame: memoryview, now_us: int) -> None:
        self.unknown.append(segment)

    def _on_ownerless(self, wire: RawWire, records: Records, start: int, end: int, now_us: int) -> None:
        self.ownerless.append(bytes(records.view[start:end]))

    # As the wire's owner

    def on_payload(self, wire: Any, records: Records, start: int, end: int, hint: int, now_us: int) -> None:
        self.came.append(bytes(records.view[start:end]))
        if self.opens:
            wire.on_opened(now_us)

    def on_writable(self, wire: Any) -> None:
        self.writable += 1
        if self.again:
            self.send(1)

    def on_reset(self, wire: Any) -> None:
        self.resets += 1

    # What comes and goes

    def come(self, payload: bytes = b"", *, acknowledged: int = 100, window: int = WINDOW, **more: Any) -> None:
        template = Template(
            link=LINK,
            key=more.get("key", self.template.peer_key),
            hop_limit=60,
            traffic_class=0,
            flow_label=0,
            identification=1,
            next_sequence=0,
            acknowledged=0,
            tsecr=0,
        )
        sequence, flags = more.get("sequence", self.peer_next), more.get("flags", ACK)
        header = Header(template, True).for_run(len(payload), 1400, sequence, acknowledged, window, 9, 0, flags)
        self.port.coming.append(header + payload)
        self.peer_next += len(payload)
        self.readable.fire()

    def send(self, count: int) -> int:
        return self.wire.send_run(memoryview(bytes(count * SIZE)), SIZE, self.now_us)

    def wait(self, after_us: int) -> None:
        self.now_us += after_us
        if self.ack_timer.callback is not None:
            self.ack_timer.fire()

    @property
    def bare(self) -> list[Segment]:
        return [segment for segment, payload in self.port.sent if not payload]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    yield Place(monkeypatch)


# Out


def test_run_goes_in_one_piece_with_the_next_numbers(place: Place) -> None:
    assert place.send(5) == 5 * SIZE
    assert place.send(1) == SIZE
    (first, _), (second, _) = place.port.sent
    assert (first.sequence, first.length, first.gso_size, first.flags) == (100, 5 * SIZE, SIZE, ACK)
    assert (second.sequence, second.length, second.gso_size) == (100 + 5 * SIZE, SIZE, 0)


def test_run_longer_than_one_frame_goes_in_several(place: Place) -> None:
    place.come(window=0xFFFF)
    assert place.send(100) == 100 * SIZE
    assert [segment.length for segment, _ in place.port.sent] == [65 * SIZE, 35 * SIZE]


def test_run_stops_at_the_window_and_goes_on_when_it_opens(place: Place) -> None:
    place.wire.send_run(memoryview(bytes(6000)), SIZE, place.now_us)
    assert place.send(20) == 8 * SIZE  # of the 14,600 bytes assumed until the peer says more
    assert (place.send(1), place.wires.window_waits) == (0, 2)
    place.come(acknowledged=100 + 14 * SIZE, window=0)
    assert place.writable == 0
    place.come(acknowledged=100 + 14 * SIZE, window=WINDOW)
    assert place.writable == 1
    assert place.send(20) == 8 * SIZE


def test_one_record_goes_as_a_probe_while_the_window_is_shut(place: Place) -> None:
    place.send(14)
    assert place.send(1) == 0
    assert place.wire.send_one(bytes(SIZE), place.now_us)
    assert place.port.sent[-1][0].sequence == 100 + 13 * SIZE
    place.come(b"answer", acknowledged=100 + 14 * SIZE)
    assert place.writable == 1
    assert place.send(1) == SIZE
    assert place.port.sent[-1][0].sequence == 100 + 14 * SIZE


def test_what_the_device_refuses_is_sent_again_under_the_same_numbers(place: Place) -> None:
    place.port.open = False
    assert place.send(2) == 0
    assert place.send(2) == 0
    assert not place.wire.send_one(b"ping", place.now_us)
    place.port.open = True
    place.wait_timer.fire()
    assert (place.writable, place.wait_timer.callback) == (1, None)
    assert place.send(2) == 2 * SIZE
    assert place.port.sent[0][0].sequence == 100


def test_waiting_wires_stay_in_line_while_the_device_refuses(place: Place) -> None:
    place.port.open = False
    place.send(1)
    place.again = True
    for _ in range(2):
        place.wait_timer.fire()
        assert place.wait_timer.callback is not None
    place.port.open = True
    place.wait_timer.fire()
    assert place.wait_timer.callback is None
    assert len(place.port.sent) == 1


def test_frame_that_fails_is_lost_and_counted(place: Place) -> None:
    place.port.error = OSError(100, "down")
    assert place.send(2) == 2 * SIZE
    assert place.device.lost == 1
    place.port.error = None
    place.send(1)
    assert place.port.sent[0][0].sequence == 100 + 2 * SIZE


@pytest.mark.parametrize(("mtu", "most"), [(None, 1448), (1300, 1248), (9000, 1448)])
def test_largest_record_is_what_device_tunnel_and_peer_leave(
    mtu: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Place(monkeypatch, mtu=mtu).wire.most_bytes == most


def test_timestamp_clock_goes_on_from_the_later_frame(place: Place) -> None:
    place.now_us += 5000
    place.send(1)
    assert place.port.sent[0][0].tsval == 1006


# Acknowledgements


def test_first_message_repeats_the_handshake_ack_only_at_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for side, flags in (("client", [3, 0, 3, 3]), ("server", [3, 3, 3])):
        place = Place(monkeypatch, side)
        for _ in range(2):
            place.wire.send_one(b"one", place.now_us)
        place.wire.on_proven()
        place.wire.send_one(b"one", place.now_us)
        assert [segment.length for segment, _ in place.port.sent] == flags


def test_acknowledgement_goes_after_40_ms_of_silence_once(place: Place) -> None:
    place.wire.on_proven()
    place.come(b"data")
    place.wait(30_000)
    assert place.bare == []
    place.come(b"more")
    place.wait(30_000)
    assert place.bare == []
    place.wait(20_000)
    assert [segment.acknowledged for segment in place.bare] == [508]
    assert place.ack_timer.callback is None
    place.wait(1_000_000)
    assert len(place.bare) == 1
    place.come(b"again")
    place.wait(50_000)
    assert [segment.acknowledged for segment in place.bare] == [508, 513]


def test_run_carries_the_acknowledgement_that_is_owed(place: Place) -> None:
    place.wire.on_proven()
    place.come(b"data")
    place.send(1)
    place.wait(50_000)
    assert (place.bare, place.port.sent[0][0].acknowledged) == ([], 504)


def test_acknowledgement_goes_at_once_after_a_quarter_of_the_window(place: Place) -> None:
    place.wire.on_proven()
    for _ in range(300):
        place.come(bytes(60_000))
    assert len(place.bare) == 1
    assert place.bare[0].acknowledged - 500 > (0xFFFF << SCALE) // 4


def test_nothing_is_acknowledged_before_the_other_end_has_proven_itself(place: Place) -> None:
    place.come(b"message 2")
    place.wait(50_000)
    assert place.bare == []


def test_what_did_not_open_is_not_acknowledged(place: Place) -> None:
    place.wire.on_proven()
    place.opens = False
    place.come(b"forged", sequence=0x7000_0000)
    place.wait(50_000)
    place.send(1)
    assert (place.came, place.bare) == ([b"forged"], [])
    assert place.port.sent[0][0].acknowledged == 500


# Ends


@pytest.mark.parametrize("flags", [FIN | ACK, RST, RST | ACK])
def test_plausible_end_is_told_and_another_is_not(place: Place, flags: int) -> None:
    place.come(flags=flags, sequence=0x7000_0000)
    assert place.resets == 0
    place.come(flags=flags)
    assert place.resets == 1


def test_syn_is_told_only_when_nothing_has_opened_for_a_while(place: Place) -> None:
    place.come(b"data")
    place.come(flags=SYN)
    assert place.resets == 0
    place.now_us += 3_000_000
    place.come(flags=SYN)
    assert place.resets == 1
    place.come(flags=SYN | ACK)
    assert place.resets == 1


def test_reset_closes_a_wire_without_an_owner(place: Place) -> None:
    place.wire.owner = None
    place.come(b"hello")
    assert place.ownerless == [b"hello"]
    place.come(flags=RST)
    assert len(place.silent) == 1
    assert not place.wires.table


def test_close_before_the_proof_is_silent(place: Place) -> None:
    place.wire.close()
    place.wire.close()
    assert (place.port.sent, len(place.silent)) == ([], 1)
    assert place.send(2) == 2 * SIZE
    assert not place.wire.send_one(b"late", place.now_us)
    place.come(b"late")
    assert (place.port.sent, place.came, len(place.unknown)) == ([], [], 1)


def test_close_after_the_proof_sends_fin_and_keeps_the_muted_socket_a_second(place: Place) -> None:
    place.wire.on_proven()
    place.wire.on_proven()
    place.send(1)
    place.wire.close()
    assert place.port.sent[-1][0].flags == FIN | ACK
    assert place.port.sent[-1][0].sequence == 100 + SIZE
    assert (len(place.muted), place.silent) == (1, [])
    place.tick.fire()
    assert place.silent == []
    place.now_us += 1_100_000
    place.tick.fire()
    assert len(place.silent) == 1


def test_all_is_closed_with_the_last_wire(place: Place) -> None:
    place.wire.on_proven()
    place.wires.close()
    assert not place.port.closed
    place.send(1)
    place.wire.close()
    assert place.port.closed
    assert len(place.silent) == 1


def test_second_connection_from_the_same_port_takes_over(place: Place) -> None:
    again = place.make()
    assert place.resets == 1
    place.wire.close()
    assert place.wires.table == {again.key: again}


# Changes


def test_next_hop_that_changes_is_used_from_then_on(place: Place) -> None:
    place.send(1)
    for address in (b"", LINK[:6], b"\2\0\0\0\0\x77"):
        place.wire.on_next_hop(address)
    place.send(1)
    assert [header[10:24] for header in place.port.headers] == [LINK, b"\2\0\0\0\0\x77" + LINK[6:]]


def test_device_that_was_made_anew_is_bound_again(place: Place) -> None:
    wanted = Wanted("client", (443,))
    place.device.refresh(Device("eth0", 2, 1400, 14), wanted)
    assert place.port.programs == [wanted.program(Device("eth0", 2, 1400, 14))]
    place.wire.measure()
    assert place.wire.most_bytes == 1348
    place.device.refresh(Device("eth0", 9, 1400, 14), wanted)
    assert len(place.port.programs) == 2


def test_filter_tells_hosts_apart_until_there_are_many(place: Place) -> None:
    for number in range(40):
        place.wires.want_host(packed(f"192.0.2.{number}"))
        place.wires.want_host(packed(f"192.0.2.{number}"))
    assert len(place.port.programs) == 40
    assert place.port.programs[-1] == Wanted("client", (443,)).program(place.port.device) != DROP_ALL


# Keys


@pytest.mark.parametrize(("one", "other"), [("192.0.2.1", "192.0.2.2"), ("fe80::1%lo", "fe80::2"), ("::1", "::2")])
def test_key_is_that_of_segments(one: str, other: str) -> None:
    key = connection_key(one, 1, other, 2)
    assert reversed_key(key) == connection_key(other, 2, one, 1)
    assert reversed_key(reversed_key(key)) == key


def test_ipv4_address_of_a_socket_for_both_families_is_ipv4() -> None:
    assert packed("::ffff:192.0.2.1") == packed("192.0.2.1")
