"""The sending half of a share: what its streams have for their paths, in which order, and what becomes of it.

Answers come first, then ACKs, then what has to be sent again, then new data, stream by stream (deficit round robin). A
frame is kept until it was received. When its path is lost or stalls, it is queued again for another.
"""

from collections import deque
from collections.abc import Collection

from workers.core import frame
from workers.core.path import Path
from workers.core.retain import SentFrame
from workers.core.rtt import INITIAL_RTO_US, MAX_RTO_US
from workers.core.schedule import Turns
from workers.core.stream import SEND_OPEN, Stream
from workers.core.waiting import Waiting

MIN_RTT_US = 1_000
MAX_ANSWERS = 4096


class Sending:
    """What `streams` send on `paths`. `usable_elsewhere`: other workers' carriers that do not stall."""

    slot: int

    def __init__(self) -> None:
        self.rtt_us = MIN_RTT_US
        self.usable_elsewhere = 0
        self.streams: dict[int, Stream] = {}
        self.paths: dict[tuple[int, int, int], Path] = {}
        self.bytes_out = 0
        self.kept_bytes = 0
        self.reinjected_bytes = 0
        self.answers: deque[bytes] = deque()
        self.acks: deque[Stream] = deque()
        self.resends: deque[SentFrame] = deque()
        self.turns: Turns[Stream] = Turns()
        self.waiting = Waiting()
        self.virtual = 0
        self._clock_us = 0
        self._delayed: deque[tuple[int, Stream]] = deque()
        self._blocked: dict[int, Stream] = {}
        self._busy: dict[Path, None] = {}

    # What to send next

    @property
    def has_work(self) -> bool:
        """Whether anything could be sent if a path had room."""
        return bool(self.acks or self.resends or self.answers or self.turns)

    @property
    def has_urgent(self) -> bool:
        """Whether the next frame to send is a small one that should not wait."""
        return bool(self.acks or self.answers or self.turns.light)

    @property
    def next_due_us(self) -> int | None:
        """When the next delayed ACK is due."""
        delayed = self._delayed
        while delayed and not delayed[0][1].ack_armed:
            delayed.popleft()
        return delayed[0][0] if delayed else None

    def ack_to_send(self) -> Stream | None:
        """The next stream whose ACK is due; build it with `Stream.ack_to_send` and call `on_ack_sent`."""
        if not self.acks:
            return None
        stream = self.acks.popleft()
        stream.ack_queued = False
        return stream

    def on_ack_sent(self, stream: Stream, path: Path | None) -> None:
        """The stream's latest ACK left on `path` (None: not known yet)."""
        stream.ack_path = path
        if path is not None and path.lost:
            self._ack_now(stream)

    def frame_to_resend(self) -> SentFrame | None:
        """The next frame to send (again) that is not new data."""
        resends = self.resends
        while resends:
            kept = resends.popleft()
            kept.queued = False
            if not kept.done:
                return kept
        return None

    def frame_bytes(self, kept: SentFrame) -> bytes:
        """A kept frame without payload, as bytes."""
        stream = kept.stream
        flags = 0 if stream.answered or kept.kind == frame.RESET else frame.OPENING
        return frame.pack(kept.kind, flags, stream.peer_serial, stream.flow, kept.offset)

    def stream_to_send(self) -> Stream | None:
        """Whose turn it is to send new data."""
        return self.turns.next()

    # What the application has

    def on_readable(self, stream: Stream) -> None:
        """The application may have bytes for the stream."""
        stream.readable = True
        if stream.state in SEND_OPEN and stream.flow not in self._blocked:
            self.turns.add(stream, self._clock_us)

    def on_drained(self, stream: Stream) -> None:
        """The application has no bytes at the moment."""
        stream.readable = False
        self.turns.remove(stream)
        self.waiting.add(stream)

    def on_blocked(self, stream: Stream, now_us: int) -> None:
        """The stream has bytes and no credit: it waits for an ACK, and probes if none comes."""
        self.turns.remove(stream)
        self.waiting.add(stream)
        if stream.state in SEND_OPEN:
            self._blocked[stream.flow] = stream
            stream.probe_wait_us = max(INITIAL_RTO_US, 2 * self.rtt_us)
            stream.probe_due_us = now_us + stream.probe_wait_us

    def may_send_alone(self, stream: Stream) -> bool:
        """Whether new data of `stream` need not wait for anything: nothing else is there to be sent."""
        return not (self.acks or self.resends or self.answers or self.turns or stream.flow in self._blocked)

    def add_alone(self, stream: Stream, length: int, slot: int) -> SentFrame:
        """As `add_data`, after `write_header`, for a stream that takes no part in the turns and of which
        `may_send_alone` was true."""
        kept = self._add(stream, length, slot)
        self.virtual += length
        self.waiting.add(stream)
        return kept

    def add_data(self, stream: Stream, length: int, slot: int, header: memoryview) -> SentFrame:
        """Turn `length` bytes of the application, which stand behind `header` in `slot`, into a frame."""
        self.write_header(stream, length, header)
        kept = self._add(stream, length, slot)
        self.virtual += length // max(self.turns.waiting, 1)
        self.turns.charge(stream, length)
        return kept

    def write_header(self, stream: Stream, length: int, header: memoryview) -> None:
        """Begin the frame of the next `length` bytes of `stream`."""
        flags = 0 if stream.answered else frame.OPENING
        if stream.is_blocked_after(length):
            flags |= frame.BLOCKED
        offset = stream.sent.next_offset
        frame.HEADER.pack_into(header, 0, frame.DATA, flags, 0, stream.peer_serial, stream.flow, offset)

    def _add(self, stream: Stream, length: int, slot: int) -> SentFrame:
        kept = stream.add_data(length, slot)
        self.bytes_out += length
        self.kept_bytes += length
        return kept

    def on_fin(self, stream: Stream) -> None:
        """The application has ended its direction."""
        stream.readable = False
        self.turns.remove(stream)
        self._blocked.pop(stream.flow, None)
        if stream.state in SEND_OPEN:
            self._queue(stream.add_fin())
            self.waiting.add(stream)

    # What was sent

    def on_sent(self, kept: SentFrame, path: Path, now_us: int) -> None:
        """`kept` left on `path`; or was handed to the worker of the path, which will name the path later."""
        if kept.sends:
            self.reinjected_bytes += kept.length
        self._note_sent(kept, path, now_us)

    def _note_sent(self, kept: SentFrame, path: Path, now_us: int) -> None:
        path.on_sent(kept, now_us)
        if path.lost:
            self._queue(kept, urgent=True)
        else:
            self._busy[path] = None

    def find_kept(self, flow: int, kind: int, offset: int) -> SentFrame | None:
        """The kept frame of that flow, kind and offset, if it still waits to be received."""
        stream = self.streams.get(flow)
        if stream is None:
            return None
        if kind == frame.OPEN:
            return stream.open_frame
        if kind == frame.RESET:
            return stream.reset_frame
        kept = stream.sent.find(offset)
        return None if kept is None or kept.done else kept

    def on_bound(self, kept: SentFrame, path: Path, now_us: int) -> None:
        """Another worker, to which `kept` was handed, has sent it on `path`."""
        kept.sends -= 1
        self._note_sent(kept, path, now_us)

    def send_again(self, kept: SentFrame) -> None:
        """`kept` was not sent after all."""
        self._queue(kept, urgent=True)

    def ack_again(self, stream: Stream) -> None:
        """The latest ACK of `stream` was not sent after all."""
        self._ack_now(stream)

    def _settle(self, kept: SentFrame, now_us: int) -> None:
        kept.done = True
        if kept.path is not None:
            kept.path.on_received(kept, now_us)

    def _queue(self, kept: SentFrame, urgent: bool = False) -> None:
        if not kept.queued and not kept.done:
            kept.queued = True
            if urgent:
                self.resends.appendleft(kept)
            else:
                self.resends.append(kept)

    def _ack_now(self, stream: Stream) -> None:
        if not stream.ack_queued:
            stream.ack_queued = True
            self.acks.append(stream)

    def answer(self, data: bytes) -> None:
        """Send a frame once, without keeping it; dropped if too many wait."""
        if len(self.answers) < MAX_ANSWERS:
            self.answers.append(data)

    # Paths come and go, and stall

    def add_path(self, path: Path) -> None:
        """A carrier is up."""
        self.paths[path.worker, path.index, path.generation] = path

    def lose_path(self, path: Path) -> None:
        """A carrier is gone: what it had not brought to the other end goes elsewhere, as do the latest ACKs it took."""
        path.lost = True
        self.paths.pop((path.worker, path.index, path.generation), None)
        self._busy.pop(path, None)
        for kept in reversed(list(path.waiting())):
            self._queue(kept, urgent=True)
        self.ack_elsewhere([path])
        if all(other.stalled for other in self.paths.values()):
            for other in self.paths.values():
                other.stalled = False

    def ack_elsewhere(self, paths: Collection[Path]) -> None:
        """What they took last may not arrive, or late: streams whose latest ACK that was send it again."""
        if not paths:
            return
        late = set(paths)
        for stream in self.streams.values():
            if stream.ack_path in late:
                stream.ack_path = None
                self._ack_now(stream)

    def on_held_up(self, paths: Collection[Path]) -> None:
        """These carriers stall, as their owner knows."""
        for path in paths:
            path.held_up = True
        self.ack_elsewhere(paths)

    def give_up(self, paths: Collection[Path], now_us: int) -> None:
        """These carriers stall, and another has come: all that they took goes elsewhere at once."""
        self.on_held_up(paths)
        for path in paths:
            if path.oldest() is not None and self._is_other_usable(path):
                self._stall(path, now_us)
                self._busy[path] = None

    def on_acks_due(self, now_us: int) -> None:
        """Queue the delayed ACKs whose time has come."""
        delayed = self._delayed
        while delayed and delayed[0][0] <= now_us:
            stream = delayed.popleft()[1]
            if stream.ack_armed:
                self._ack_now(stream)

    def _check_stall(self, path: Path, now_us: int) -> None:
        """Send again what waits too long: all of it elsewhere, or one frame at a time where there is no other path.

        A frame that later ones of the same path overtook was dropped by the receiver, for want of memory: the path
        works.
        """
        while (oldest := path.oldest()) is not None and path.is_late(oldest, now_us):
            if oldest.place < path.acked_place:
                self._queue(oldest)
            elif self._is_other_usable(path):
                self._stall(path, now_us)
            elif now_us >= path.retry_us:
                path.on_stall(now_us)
                self._queue(oldest)
            else:
                break

    def _is_other_usable(self, path: Path) -> bool:
        """Whether there is another carrier, of whatever worker, that does not stall."""
        if any(other is not path and not other.stalled for other in self.paths.values()):
            return True
        is_counted = path.worker != self.slot and not path.held_up
        return self.usable_elsewhere > is_counted

    def _stall(self, path: Path, now_us: int) -> None:
        path.stalled = True
        path.on_stall(now_us)
        for kept in list(path.waiting()):
            self._queue(kept)

    def _check_paths(self, now_us: int) -> None:
        for path in list(self._busy):
            if path.stalled and now_us >= path.retry_us:
                path.stalled = False
            self._check_stall(path, now_us)
            if path.oldest() is None and not path.stalled:
                del self._busy[path]

    def _probe(self, now_us: int) -> None:
        """Ask for credit: an ACK that brought some may be lost."""
        for stream in list(self._blocked.values()):
            if now_us >= stream.probe_due_us:
                stream.probe_wait_us = min(2 * stream.probe_wait_us, MAX_RTO_US)
                stream.probe_due_us = now_us + stream.probe_wait_us
                flags = 0 if stream.answered else frame.OPENING
                self.answer(frame.pack(frame.DATA, flags, stream.peer_serial, stream.flow, stream.sent.next_offset))
