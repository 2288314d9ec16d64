"""Two ends of fake TCP with a strict conntrack between them, which never finds fault, whatever is lost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.conntrack import Conntrack
from tests.core.segments import Frame
from tests.core.test_fake_tcp import MASK, NOW, made, read
from workers.core.fake_tcp import ACK_IDLE_US, WINDOW
from workers.core.tcp_header import ACK, SYN, Segment


class Path:
    """Two ends with a strict conntrack between them; what it calls invalid fails the test.

    loss: share of segments lost before and again behind the conntrack.
    """

    def __init__(self, scales: tuple[int, int] | None, first: tuple[int, int], loss: float = 0, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.conntrack = Conntrack(scales)
        self.loss = loss
        self.now = NOW
        self.bare_acks = 0
        self.lost = 0
        self.on_way: tuple[list[Segment], list[Segment]] = ([], [])
        mine, yours = first
        ack = Frame(sequence=(mine + 1) & MASK, acknowledged=(yours + 1) & MASK)
        syn_ack = Frame(sequence=yours, acknowledged=(mine + 1) & MASK, flags=SYN | ACK)
        shift = scales or (0, 0)
        self.ends = (
            made(ack, own_scale=shift[0], peer_scale=shift[1], with_timestamps=False),
            made(syn_ack, own_scale=shift[1], peer_scale=shift[0], with_timestamps=False),
        )
        self.conntrack.passes(0, mine, 0, 0, 64_240, SYN)
        self.conntrack.passes(1, yours, 0, mine + 1 & MASK, 65_160, SYN | ACK)
        self.conntrack.passes(0, ack.sequence, 0, ack.acknowledged, 64_240 >> shift[0], ACK)
        assert not self.conntrack.invalid

    def _is_lost(self) -> bool:
        lost = self.random.random() < self.loss
        self.lost += lost
        return lost

    def carry(self, way: int, frame: bytes, payload: bytes = b"") -> None:
        """Take a run to the far end's queue, segment by segment."""
        run = read(frame, payload)
        size = run.gso_size or max(run.length, 1)
        for at in range(0, max(run.length, 1), size):
            length = min(size, run.length - at)
            segment = run._replace(sequence=run.sequence + at & MASK, length=length)
            if self.loss and self._is_lost():
                continue
            _, sequence, ack, window, flags, *_ = segment
            assert self.conntrack.passes(way, sequence, length, ack, window, flags), self.conntrack.invalid
            if not (self.loss and self._is_lost()):
                self.on_way[way].append(segment)

    def deliver(self, way: int, out_of_order: bool = False) -> None:
        if out_of_order:
            self.random.shuffle(self.on_way[way])
        receiver = self.ends[1 - way]
        for segment in self.on_way[way]:
            if not segment.length:
                receiver.on_bare(segment)
            elif receiver.on_run(segment, self.now):
                self.acknowledge(1 - way)
        self.on_way[way].clear()

    def acknowledge(self, way: int) -> None:
        self.bare_acks += 1
        self.carry(way, self.ends[way].ack_to_send(self.now))
        self.ends[way].on_sent(0)

    def send(self, way: int, size: int, segment: int) -> bool:
        end = self.ends[way]
        if end.may_send(size):
            self.carry(way, end.run_to_send(size, segment, self.now), bytes(size))
            end.on_sent(size)
            return True
        return False

    def probe(self, way: int) -> None:
        self.carry(way, self.ends[way].probe_to_send(60, self.now), bytes(60))
        self.ends[way].on_sent(0)

    def wait(self, duration_us: int) -> None:
        self.now += duration_us
        for way in (0, 1):
            due = self.ends[way].next_ack_us
            if due is not None and due <= self.now:
                self.acknowledge(way)


