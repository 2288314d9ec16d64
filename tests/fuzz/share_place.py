"""A worker's share of a session with everybody around it: shell, peer, application, paths and clock.

All of them do what a fuzzer's input says; `check` and `check_end` say what has to hold whatever they do.
"""

import struct
from typing import Any

from tests.fuzz.source import Source
from workers.core import frame, sending
from workers.core.credit import CreditPool
from workers.core.errors import RemoteProtocolError
from workers.core.frame import HEADER_BYTES, Reason
from workers.core.path import Path
from workers.core.session import SessionShare
from workers.core.state import State
from workers.core.stream import SEND_OPEN, Stream

SLOT, SERIAL, PEER_SERIAL, BOOT = 0, 0x0901, 0x0501, 1
POOL_BYTES = 1 << 20
MAX_STREAMS = 8
MIN_SLOT = 4096


class Piece:
    """A payload that the share took."""

    __slots__ = ("given", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self.given = False


class Place:
    """The share, its shell, and who plays the peer."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.end = source.choose((frame.SERVER, frame.CLIENT))
        self.share = SessionShare(self.end, SLOT, SERIAL, self, CreditPool(POOL_BYTES), 1 << 17, MAX_STREAMS)
        self.now_us = 0
        self.pieces: set[Piece] = set()
        self.unread: dict[Stream, list[Piece]] = {}
        self.ended: set[Stream] = set()
        self.over: set[Stream] = set()
        self.slots: dict[int, SentParts] = {}
        self.next_slot = 0
        self.generation = 0
        self.paths: list[Path] = []
        self.handed = Path(1, -1, 0)
        self.flows: list[int] = []
        self.add_path()

    # Shell

    def deliver(self, stream: Stream, piece: Piece, length: int) -> None:
        """See Shell."""
        assert piece in self.pieces and not piece.given and piece.length == length
        assert stream not in self.ended and stream not in self.over, "delivered after the end"
        piece.given = True
        self.unread.setdefault(stream, []).append(piece)

    def end_of_stream(self, stream: Stream) -> None:
        """See Shell."""
        assert stream not in self.ended and stream not in self.over
        self.ended.add(stream)

    def opened(self, stream: Stream) -> None:
        """See Shell. As the product's client does, refuse."""
        if self.end == frame.CLIENT:
            raise RemoteProtocolError("stream opened towards a client")
        assert self.share.streams[stream.flow] is stream

    def reset(self, stream: Stream, reason: int) -> None:
        """See Shell. The endpoint closes, and frees what it has."""
        assert stream not in self.over, "reset twice"
        self.over.add(stream)
        self.pieces.difference_update(self.unread.pop(stream, ()))

    def release(self, slot: int) -> None:
        """See Shell."""
        del self.slots[slot]

    def discard(self, piece: Any) -> None:
        """See Shell."""
        assert not piece.given
        self.pieces.remove(piece)

    # The input's choices

    def add_path(self) -> None:
        """A stripe comes up."""
        self.generation += 1
        path = Path(0, self.source.number() & 3, self.generation)
        self.paths.append(path)
        self.share.add_path(path)

    def lose_path(self) -> None:
        """A stripe dies."""
        self.share.lose_path(self.paths.pop(self.source.number() % len(self.paths)))
        if not self.paths:
            self.add_path()

    def flow(self) -> int:
        """One that is known, a new one, or any."""
        how = self.source.number()
        if how < 160 and self.flows:
            return self.flows[how % len(self.flows)]
        if how < 250:
            counter = how % 160 >> 2 if how < 240 else self.source.number(5)
            flow = frame.flow_id(frame.CLIENT, how & 1, SLOT, PEER_SERIAL + (how & 3), counter)
        else:
            flow = self.source.number(8)
        self.flows = [flow, *self.flows][:8]
        return flow

    def offset(self, flow: int) -> int:
        """One at which something begins or ends, near one, or any."""
        stream = self.share.streams.get(flow)
        how = self.source.number()
        if stream is None or how >= 240:
            return self.source.number(8 if how >= 250 else 2)
        edges = (
            stream.received.next_offset,
            stream.highest,
            stream.sent.next_offset,
            stream.sent.acknowledged,
            stream.window.credit,
            0,
        )
        return max(edges[how % 6] + (0, 1, -1, 1000)[how // 6 % 4], 0)

    def hear(self, data: bytes) -> None:
        """A frame arrives; a path that brings nonsense is closed."""
        source = self.source
        try:
            header = frame.unpack(data)
        except RemoteProtocolError:
            return
        if header.kind >= frame.GONE or frame.flow_slot(header.flow, self.end) != SLOT:
            return  # the carrier's, or another worker's
        piece, length, body = None, 0, data[HEADER_BYTES:]
        if header.kind == frame.DATA and body:
            how = source.number()
            length = len(body) if how & 1 else len(body) * 64
            if how & 2 and self.pass_on(header, length):
                return
            piece = Piece(length)
            self.pieces.add(piece)
        kept = False
        try:
            kept = self.share.receive(header, body, piece, length, self.now_us)
        except RemoteProtocolError:
            self.lose_path()
        finally:
            if piece is not None and not kept:
                self.pieces.remove(piece)

    def pass_on(self, header: frame.Header, length: int) -> bool:
        """The application takes a small piece at once, if it is the next."""
        stream = self.share.streams.get(header.flow)
        if stream is None or stream in self.unread:
            return False
        if self.share.stream_of_next(header, length) is not stream:
            return False
        self.share.on_next(stream, length, self.now_us)
        assert stream not in self.ended and stream not in self.over, "delivered after the end"
        self.share.on_consumed(stream, length, 1, self.now_us)
        return True

    def hear_frame(self) -> None:
        """One of each kind, with a flow and an offset that mean something."""
        source = self.source
        kind = source.choose((frame.OPEN, frame.DATA, frame.DATA, frame.DATA, frame.FIN, frame.RESET))
        flow = self.flow()
        flags, size = source.number(), 0
        if kind == frame.DATA:
            size, flags = flags >> 2, flags & 3
        offset = source.number() if kind == frame.RESET else self.offset(flow)
        serial = SERIAL if flags != 255 else source.number(4)
        self.hear(frame.HEADER.pack(kind, flags & 3, 0, serial, flow, offset & (2**64 - 1)) + bytes(size))

    def hear_ack(self) -> None:
        """With credit and ranges of the input's choice."""
        source, flow = self.source, self.flow()
        how = source.number()
        received = self.offset(flow)
        credit = source.number(source.choose((2, 3, 8)))
        ranges, edge = [], received
        for _ in range(how >> 1 & 7):
            start = edge + source.number()
            edge = start + source.number()
            ranges.append((start, edge))
        ack = frame.Ack(received, received + credit, source.number(source.choose((1, 2, 8))), tuple(ranges))
        try:
            data = frame.pack_ack(how & 1, SERIAL, flow, ack)
        except struct.error:
            return
        self.hear(data)

    def hear_bytes(self) -> None:
        """A record's plaintext of any content."""
        self.hear(self.source.block())

    def open(self) -> None:
        """The application at a client connects."""
        if self.end == frame.CLIENT:
            stream = self.share.open_stream((SLOT, PEER_SERIAL, BOOT), self.now_us)
            if stream is not None:
                self.flows = [stream.flow, *self.flows][:8]
                self.share.on_readable(stream)

    def stream(self) -> Stream | None:
        """One of those that are open."""
        streams = list(self.share.streams.values())
        return self.source.choose(streams) if streams else None

    def write(self) -> None:
        """The application has bytes, or ends its direction."""
        stream = self.stream()
        if stream is None:
            return
        if self.source.flag() and stream.state in SEND_OPEN:
            self.share.on_fin(stream)
        else:
            self.share.on_readable(stream)

    def read(self) -> None:
        """The application reads all that one stream brought."""
        if not self.unread:
            return
        stream = self.source.choose(list(self.unread))
        pieces = self.unread.pop(stream)
        self.pieces.difference_update(pieces)
        self.share.on_consumed(stream, sum(piece.length for piece in pieces), len(pieces), self.now_us)

    def break_off(self) -> None:
        """The application's connection breaks."""
        stream = self.stream()
        if stream is not None:
            self.share.reset_stream(stream, Reason.APPLICATION)

    def send(self) -> None:
        """A path, or another worker, takes some frames."""
        path = self.source.choose((*self.paths, self.handed))
        for _ in range(self.source.number() & 15):
            if not self._send_one(path):
                break

    def _send_one(self, path: Path) -> bool:
        share = self.share
        if share.answers:
            frame.unpack(share.answers.popleft())
            return True
        stream = share.ack_to_send()
        if stream is not None:
            header = frame.unpack(data := stream.ack_to_send())
            frame.unpack_ack(header, data[HEADER_BYTES:])
            share.on_ack_sent(stream, path)
            return True
        kept = share.frame_to_resend()
        if kept is None:
            kept = self._next_data()
            if kept is None:
                return False
        elif kept.slot < 0:
            frame.unpack(share.frame_bytes(kept))
        else:
            assert kept.slot in self.slots, "sent again after it was released"
        share.on_sent(kept, path, self.now_us)
        return True

    def _next_data(self) -> Any:
        share = self.share
        stream = share.stream_to_send()
        if stream is None:
            return None
        size = stream.sendable(4096)
        if not size:
            share.on_blocked(stream, self.now_us)
            return None
        length = min(size, self.source.number() * 16)
        if not length:
            share.on_drained(stream)
            return None
        self.next_slot += 1
        self.slots[self.next_slot] = SentParts(length)
        return share.add_data(stream, length, self.next_slot, memoryview(bytearray(HEADER_BYTES)))

    def bind(self) -> None:
        """The other worker says where a frame went, or gives it back."""
        waiting = list(self.handed.waiting())
        if not waiting:
            return
        kept = self.source.choose(waiting)
        if self.share.find_kept(kept.stream.flow, kept.kind, kept.offset) is not kept:
            return
        if self.source.flag():
            self.share.on_bound(kept, self.source.choose(self.paths), self.now_us)
        else:
            self.share.send_again(kept)

    def pass_time(self) -> None:
        """From a millisecond to minutes."""
        self.now_us += (1000, 10_000, 100_000, 1_000_000, 70_000_000)[self.source.number() % 5]
        self.share.on_acks_due(self.now_us)
        self.share.on_time(self.now_us)

    def lose_peers(self) -> None:
        """Workers of the other end are gone, as GONE, a roster or a handshake says."""
        how = self.source.number()
        slot, serial = how >> 2 & 1, PEER_SERIAL + (how >> 4)
        if how & 3 == 0:
            self.share.on_peer_gone(slot, serial)
        elif how & 3 == 1:
            self.share.on_roster({slot: serial}, BOOT)
        elif how & 3 == 2:
            self.share.on_roster({slot: serial}, BOOT + 1)
        else:
            self.share.on_forgotten((slot, PEER_SERIAL, BOOT), self.now_us)

    # What holds at all times, and at the end

    def check(self) -> None:
        """Bounds and balances."""
        share = self.share
        occupied = sum(max(2 * piece.length, MIN_SLOT) for piece in self.pieces)
        assert occupied <= share.pool.reserved <= POOL_BYTES, "more received than credit reserves"
        assert len(share.streams) <= MAX_STREAMS and len(share.answers) <= sending.MAX_ANSWERS
        assert len(share.acks) <= 2 * MAX_STREAMS + sending.MAX_ANSWERS, "ACKs of closed streams pile up"
        assert share.kept_bytes == sum(each.length for each in self.slots.values())
        for stream in share.streams.values():
            assert stream.state is not State.CLOSED
            window = stream.window
            assert stream.highest <= window.credit and stream.frames_received <= window.frames, "beyond the credit"
            assert len(stream.received.ranges) <= stream.window.frames + 1, "more pieces than credit allows"

    def check_end(self) -> None:
        """The session ends: nothing is left of any stream."""
        share = self.share
        for stream in list(self.unread):
            self.pieces.difference_update(pieces := self.unread.pop(stream))
            share.on_consumed(stream, sum(piece.length for piece in pieces), len(pieces), self.now_us)
        share.abandon(Reason.TIMEOUT)
        assert not share.streams and not self.slots and not share.kept_bytes
        assert not self.pieces, "pieces were lost"
        assert not share.pool.reserved, "credit was lost"
        assert not share._blocked and not share.has_work


class SentParts:
    """A slot that holds a frame that was sent."""

    __slots__ = ("length",)

    def __init__(self, length: int) -> None:
        self.length = length
