"""One share with a shell that writes down what happens, so that tests read as transcripts: frames in, frames out.

A frame is shown as a line of text that keeps its bytes: "DATA 0-5 opening", "ACK 5 [10-20]", "RESET APPLICATION".
"""

from typing import Any

from workers.core import frame
from workers.core.credit import CreditPool
from workers.core.frame import Ack, Kind, Reason
from workers.core.path import Path
from workers.core.session import Owner, SessionShare
from workers.core.stream import ACK_DELAY_US, Stream

CLIENT_SERIAL, SERVER_SERIAL = 0x0501, 0x0901
BOOT = 1
FLOW = frame.flow_id(frame.CLIENT, 0, 0, CLIENT_SERIAL, 0)
OWNER: Owner = (0, SERVER_SERIAL, BOOT)


class Said(str):
    """A frame in words; `data` are its bytes."""

    __slots__ = ("data",)
    data: bytes


def said(data: bytes) -> Said:
    """The words for a frame."""
    header = frame.unpack(data)
    words = [Kind(header.kind).name]
    if header.kind == frame.ACK:
        ack = frame.unpack_ack(header, data[frame.HEADER_BYTES :])
        words.append("of RESET" if header.flags & frame.RESET_SEEN else str(ack.received))
        words.extend(f"[{start}-{end}]" for start, end in ack.ranges)
    elif header.kind == frame.DATA:
        words.append(f"{header.offset}-{header.offset + len(data) - frame.HEADER_BYTES}")
    elif header.kind == frame.FIN:
        words.append(str(header.offset))
    elif header.kind == frame.RESET:
        words.append(Reason(header.offset).name)
    if header.flags & frame.OPENING and header.kind != frame.ACK:
        words.append("opening")
    line = Said(" ".join(words))
    line.data = data
    return line


def opening(kind: int, offset: int = 0, payload: bytes = b"", *, flow: int = FLOW, serial: int = SERVER_SERIAL) -> Said:
    """A frame of a client that has had no answer yet."""
    return said(frame.pack(kind, frame.OPENING, serial, flow, offset) + payload)


def data(offset: int, payload: bytes, *, flow: int = FLOW, serial: int = SERVER_SERIAL) -> Said:
    return said(frame.pack(frame.DATA, 0, serial, flow, offset) + payload)


def fin(total: int, *, flow: int = FLOW) -> Said:
    return said(frame.pack(frame.FIN, 0, SERVER_SERIAL, flow, total))


def reset(reason: int = Reason.APPLICATION, *, flow: int = FLOW) -> Said:
    return said(frame.pack(frame.RESET, 0, SERVER_SERIAL, flow, reason))


def ack(
    received: int,
    *ranges: tuple[int, int],
    credit: int = 16 << 10,
    frames: int = 16,
    flow: int = FLOW,
    of_reset: bool = False,
) -> Said:
    flags = frame.RESET_SEEN if of_reset else 0
    return said(frame.pack_ack(flags, SERVER_SERIAL, flow, Ack(received, credit, frames, ranges)))


