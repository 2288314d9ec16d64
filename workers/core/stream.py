"""One stream: the state of a TCP connection that is carried over the paths of a session.

It has two halves that know nothing of each other (what was sent and is kept, what was received and is reordered), the
credit of both, and one state (`workers.core.state`). It decides nothing about paths: `workers.core.session` does.
"""

from typing import Any

from workers.core import frame
from workers.core.credit import INITIAL_FRAMES, INITIAL_WINDOW, CreditPool, ReceiveWindow, frames_allowed
from workers.core.errors import RemoteProtocolError
from workers.core.path import Path
from workers.core.reorder import ReorderBuffer
from workers.core.retain import SendBuffer, SentFrame
from workers.core.state import Input, State, next_state

ACK_FRAMES = 32
"""An ACK is due after so many frames, an eighth of the window, or ACK_DELAY_US."""
ACK_DELAY_US = 10_000
FIN_PIECE: Any = None
"""Stands in the reorder buffer for the FIN."""

# Tuples: `in` looks for the same object first, while a set would call Enum's __hash__.
SEND_OPEN = (State.ESTABLISHED, State.CLOSE_WAIT)
RECEIVE_OPEN = (State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2)
FIN_SENT = (State.FIN_WAIT_1, State.CLOSING, State.LAST_ACK)


