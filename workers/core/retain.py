"""The frames of one stream that were sent and not yet received by the other end: kept until they are.

A frame whose path dies or stalls is sent again elsewhere.

Invariant: `frames` is ordered by offset and gapless from `acknowledged` to `next_offset`.
"""

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from workers.core.errors import RemoteProtocolError

if TYPE_CHECKING:
    from workers.core.path import Path
    from workers.core.stream import Stream


class SentFrame:
    """One frame. `slot` holds header and payload; a frame without payload has none and is built anew.

    `path` took it last, `place` is its number there; `queued` while it waits to be sent (again).
    `skip`: once it is received, an offset up to which everything behind it was received as well.
    """

    __slots__ = (
        "done",
        "kind",
        "length",
        "offset",
        "path",
        "place",
        "queued",
        "sends",
        "sent_us",
        "skip",
        "slot",
        "stream",
    )

    def __init__(self, stream: "Stream", kind: int, offset: int, length: int, slot: int) -> None:
        self.stream = stream
        self.kind = kind
        self.offset = offset
        self.length = length
        self.slot = slot
        self.path: Path | None = None
        self.place = 0
        self.sent_us = 0
        self.sends = 0
        self.done = False
        self.queued = False
        self.skip = offset + length


class SendBuffer:
    """A stream's sent frames. `length` of a frame is what it occupies of the offset space (a FIN: 1).

    frames: those that are kept, to be read.
    """

    __slots__ = ("_by_offset", "acknowledged", "frames", "next_offset")

    def __init__(self) -> None:
        self.next_offset = 0
        self.acknowledged = 0
        self.frames: deque[SentFrame] = deque()
        self._by_offset: dict[int, SentFrame] = {}

    def __len__(self) -> int:
        return len(self.frames)

    def add(self, frame: SentFrame) -> None:
        """Keep the frame at `next_offset`."""
        assert frame.offset == self.next_offset
        self.frames.append(frame)
        self._by_offset[frame.offset] = frame
        self.next_offset += frame.length

    def unreceived(self) -> Iterator[SentFrame]:
        """The frames that the other end does not have, by offset."""
        return (frame for frame in self.frames if not frame.done)

    def find(self, offset: int) -> SentFrame | None:
        """The kept frame that starts at `offset`."""
        return self._by_offset.get(offset)

    def acknowledge(self, received: int, ranges: tuple[tuple[int, int], ...]) -> list[SentFrame]:
        """Note what was received; returns the frames newly received. Raises RemoteProtocolError where an ACK
        covers what was never sent or cuts a frame; then nothing was noted."""
        self._check_cut(received)
        for start, end in ranges:
            self._check_cut(start)
            self._check_cut(end)
        newly: list[SentFrame] = []
        frames, by_offset = self.frames, self._by_offset
        while frames and frames[0].offset < received:
            frame = frames.popleft()
            del by_offset[frame.offset]
            if not frame.done:
                frame.done = True
                newly.append(frame)
        self.acknowledged = max(self.acknowledged, received)
        for start, end in ranges:
            if start < self.acknowledged:
                continue  # an ACK that a later one overtook
            offset = start
            while offset < end:
                frame = by_offset[offset]
                if not frame.done:
                    frame.done = True
                    newly.append(frame)
                offset = frame.skip
            by_offset[start].skip = max(offset, by_offset[start].skip)
        return newly

    def _check_cut(self, offset: int) -> None:
        if offset > self.acknowledged and offset != self.next_offset and offset not in self._by_offset:
            raise RemoteProtocolError(f"ACK of {offset}, where no frame ends; {self.next_offset} was sent")

    def clear(self) -> list[SentFrame]:
        """Forget everything; returns the frames that were not yet received (now marked done)."""
        rest = [frame for frame in self.frames if not frame.done]
        for frame in rest:
            frame.done = True
        self.frames.clear()
        self._by_offset.clear()
        return rest
