"""One worker's share of a session: its streams, and the paths that they may use. Sans-IO.

The way of a byte, and the order of this file:

1. the application opens a stream (`open_stream`), or the peer's first frame does (`_accept`);
2. the shell asks what to send on a path that has room: `ack_to_send`, then `frame_to_resend`, then `stream_to_send`,
   and says what it sent: `on_ack_sent`, `on_sent`, `add_data`;
3. what a path received comes in by `receive`; pieces in order go out by `Shell.deliver`;
4. paths come and go (`add_path`, `lose_path`), peers' workers too (`on_peer_gone`, `on_roster`);
5. time passes (`on_time`): delayed ACKs, stalled paths, probes, tombstones.

Times are whole microseconds of any monotonic clock. A `piece` is whatever the shell needs to find the payload again.
"""

from collections import deque
from typing import Any, Protocol

from workers.core import frame
from workers.core.closed import SeenCounters
from workers.core.credit import INITIAL_WINDOW, CreditPool, reserve_bytes
from workers.core.errors import RemoteProtocolError
from workers.core.frame import Header, Reason
from workers.core.path import Path
from workers.core.retain import SentFrame
from workers.core.rtt import INITIAL_RTO_US, MAX_RTO_US
from workers.core.schedule import DeficitRoundRobin
from workers.core.state import Input, State
from workers.core.stream import ACK_DELAY_US, FIN_PIECE, FIN_SENT, SEND_OPEN, Stream

TOMBSTONE_US = 60_000_000
"""How long a finished stream is remembered, to answer a FIN whose ACK was lost. After that the answer is RESET."""
MIN_RTT_US = 1_000
MAX_ANSWERS = 4096
MAX_OPENERS = 1024
"""Workers of the other end, dead ones included, whose streams are remembered; the least recent goes."""

Owner = tuple[int, int, int]
"""A worker at the other end: slot, serial, boot id."""


class Shell(Protocol):
    """What a share asks of whoever has the sockets and the memory.

    No call may come back into the share but `on_consumed`.
    """

    def deliver(self, stream: Stream, piece: Any, length: int) -> None:
        """The next bytes of the stream; `piece` belongs to the shell from now on."""

    def end_of_stream(self, stream: Stream) -> None:
        """The peer's direction is complete; what was delivered is all."""

    def opened(self, stream: Stream) -> None:
        """The peer opened a stream."""

    def reset(self, stream: Stream, reason: int) -> None:
        """The stream is over and incomplete."""

    def release(self, slot: int) -> None:
        """A slot given by `add_data` is not needed any more."""

    def discard(self, piece: Any) -> None:
        """A piece that was taken will not be delivered."""


