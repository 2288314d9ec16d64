"""One worker's share of a session: its streams, and the paths that they may use. Sans-IO.

The way of a byte, and the order of this file:

1. the application opens a stream (`open_stream`), or the peer's first frame does (`_accept`);
2. what a path received comes in by `receive`; pieces in order go out by `Shell.deliver`;
3. workers of the other end come and go (`on_peer_gone`, `on_roster`);
4. time passes (`on_time`): stalled paths, probes, tombstones.

What to send, and what becomes of it, is the sending half's (`workers.core.sending`): whenever a path has room, the
shell asks for the next frame and says that it was sent. Times are whole microseconds of any monotonic clock. A `piece`
is whatever the shell needs to find the payload again.
"""

from typing import Any, Protocol

from workers.core import frame
from workers.core.closed import MAX_GAPS, Finished, SeenCounters
from workers.core.credit import INITIAL_WINDOW, CreditPool, reserve_bytes
from workers.core.errors import RemoteProtocolError
from workers.core.frame import Header, Reason
from workers.core.retain import SentFrame
from workers.core.sending import MAX_ANSWERS, Sending
from workers.core.state import Input, State
from workers.core.stream import ACK_DELAY_US, FIN_PIECE, FIN_SENT, RECEIVE_OPEN, Stream

MAX_OPENERS = 128
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