class Side:
    """A share and its shell. `events` is what the share told the shell, `delivered` the bytes that it gave it."""

    def __init__(
        self,
        end: int,
        *,
        pool_bytes: int = 1 << 30,
        window_cap: int = 1 << 20,
        max_streams: int = 100,
        start_us: int = 0,
    ) -> None:
        serial = CLIENT_SERIAL if end == frame.CLIENT else SERVER_SERIAL
        self.share = SessionShare(end, 0, serial, self, CreditPool(pool_bytes), window_cap, max_streams)
        self.events: list[str] = []
        self.delivered = b""
        self.now_us = start_us
        self.slots: dict[int, bytes] = {}
        self.pieces: set[bytes] = set()
        self.outgoing: dict[Stream, bytes] = {}
        self.ended: set[Stream] = set()
        self.consumes = True
        self.frame_bytes = 1000
        self._unread: list[tuple[Stream, int]] = []
        self.path = self.new_path(0)

    # Shell

    def deliver(self, stream: Stream, piece: Any, length: int) -> None:
        self.pieces.remove(piece)
        self.delivered += piece[: len(piece) - 4]
        self.events.append(f"deliver {length}")
        self._unread.append((stream, length))

    def end_of_stream(self, stream: Stream) -> None:
        self.events.append("end")

    def opened(self, stream: Stream) -> None:
        self.events.append("opened")

    def reset(self, stream: Stream, reason: int) -> None:
        self.events.append(f"reset {Reason(reason).name}")

    def release(self, slot: int) -> None:
        del self.slots[slot]

    def discard(self, piece: Any) -> None:
        self.pieces.remove(piece)
        self.events.append("discard")

    def told(self) -> list[str]:
        """The events since it was last asked."""
        events, self.events = self.events, []
        return events

    # What a test does

    def new_path(self, index: int, generation: int = 0) -> Path:
        path = Path(0, index, generation)
        self.share.add_path(path)
        return path

    def open(self, owner: Owner = OWNER) -> Stream:
        stream = self.share.open_stream(owner, self.now_us)
        assert stream is not None
        return stream

    def write(self, stream: Stream, payload: bytes) -> None:
        self.outgoing[stream] = self.outgoing.get(stream, b"") + payload
        self.share.on_readable(stream)

    def end(self, stream: Stream) -> None:
        self.ended.add(stream)
        self.share.on_readable(stream)

    def stream(self, flow: int = FLOW) -> Stream:
        return self.share.streams[flow]

    def hears(self, *lines: Said) -> None:
        """Frames arrive, and the application reads what they bring."""
        for line in lines:
            header = frame.unpack(line.data)
            body = line.data[frame.HEADER_BYTES :]
            piece, length = None, 0
            if header.kind == frame.DATA and body:
                piece, length = body + len(self.pieces).to_bytes(4, "big"), len(body)
                self.pieces.add(piece)
            kept = False
            try:
                kept = self.share.receive(header, body, piece, length, self.now_us)
            finally:
                if piece is not None and not kept:
                    self.pieces.remove(piece)
        if self.consumes:
            self.consume()

    def consume(self) -> None:
        unread, self._unread = self._unread, []
        for stream, length in unread:
            self.share.on_consumed(stream, length, 1, self.now_us)

    def says(self, path: Path | None = None, most: int = 1000) -> list[Said]:
        """All that can be sent now, on one path."""
        path = path or self.path
        lines: list[Said] = []
        while self.share.has_work and len(lines) < most:
            data = self._next_frame(path)
            if data is not None:
                lines.append(said(data))
        return lines

    def _next_frame(self, path: Path) -> bytes | None:
        share = self.share
        if share.answers:
            return share.answers.popleft()
        stream = share.ack_to_send()
        if stream is not None:
            built = stream.ack_to_send()
            share.on_ack_sent(stream, path)
            return built
        kept = share.frame_to_resend()
        if kept is None:
            stream = share.stream_to_send()
            if stream is None:
                return None
            size = stream.sendable(self.frame_bytes)
            if not size:
                share.on_blocked(stream, self.now_us)
                return None
            payload = self.outgoing.get(stream, b"")[:size]
            if not payload:
                if stream in self.ended:
                    share.on_fin(stream)
                else:
                    share.on_drained(stream)
                return None
            self.outgoing[stream] = self.outgoing[stream][len(payload) :]
            buffer = bytearray(frame.HEADER_BYTES) + payload
            slot = len(self.slots) + 1000 * len(self.events) + share.bytes_out
            kept = share.add_data(stream, len(payload), slot, memoryview(buffer))
            assert slot not in self.slots
            self.slots[slot] = bytes(buffer)
        share.on_sent(kept, path, self.now_us)
        return share.frame_bytes(kept) if kept.slot == -1 else self.slots[kept.slot]

    def passes(self, passed_us: int) -> None:
        """Time passes, with a tick every 250 ms."""
        until_us = self.now_us + passed_us
        while self.now_us < until_us:
            self.now_us = min(self.now_us + 250_000, until_us)
            self.share.on_acks_due(self.now_us)
            self.share.on_time(self.now_us)

    @property
    def empty(self) -> bool:
        """Nothing is left of any stream."""
        share = self.share
        queues = (share.streams, share.acks, share.resends, share.answers, share._blocked, self.slots, self.pieces)
        return not any(queues) and not share.turns and not len(share.waiting) and share.pool.reserved == 0


def client() -> Side:
    return Side(frame.CLIENT)


def server() -> Side:
    return Side(frame.SERVER)


def established() -> tuple[Side, Stream]:
    """A server whose client has opened FLOW and was answered."""
    side = server()
    side.hears(opening(frame.OPEN))
    assert side.says() == ["ACK 0"] and side.told() == ["opened"]
    return side, side.stream()


def answered() -> tuple[Side, Stream]:
    """A client whose stream FLOW was answered."""
    side = client()
    stream = side.open()
    assert side.says() == ["OPEN opening"] and stream.flow == FLOW
    side.hears(ack(0))
    return side, stream


def exchange(one: Side, other: Side, most: int = 50) -> None:
    """Let both talk until neither has anything to say."""
    for _ in range(most):
        lines, answers = one.says(), other.says()
        other.hears(*lines)
        one.hears(*answers)
        if not lines and not answers:
            return
        one.passes(ACK_DELAY_US)
        other.passes(ACK_DELAY_US)
    raise AssertionError("they never stop talking")