class SessionShare:
    """The streams of one session that one worker owns.

    `end` is frame.CLIENT or frame.SERVER; `slot` and `serial` are this worker's.
    """

    def __init__(
        self,
        end: int,
        slot: int,
        serial: int,
        shell: Shell,
        pool: CreditPool,
        window_cap: int,
        max_streams: int = 65536,
    ) -> None:
        self.end = end
        self.slot = slot
        self.serial = serial
        self.shell = shell
        self.pool = pool
        self.window_cap = window_cap
        self.max_streams = max_streams
        self.rtt_us = MIN_RTT_US
        self.streams: dict[int, Stream] = {}
        self.paths: dict[tuple[int, int, int], Path] = {}
        self.total_streams = self.reset_streams = 0
        self.bytes_in = self.bytes_out = 0
        self.reinjected_bytes = self.duplicate_bytes = 0
        self.draining = False
        self.answers: deque[bytes] = deque()
        self.acks: deque[Stream] = deque()
        self.resends: deque[SentFrame] = deque()
        self.turns: DeficitRoundRobin[Stream] = DeficitRoundRobin()
        self._delayed: deque[tuple[int, Stream]] = deque()
        self._blocked: dict[int, Stream] = {}
        self._finished: dict[int, tuple[int, int]] = {}
        self._clock_us = 0
        self._seen: dict[int, SeenCounters] = {}
        self._counters: dict[int, int] = {}
        self._busy: dict[Path, None] = {}

    # 1. Opening

    def open_stream(self, owner: Owner, now_us: int) -> Stream | None:
        """A new stream to the peer's worker `owner`; None where streams or credit are used up."""
        if len(self.streams) >= self.max_streams or not self.pool.reserve(reserve_bytes(INITIAL_WINDOW)):
            return None
        counter = self._counters.get(owner[0], 0)
        self._counters[owner[0]] = counter + 1
        flow = frame.flow_id(self.end, self.slot, owner[0], self.serial, counter)
        stream = Stream(flow, owner[1], self.pool, self.window_cap, now_us)
        stream.owner = owner
        self.streams[flow] = stream
        self.total_streams += 1
        stream.open_frame = SentFrame(stream, frame.OPEN, 0, 0, -1)
        self._queue(stream.open_frame)
        return stream

    def _accept(self, header: Header, now_us: int) -> Stream | None:
        """A stream for a first frame, or None after answering for one that may not be opened."""
        flow = header.flow
        finished = self._finished.get(flow)
        if finished is not None:
            ack = frame.Ack(finished[0], finished[0], 0, ())
            self._answer(frame.pack_ack(0, 0, flow, ack))
            return None
        fresh = header.flags & frame.OPENING and self._is_peers(flow) and header.serial == self.serial
        if not fresh or not self._admit(flow):
            self._answer(frame.pack(frame.RESET, 0, 0, flow, Reason.UNKNOWN_FLOW))
            return None
        full = self.draining or len(self.streams) >= self.max_streams
        if full or not self.pool.reserve(reserve_bytes(INITIAL_WINDOW)):
            reason = Reason.SHUTDOWN if self.draining else Reason.OVERLOAD
            self._answer(frame.pack(frame.RESET, 0, 0, flow, reason))
            return None
        stream = Stream(flow, 0, self.pool, self.window_cap, now_us)
        stream.answered = True
        self.streams[flow] = stream
        self.total_streams += 1
        self._ack_now(stream)
        self.shell.opened(stream)
        return stream

    def _is_peers(self, flow: int) -> bool:
        """Whether the peer may open such a flow: only clients open any."""
        return self.end == frame.SERVER and frame.flow_end(flow) == frame.CLIENT

    def _admit(self, flow: int) -> bool:
        opener = frame.flow_opener(flow)
        seen = self._seen.pop(opener) if opener in self._seen else SeenCounters()
        self._seen[opener] = seen
        if len(self._seen) > MAX_OPENERS:
            del self._seen[next(iter(self._seen))]
        return seen.admit(frame.flow_counter(flow))

    def _answer(self, answer: bytes) -> None:
        if len(self.answers) < MAX_ANSWERS:
            self.answers.append(answer)

    # 2. Sending

    @property
    def has_work(self) -> bool:
        """Whether anything could be sent if a path had room."""
        return bool(self.acks or self.resends or self.answers or len(self.turns))

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

    def on_readable(self, stream: Stream) -> None:
        """The application may have bytes for the stream."""
        stream.readable = True
        if stream.state in SEND_OPEN and stream.flow not in self._blocked:
            self.turns.add(stream)

    def on_drained(self, stream: Stream) -> None:
        """The application has no bytes at the moment."""
        stream.readable = False
        self.turns.remove(stream)

    def on_blocked(self, stream: Stream, now_us: int) -> None:
        """The stream has bytes and no credit: it waits for an ACK, and probes if none comes."""
        self.turns.remove(stream)
        if stream.state in SEND_OPEN:
            self._blocked[stream.flow] = stream
            stream.probe_wait_us = max(INITIAL_RTO_US, 2 * self.rtt_us)
            stream.probe_due_us = now_us + stream.probe_wait_us

    def add_data(self, stream: Stream, length: int, slot: int, header: memoryview) -> SentFrame:
        """Turn `length` bytes of the application, which stand behind `header` in `slot`, into a frame."""
        kept = stream.add_data(length, slot)
        flags = 0 if stream.answered else frame.OPENING
        frame.HEADER.pack_into(header, 0, frame.DATA, flags, 0, stream.peer_serial, stream.flow, kept.offset)
        self.turns.charge(stream, length)
        self.bytes_out += length
        return kept

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

    def on_fin(self, stream: Stream) -> None:
        """The application has ended its direction."""
        stream.readable = False
        self.turns.remove(stream)
        self._blocked.pop(stream.flow, None)
        if stream.state in SEND_OPEN:
            self._queue(stream.add_fin())

    def reset_stream(self, stream: Stream, reason: int) -> None:
        """End the stream as incomplete, at both ends.

        After both directions have ended it only says that the rest of what was delivered will not be consumed.
        """
        if stream.state is State.CLOSED:
            stream.close_window()
        if stream.state in (State.RESETTING, State.CLOSED):
            return
        stream.on(Input.SEND_RESET)
        stream.reset_frame = SentFrame(stream, frame.RESET, int(reason), 0, -1)
        self._queue(stream.reset_frame)
        self._drop_buffers(stream)
        stream.close_window()
        self.reset_streams += 1
        self.shell.reset(stream, reason)

    def _queue(self, kept: SentFrame, urgent: bool = False) -> None:
        if not kept.queued and not kept.done:
            kept.queued = True
            if urgent:
                self.resends.appendleft(kept)
            else:
                self.resends.append(kept)

    # 3. Receiving

    def receive(self, header: Header, body: Any, piece: Any, length: int, now_us: int) -> bool:
        """Take a frame of `length` payload bytes; `body` holds them for an ACK, `piece` names them for DATA.

        True if the share keeps `piece`; else it is still the caller's. Raises RemoteProtocolError.
        """
        self._clock_us = now_us
        stream = self.streams.get(header.flow)
        kind = header.kind
        if kind == frame.ACK:
            self._on_ack(stream, header, frame.unpack_ack(header, body), now_us)
            return False
        if kind == frame.RESET:
            self._on_reset(stream, header)
            return False
        if stream is None:
            stream = self._accept(header, now_us)
            if stream is None:
                return False
        if kind == frame.DATA:
            return self._on_data(stream, header.offset, length, piece, now_us)
        if kind == frame.FIN:
            self._on_fin(stream, header.offset)
        else:
            self._ack_now(stream)
        return False

    def _on_data(self, stream: Stream, offset: int, length: int, piece: Any, now_us: int) -> bool:
        if stream.state is State.RESETTING:
            return False
        if not length or not stream.take_data(offset, length, piece):
            self.duplicate_bytes += length
            self._ack_now(stream)
            return False
        self._deliver(stream)
        if stream.ack_due():
            self._ack_now(stream)
        elif not stream.ack_armed:
            stream.ack_armed = True
            self._delayed.append((now_us + ACK_DELAY_US, stream))
        return True

    def _deliver(self, stream: Stream) -> None:
        received, shell = stream.received, self.shell
        while (entry := received.take()) is not None:
            length, piece = entry
            if piece is FIN_PIECE:
                stream.on(Input.FIN_RECEIVED)
                shell.end_of_stream(stream)
                self._finish_if_closed(stream)
                return
            self.bytes_in += length
            shell.deliver(stream, piece, length)

    def _on_fin(self, stream: Stream, total: int) -> None:
        self._ack_now(stream)
        if stream.state is not State.RESETTING and stream.take_fin(total):
            self._deliver(stream)

    def on_consumed(self, stream: Stream, length: int, frames: int, now_us: int) -> None:
        """The application took `frames` whole pieces of `length` bytes together, whose slots are free again.

        To be called for all that was delivered, also after the end of the stream, unless `reset_stream` was.
        """
        if not stream.window_open:
            return
        stream.window.on_consumed(length, frames, now_us, self.rtt_us)
        if stream.fin_total is None:
            if stream.window.due():
                self._ack_now(stream)
        elif stream.state is State.CLOSED:
            stream.close_window_if_consumed()

    def _ack_now(self, stream: Stream) -> None:
        if not stream.ack_queued:
            stream.ack_queued = True
            self.acks.append(stream)

    def _on_ack(self, stream: Stream | None, header: Header, ack: frame.Ack, now_us: int) -> None:
        if stream is None:
            if not header.flags & frame.RESET_SEEN and header.flow not in self._finished:
                self._answer(frame.pack(frame.RESET, 0, 0, header.flow, Reason.UNKNOWN_FLOW))
            return
        stream.answered = True
        if stream.open_frame is not None:
            self._settle(stream.open_frame, now_us)
            stream.open_frame = None
        if header.flags & frame.RESET_SEEN:
            if stream.reset_frame is None:
                raise RemoteProtocolError("ACK of a RESET that was never sent")
            self._settle(stream.reset_frame, now_us)
            stream.on(Input.RESET_ACKED)
            self._finish_if_closed(stream)
            return
        if stream.state is State.RESETTING:
            return
        newly = stream.sent.acknowledge(ack.received, ack.ranges)
        for kept in newly:
            self._settle(kept, now_us)
            if kept.kind == frame.DATA:
                self.shell.release(kept.slot)
        all_received = newly and not len(stream.sent)
        unblocked = stream.take_credit(ack) or all_received
        if unblocked and self._blocked.pop(stream.flow, None) is not None and stream.readable:
            self.turns.add(stream)
        if all_received and stream.state in FIN_SENT:
            stream.on(Input.FIN_ACKED)
            self._finish_if_closed(stream)

    def _settle(self, kept: SentFrame, now_us: int) -> None:
        kept.done = True
        if kept.path is not None:
            kept.path.on_received(kept, now_us)

    def _on_reset(self, stream: Stream | None, header: Header) -> None:
        seen = frame.pack_ack(frame.RESET_SEEN, 0, header.flow, frame.Ack(0, 0, 0, ()))
        self._answer(seen)
        if stream is not None:
            self._lose_stream(stream, header.offset)
        elif self._is_peers(header.flow):
            self._admit(header.flow)

    def _finish_if_closed(self, stream: Stream) -> None:
        if stream.state is not State.CLOSED or self.streams.pop(stream.flow, None) is None:
            return
        if stream.fin_total is not None and stream.received.next_offset == stream.fin_total + 1:
            self._finished[stream.flow] = (stream.fin_total + 1, self._clock_us)
        for kept in (stream.reset_frame, stream.open_frame):
            if kept is not None:
                kept.done = True
        self._drop_buffers(stream)
        stream.close_window_if_consumed()

    def _drop_buffers(self, stream: Stream) -> None:
        """Forget what was sent and what waits to be delivered."""
        self.turns.remove(stream)
        self._blocked.pop(stream.flow, None)
        for kept in stream.sent.clear():
            if kept.kind == frame.DATA:
                self.shell.release(kept.slot)
        for piece in stream.received.clear():
            if piece is not FIN_PIECE:
                self.shell.discard(piece)

    # 4. Paths and peers

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
        self.ack_elsewhere(path)
        if all(other.stalled for other in self.paths.values()):
            for other in self.paths.values():
                other.stalled = False

    def ack_elsewhere(self, path: Path) -> None:
        """What `path` took last may not arrive, or late: streams whose latest ACK it was send that again."""
        for stream in self.streams.values():
            if stream.ack_path is path:
                stream.ack_path = None
                self._ack_now(stream)

    def on_peer_gone(self, slot: int, serial: int) -> None:
        """The other end's worker with that serial is dead, like any that had its slot before: reset their streams."""
        for stream in list(self.streams.values()):
            if frame.flow_slot(stream.flow, 1 - self.end) == slot and self._serial_age(stream, serial) >= 0:
                self._lose_stream(stream, Reason.WORKER_GONE)

    def on_roster(self, roster: dict[int, int], boot_id: int) -> None:
        """The other end's workers (slot: serial) as a new carrier found them: older ones in these slots are dead."""
        for stream in list(self.streams.values()):
            if stream.owner is not None and stream.owner[2] != boot_id:
                self._lose_stream(stream, Reason.WORKER_GONE)
                continue
            serial = roster.get(frame.flow_slot(stream.flow, 1 - self.end))
            if serial is not None and self._serial_age(stream, serial) > 0:
                self._lose_stream(stream, Reason.WORKER_GONE)

    def on_forgotten(self, owner: Owner, since_us: int) -> None:
        """`owner` does not know this session after an outage that began at `since_us`: what it had before is lost."""
        for stream in list(self.streams.values()):
            if stream.owner == owner and stream.answered and stream.opened_us < since_us:
                self._lose_stream(stream, Reason.WORKER_GONE)

    def _serial_age(self, stream: Stream, serial: int) -> int:
        """How many serials the stream's peer is older than `serial`; negative if younger.

        The owner's end knows only the low byte of the opener's.
        """
        if stream.owner is not None:
            return (serial - stream.owner[1] + (1 << 31)) % (1 << 32) - (1 << 31)
        low = (stream.flow >> 40) & 0xFF
        return (serial - low + 128) % 256 - 128

    def _lose_stream(self, stream: Stream, reason: int) -> None:
        """The peer's end of the stream is gone."""
        was_ours = stream.state is State.RESETTING
        stream.on(Input.RESET_RECEIVED)
        self._finish_if_closed(stream)
        stream.close_window()
        if not was_ours:
            self.reset_streams += 1
            self.shell.reset(stream, reason)

    def abandon(self, reason: int) -> None:
        """The session is over: reset everything without telling the peer, who cannot be reached."""
        for stream in list(self.streams.values()):
            self._lose_stream(stream, reason)
        self.acks.clear()
        self.resends.clear()
        self.answers.clear()
        self._delayed.clear()

    # 5. Time

    def on_acks_due(self, now_us: int) -> None:
        """Queue the delayed ACKs whose time has come."""
        delayed = self._delayed
        while delayed and delayed[0][0] <= now_us:
            stream = delayed.popleft()[1]
            if stream.ack_armed:
                self._ack_now(stream)

    def on_time(self, now_us: int) -> None:
        """To be called every 100 to 500 ms: stalled paths, probes, tombstones."""
        self._clock_us = now_us
        for path in list(self._busy):
            if path.stalled and now_us >= path.retry_us:
                path.stalled = False
            self._check_stall(path, now_us)
            if path.oldest() is None and not path.stalled:
                del self._busy[path]
        for stream in list(self._blocked.values()):
            if now_us >= stream.probe_due_us:
                stream.probe_wait_us = min(2 * stream.probe_wait_us, MAX_RTO_US)
                stream.probe_due_us = now_us + stream.probe_wait_us
                flags = 0 if stream.answered else frame.OPENING
                self._answer(frame.pack(frame.DATA, flags, stream.peer_serial, stream.flow, stream.sent.next_offset))
        self._expire_tombstones(now_us)

    def _check_stall(self, path: Path, now_us: int) -> None:
        """Send again what waits too long: all of it elsewhere, or one frame at a time where there is no other path.

        A frame that later ones of the same path overtook was dropped by the receiver, for want of memory: the path
        works.
        """
        while (oldest := path.oldest()) is not None and path.is_late(oldest, now_us):
            if oldest.place < path.acked_place:
                self._queue(oldest)
            elif any(other is not path and not other.stalled for other in self.paths.values()):
                path.stalled = True
                path.on_stall(now_us)
                for kept in list(path.waiting()):
                    self._queue(kept)
            elif now_us >= path.retry_us:
                path.on_stall(now_us)
                self._queue(oldest)
            else:
                break

    def _expire_tombstones(self, now_us: int) -> None:
        finished = self._finished
        while finished:
            flow = next(iter(finished))
            if now_us - finished[flow][1] <= TOMBSTONE_US:
                break
            del finished[flow]
