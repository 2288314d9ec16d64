"""Frames that are sent a second time before they are lost, because a path that idles would bring them sooner.

A stream that has sent all it has, or all it may, waits for its slowest path, and so may the application at the other
end: the last bytes of a transfer, or the one that holds up a full window, stand on a path that is slower than others
that idle by now. Sending such a frame again costs what nobody needs at that moment (RFC 8684, 3.3.6, leaves it to the
sender; MPTCP calls it opportunistic retransmission).
"""

from itertools import islice
from typing import TYPE_CHECKING

from workers.core.path import Path
from workers.core.retain import SentFrame

if TYPE_CHECKING:
    from workers.core.stream import Stream

STREAMS, FRAMES = 16, 256
"""So many streams, and frames of all of them together, are looked at in one call."""
SLACK_US = 5_000
"""What another path has to gain at least, on top of half its round trip."""


class Waiting:
    """The streams that wait for what they have sent."""

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: "Stream") -> None:
        """`stream` has nothing more to send now; it counts while anything of it is not received."""
        if stream.sent.frames:
            self._streams[stream.flow] = stream

    def discard(self, stream: "Stream") -> None:
        """All of it was received, or nobody waits for it."""
        self._streams.pop(stream.flow, None)

    def frame_for(self, path: Path, now_us: int) -> SentFrame | None:
        """The first frame that `path` would bring sooner than the path that has it; streams take turns."""
        streams, left = self._streams, FRAMES
        for flow in list(islice(streams, STREAMS)):
            stream = streams.pop(flow)
            streams[flow] = stream
            for kept in islice(stream.sent.unreceived(), left):
                left -= 1
                if is_sooner(kept, path, now_us):
                    return kept
        return None


def is_sooner(kept: SentFrame, path: Path, now_us: int) -> bool:
    """Whether `kept` would probably arrive earlier if it were sent on `path` again. Each frame is, at most once."""
    first = kept.path
    if first is None or first is path or kept.queued or kept.sends != 1 or not path.rtt.srtt_us:
        return False
    rtt = first.rtt if first.rtt.srtt_us else path.rtt  # unknown: taken for equal
    left_us = rtt.srtt_us - (now_us - kept.sent_us)
    if left_us < 0:
        return -left_us > 4 * rtt.rttvar_us + SLACK_US
    return left_us > path.rtt.srtt_us + path.rtt.srtt_us // 2 + SLACK_US