class Stream:
    """`endpoint` belongs to the shell (whoever has the application's socket).

    readable: whether the application may have bytes.
    peer_serial: for the serial field of our frames: the owner's serial at the opener's end, 0 at the owner's.
    """

    __slots__ = (
        "ack_armed",
        "ack_path",
        "ack_queued",
        "answered",
        "credit",
        "deficit",
        "endpoint",
        "fin_total",
        "flow",
        "frames_allowed",
        "frames_kept_max",
        "frames_received",
        "frames_sent",
        "highest",
        "light",
        "light_bytes",
        "light_since_us",
        "open_frame",
        "opened_us",
        "owner",
        "peer_serial",
        "peer_window",
        "probe_due_us",
        "probe_wait_us",
        "readable",
        "received",
        "reset_frame",
        "scheduled",
        "sent",
        "state",
        "unacked_bytes",
        "unacked_frames",
        "window",
        "window_open",
    )

    def __init__(self, flow: int, peer_serial: int, pool: CreditPool, window_cap: int, now_us: int) -> None:
        self.flow = flow
        self.peer_serial = peer_serial
        self.opened_us = now_us
        self.owner: tuple[int, int, int] | None = None
        self.endpoint: Any = None
        self.state = State.ESTABLISHED
        self.answered = False
        # what we send
        self.sent = SendBuffer()
        self.frames_kept_max = frames_allowed(window_cap)
        self.credit = INITIAL_WINDOW
        self.frames_allowed = INITIAL_FRAMES
        self.frames_sent = 0
        self.peer_window = INITIAL_WINDOW
        self.readable = False
        self.open_frame: SentFrame | None = None
        self.reset_frame: SentFrame | None = None
        self.probe_due_us = 0
        self.probe_wait_us = 0
        self.deficit = 0
        self.scheduled = self.light = False
        self.light_bytes = 0
        self.light_since_us = now_us
        # what we receive
        self.received: ReorderBuffer[Any] = ReorderBuffer()
        self.window = ReceiveWindow(pool, window_cap, now_us)
        self.window_open = True
        self.frames_received = 0
        self.highest = 0
        self.fin_total: int | None = None
        self.unacked_bytes = 0
        self.unacked_frames = 0
        self.ack_armed = False
        self.ack_queued = False
        self.ack_path: Path | None = None

    def on(self, event: Input) -> None:
        """Move the state. Raises as `next_state`."""
        self.state = next_state(self.state, event)

    def sendable(self, frame_bytes: int) -> int:
        """How many new bytes may be sent in one frame now, at most `frame_bytes`; 0 where credit forbids.

        Small remainders of credit wait for more while something is in flight (silly window avoidance, RFC 9293,
        3.8.6.2.1).
        """
        sent = self.sent
        left = self.credit - sent.next_offset
        if left <= 0 or self.frames_sent >= self.frames_allowed or self.state not in SEND_OPEN:
            return 0
        if len(sent.frames) >= self.frames_kept_max:
            return 0
        if left >= frame_bytes:
            return frame_bytes
        if left < self.peer_window >> 2 and sent.frames:
            return 0
        return left

    def add_data(self, length: int, slot: int) -> SentFrame:
        """Keep `length` new bytes that stand in `slot`."""
        kept = SentFrame(self, frame.DATA, self.sent.next_offset, length, slot)
        self.sent.add(kept)
        self.frames_sent += 1
        return kept

    def is_blocked_after(self, length: int) -> bool:
        """Whether credit allows no other frame of that length after the next one, which has it as well."""
        return self.credit - self.sent.next_offset < 2 * length or self.frames_sent + 1 >= self.frames_allowed

    def add_fin(self) -> SentFrame:
        """The application has ended its direction."""
        self.on(Input.SEND_FIN)
        kept = SentFrame(self, frame.FIN, self.sent.next_offset, 1, -1)
        self.sent.add(kept)
        return kept

    def take_data(self, offset: int, length: int, piece: Any) -> bool:
        """Take a received piece; False for a duplicate. Raises RemoteProtocolError beyond the credit or the FIN."""
        end = offset + length
        window = self.window
        if end > window.credit or (self.fin_total is not None and end > self.fin_total):
            raise RemoteProtocolError(f"bytes up to {end}, credit {window.credit}, total {self.fin_total}")
        if self.frames_received >= window.frames and offset not in self.received:
            raise RemoteProtocolError(f"more frames than {window.frames}, which are allowed")
        if not self.received.insert(offset, length, piece):
            return False
        self.frames_received += 1
        self.highest = max(self.highest, end)
        self.unacked_bytes += length
        self.unacked_frames += 1
        return True

    def is_next(self, offset: int, length: int) -> bool:
        """Whether a piece is the very next, where none waits behind it, and within the credit."""
        received, window = self.received, self.window
        if offset != received.next_offset or received.pieces:
            return False
        return offset + length <= window.credit and self.frames_received < window.frames

    def take_next(self, length: int) -> None:
        """Count a piece for which `is_next` holds.

        The same as `take_data`, for a piece that need not be kept.
        """
        received = self.received
        self.highest = received.next_offset = received.next_offset + length
        self.frames_received += 1
        self.unacked_bytes += length
        self.unacked_frames += 1

    def take_fin(self, total: int) -> bool:
        """Take the peer's FIN; False for a duplicate. Raises RemoteProtocolError where it contradicts what came."""
        if self.fin_total is not None:
            if self.fin_total != total:
                raise RemoteProtocolError(f"FIN of {total} after one of {self.fin_total}")
            return False
        if not self.highest <= total <= self.window.credit:
            raise RemoteProtocolError(f"FIN of {total}, received {self.highest}, credit {self.window.credit}")
        self.fin_total = total
        return self.received.insert(total, 1, FIN_PIECE)

    def ack_due(self) -> bool:
        """Whether enough was received to answer at once."""
        return self.unacked_frames >= ACK_FRAMES or 8 * self.unacked_bytes >= self.window.window

    def ack_to_send(self) -> bytes:
        """The ACK as of now."""
        self.unacked_bytes = self.unacked_frames = 0
        self.ack_armed = False
        edge, ranges = self.received.received(frame.MAX_RANGES)
        credit, frames = self.window.announce() if self.window_open else (self.window.credit, self.window.frames)
        return frame.pack_ack(0, self.peer_serial, self.flow, frame.Ack(edge, credit, frames, ranges))

    def take_credit(self, ack: frame.Ack) -> bool:
        """Note what the peer allows, up to what a window may be here; True if that is more than before."""
        grown = False
        credit = min(ack.credit, ack.received + self.window.cap)
        if credit > self.credit:
            self.credit = credit
            self.peer_window = max(self.peer_window, credit - ack.received)
            grown = True
        if ack.frames > self.frames_allowed:
            self.frames_allowed = ack.frames
            grown = True
        return grown

    def close_window(self) -> None:
        """Give the stream's credit back to the pool; more than once is harmless."""
        if self.window_open:
            self.window_open = False
            self.window.close()

    def close_window_if_consumed(self) -> None:
        """The same once the application has all that the peer sent: until then that occupies what credit reserved."""
        if self.window.consumed == self.fin_total:
            self.close_window()