scales_of_two = st.none() | st.tuples(st.sampled_from([0, 2, 7, 10]), st.sampled_from([0, 2, 7, 10]))
numbers = st.integers(0, MASK) | st.integers(MASK - 100_000, MASK)
sizes = st.integers(1, 60_000)
steps = st.lists(
    st.tuples(st.sampled_from(["send", "send", "deliver", "wait", "probe", "blackout"]), st.integers(0, 1), sizes),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(scales_of_two, st.tuples(numbers, numbers), steps, st.sampled_from([0, 0.02, 0.5]), st.integers(0, 2**32))
def test_conntrack_finds_no_fault_and_no_loss_blocks_for_ever(
    scales: tuple[int, int] | None,
    first: tuple[int, int],
    steps: list[tuple[str, int, int]],
    loss: float,
    seed: int,
) -> None:
    path = Path(scales, first, loss, seed)
    for step, way, size in steps:
        if step == "send":
            path.send(way, size, 1 + size % 1448 + 100)
        elif step == "deliver":
            path.deliver(way, out_of_order=bool(size & 1))
        elif step == "wait":
            path.wait(size)
        elif step == "probe" and not path.ends[way].may_send(60):
            path.probe(way)
        elif step == "blackout":
            path.on_way[way].clear()
    path.loss = 0
    for way in (0, 1):
        if not path.ends[way].may_send(30_000):
            path.probe(way)
        path.deliver(way)
        path.wait(ACK_IDLE_US)
        path.deliver(1 - way)
        assert path.send(way, 30_000, 1448)


@pytest.mark.parametrize("scales", [(10, 10), (7, 7), None], ids=["10", "7", "none"])
def test_six_gib_in_one_direction_cross_a_strict_conntrack(scales: tuple[int, int] | None) -> None:
    path = Path(scales, (MASK - 5000, 2**31))
    end = path.ends[0]
    payload = bytes(60_000)
    sent = 0
    first = path.send(0, 300, 1448)  # the two handshake messages
    path.deliver(0)
    assert first and path.send(1, 100, 1448)
    path.deliver(1)
    total = 6 * 2**30 if scales else 2**26
    while sent < total:
        assert end.may_send(60_000)
        frame = end.run_to_send(60_000, 60_000, path.now)  # one segment: the model need not see each
        path.carry(0, frame, payload)
        end.on_sent(60_000)
        sent += 60_000
        path.deliver(0)
        path.deliver(1)
    quarter = (WINDOW << (scales[1] if scales else 0)) // 4
    assert path.bare_acks <= sent // quarter + 1
    assert not path.conntrack.invalid


def test_a_window_that_is_lost_whole_is_opened_again_by_one_probe() -> None:
    path = Path(None, (7, 8))
    path.send(0, 100, 1448)
    path.deliver(0)
    path.send(1, 100, 1448)
    path.deliver(1)
    while path.send(0, 1400, 1448):
        pass
    path.on_way[0].clear()
    path.wait(10**6)
    assert not path.send(0, 1400, 1448)
    path.probe(0)
    path.deliver(0)
    path.wait(ACK_IDLE_US)
    path.deliver(1)
    assert path.ends[0].room_bytes == WINDOW


def conntracked() -> Path:
    path = Path((7, 7), (1000, 9000))
    path.send(0, 100, 1448)
    path.deliver(0)
    path.send(1, 100, 1448)
    path.deliver(1)
    return path


@pytest.mark.parametrize(
    ("sequence", "length", "acknowledged", "verdict"),
    [
        (1101, 1000, 9101, ""),
        (1101 + (WINDOW << 7), 1, 9101, ""),
        (1102 + (WINDOW << 7), 1, 9101, "SEQ is over the upper bound"),
        (1101, 1, 9102, "ACK is over the upper bound"),
        (1101 - 2 * (WINDOW << 7), 1000, 9101, "SEQ is under the lower bound"),
        (1101, 1000, 9101 - 2 * (WINDOW << 7), "ACK is under the lower bound"),
    ],
)
def test_model_of_conntrack_knows_its_four_bounds(sequence: int, length: int, acknowledged: int, verdict: str) -> None:
    conntrack = conntracked().conntrack
    assert conntrack.passes(0, sequence & MASK, length, acknowledged & MASK, WINDOW, ACK) == (not verdict)
    assert [line.split(":")[0] for line in conntrack.invalid] == ([verdict] if verdict else [])


def test_model_of_conntrack_stops_a_sender_that_nobody_acknowledges() -> None:
    conntrack = conntracked().conntrack
    sent = 0
    while conntrack.passes(0, 1101 + sent, 60_000, 9101, WINDOW, ACK):
        sent += 60_000
    assert WINDOW << 7 < sent <= (WINDOW << 7) + 60_000