class SessionShare(Sending):
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
        super().__init__()
        self.end = end
        self.slot = slot
        self.serial = serial
        self.shell = shell
        self.pool = pool
        self.window_cap = window_cap
        self.max_streams = max_streams
        self.total_streams = self.reset_streams = 0
        self.bytes_in = 0
        self.duplicate_bytes = 0
        self.refused_streams = 0
        self.draining = False
        self._finished = Finished()
        self._seen: dict[int, SeenCounters] = {}
        self._counters: dict[int, int] = {}

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
        total = self._finished.total(flow)
        if total is not None:
            ack = frame.Ack(total, total, 0, ())
            self.answer(frame.pack_ack(0, 0, flow, ack))
            return None
        fresh = header.flags & frame.OPENING and self._is_peers(flow) and header.serial == self.serial
        if not fresh or not self._admit(flow):
            self.answer(frame.pack(frame.RESET, 0, 0, flow, Reason.UNKNOWN_FLOW))
            return None
        # ACKs of streams that are over count too: a peer may open and reset, and read nothing.
        unread = len(self.acks) > len(self.streams) + MAX_ANSWERS
        full = self.draining or unread or len(self.streams) >= self.max_streams
        if full or not self.pool.reserve(reserve_bytes(INITIAL_WINDOW)):
            reason = Reason.SHUTDOWN if self.draining else Reason.OVERLOAD
            self.refused_streams += not self.draining
            self.answer(frame.pack(frame.RESET, 0, 0, flow, reason))
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
        is_new = seen.admit(frame.flow_counter(flow))
        # In all not much more than what a single opener may leave, or a peer could invent openers.
        if seen.gaps > MAX_GAPS // MAX_OPENERS and sum(each.gaps for each in self._seen.values()) > MAX_GAPS:
            raise RemoteProtocolError(f"streams of {len(self._seen)} workers leave more than {MAX_GAPS} gaps")
        return is_new

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

    # 2. Receiving

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
            return self._on_data(stream, header, length, piece, now_us)
        if kind == frame.FIN:
            self._on_fin(stream, header.offset)
        else:
            self._ack_now(stream)
        return False

    def _on_data(self, stream: Stream, header: Header, length: int, piece: Any, now_us: int) -> bool:
        if stream.state is State.RESETTING:
            return False
        if not length or not stream.take_data(header.offset, length, piece):
            self.duplicate_bytes += length
            self._ack_now(stream)
            return False
        grown = False
        if header.flags & frame.BLOCKED:
            grown = stream.window.on_blocked(header.offset + length, stream.received.next_offset)
        self._deliver(stream)
        if grown:
            self._ack_now(stream)
        else:
            self._note_unacked(stream, now_us)
        return True

    def stream_of_next(self, header: Header, length: int) -> Stream | None:
        """The stream of a DATA frame that is the very next there: it may be delivered at once (`on_next`). None where
        that is not so: `receive` it."""
        stream = self.streams.get(header.flow)
        if not length or stream is None or stream.state not in RECEIVE_OPEN or header.flags & frame.BLOCKED:
            return None
        return stream if stream.is_next(header.offset, length) else None

    def on_next(self, stream: Stream, length: int, now_us: int) -> None:
        """What `stream_of_next` found is being delivered by the caller."""
        stream.take_next(length)
        self.bytes_in += length
        self._note_unacked(stream, now_us)

    def _note_unacked(self, stream: Stream, now_us: int) -> None:
        if stream.ack_due():
            self._ack_now(stream)
        elif not stream.ack_armed:
            stream.ack_armed = True
            self._delayed.append((now_us + ACK_DELAY_US, stream))

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

    def _on_ack(self, stream: Stream | None, header: Header, ack: frame.Ack, now_us: int) -> None:
        if stream is None:
            if not header.flags & frame.RESET_SEEN and self._finished.total(header.flow) is None:
                self.answer(frame.pack(frame.RESET, 0, 0, header.flow, Reason.UNKNOWN_FLOW))
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
                self._release(kept)
        all_received = not stream.sent.frames
        if all_received:
            self.waiting.discard(stream)
        unblocked = stream.take_credit(ack) or (newly and all_received)
        if unblocked and self._blocked.pop(stream.flow, None) is not None and stream.readable:
            self.turns.add(stream, now_us)
        if all_received and stream.state in FIN_SENT:
            stream.on(Input.FIN_ACKED)
            self._finish_if_closed(stream)

    def _release(self, kept: SentFrame) -> None:
        self.kept_bytes -= kept.length
        self.shell.release(kept.slot)

    def _on_reset(self, stream: Stream | None, header: Header) -> None:
        seen = frame.pack_ack(frame.RESET_SEEN, 0, header.flow, frame.Ack(0, 0, 0, ()))
        self.answer(seen)
        if stream is not None:
            self._lose_stream(stream, header.offset)
        elif self._is_peers(header.flow):
            self._admit(header.flow)

    def _finish_if_closed(self, stream: Stream) -> None:
        if stream.state is not State.CLOSED or self.streams.pop(stream.flow, None) is None:
            return
        if stream.fin_total is not None and stream.received.next_offset == stream.fin_total + 1:
            self._finished.add(stream.flow, stream.fin_total + 1, self._clock_us)
        for kept in (stream.reset_frame, stream.open_frame):
            if kept is not None:
                kept.done = True
        self._drop_buffers(stream)
        stream.close_window_if_consumed()

    def _drop_buffers(self, stream: Stream) -> None:
        """Forget what was sent and what waits to be delivered."""
        self.turns.remove(stream)
        self.waiting.discard(stream)
        self._blocked.pop(stream.flow, None)
        for kept in stream.sent.clear():
            if kept.kind == frame.DATA:
                self._release(kept)
        for piece in stream.received.clear():
            if piece is not FIN_PIECE:
                self.shell.discard(piece)

    # 3. The other end's workers

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
            if stream.owner == owner and stream.opened_us < since_us and _was_sent(stream):
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

    # 4. Time

    def on_time(self, now_us: int) -> None:
        """To be called every 100 to 500 ms: stalled paths, probes, tombstones."""
        self._clock_us = now_us
        self._check_paths(now_us)
        self._probe(now_us)
        self._finished.expire(now_us)


def _was_sent(stream: Stream) -> bool:
    """Whether the owner may have seen a frame of the stream: then it must not be opened a second time."""
    return stream.open_frame is None or stream.open_frame.sends > 0
