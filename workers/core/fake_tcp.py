"""The numbers of one fake-TCP connection: sequence, acknowledgement, window and timestamps of what is sent.

The kernel has made the connection and then knows no more of it. Middleboxes on the way still follow it, and drop what
leaves the windows that the two ends show each other. Linux' conntrack (nf_conntrack_proto_tcp.c, tcp_in_window, with
nf_conntrack_tcp_be_liberal=0) is the strictest of them, and gives the rules:

- Sequence numbers go on from the handshake by what is sent. Nothing lies past what the peer has allowed: the largest
  acknowledgement + window that came from it. What is lost is not sent again; new data comes under new numbers.
- The acknowledgement is the highest end of what came, holes or not, and never of what did not come.
- The window is constant, the most that the scale can say: datagrams wait nowhere, so it stands for no memory. An
  acknowledgement goes out with each run, by itself after a quarter of that window and soon after the peer falls silent.
- Flags are ACK alone: a run whose last segment carries PSH may be read with that segment first.
- Where a whole window was lost, nothing new may be sent, and nothing comes that would allow it. A probe under the
  numbers of the last bytes sent (TCP's own tail loss probe, RFC 8985, section 7) lies inside every window; its
  acknowledgement opens the whole window again.

A run counts as received only once a record in it has opened (`on_run`): a forged segment must not move the
acknowledgement, or a middlebox drops all that follows. What a segment without payload allows is taken (`on_bare`) if
it acknowledges nothing that was never sent: a forger gains one window for us.
"""

from workers.core.tcp_header import ACK, FIN, RST, SYN, Header, Segment, Template

WINDOW = 65_535
"""The advertised window before scaling."""
INITIAL_PEER_WINDOW = 14_600
"""Assumed until the peer's first segment is seen: the initial window of RFC 6928, ten segments."""
ACK_IDLE_US = 40_000
"""As the kernel's shortest delayed acknowledgement (TCP_DELACK_MIN)."""
ACK_MOST_US = 500_000
"""Longest delay of an acknowledgement (RFC 9293, section 3.8.6.3)."""
_SCALE_MAX = 14  # RFC 7323, 2.3

_NUMBERS = 1 << 32
_MASK = _NUMBERS - 1
_HALF = 1 << 31


def later(one: int, other: int) -> int:
    """The later of two values of a timestamp clock that are close to each other."""
    return one if (one - other) & _MASK < _HALF else other


class FakeTcp:
    """State of one connection, and the headers of what it sends. Nothing is counted as sent before `on_sent`.

    Numbers inside are unwrapped: they go on past 32 bits.
    """

    __slots__ = (
        "_acknowledged",
        "_clock_ms",
        "_first_owed_us",
        "_header",
        "_last_came_us",
        "_limit",
        "_next",
        "_owes",
        "_peer_scale",
        "_quarter",
        "_received",
        "_tsecr",
    )

    def __init__(
        self,
        template: Template,
        *,
        own_scale: int,
        peer_scale: int,
        with_timestamps: bool,
        clock_ms: int,
        now_us: int,
        peer_window: int = INITIAL_PEER_WINDOW,
    ) -> None:
        """Go on where the template ends.

        own_scale, peer_scale: shifts of the window sent and received, 0 where not both ends offered one. clock_ms: what
        the connection's timestamp clock shows at `now_us`. peer_window: bytes, scaled, that the peer's last segment
        allowed; a guess if that was not seen.
        """
        assert 0 <= own_scale <= _SCALE_MAX and 0 <= peer_scale <= _SCALE_MAX
        self._header = Header(template, with_timestamps)
        self._next = template.next_sequence
        self._limit = self._next + peer_window
        self._peer_scale = peer_scale
        self._received = self._acknowledged = template.acknowledged
        self._quarter = (WINDOW << own_scale) // 4
        self._clock_ms = clock_ms - now_us // 1000
        self._tsecr = template.tsecr
        self._owes = False
        self._first_owed_us = self._last_came_us = 0

    @property
    def overhead_bytes(self) -> int:
        """IP and TCP header: the path MTU less this is the largest segment."""
        return self._header.overhead_bytes

    @property
    def max_run_bytes(self) -> int:
        """The most payload of one run."""
        return self._header.max_run_bytes

    @property
    def room_bytes(self) -> int:
        """How much may be sent before the peer allows more."""
        return max(self._limit - self._next, 0)

    def may_send(self, size: int) -> bool:
        """Whether `size` bytes stay inside what the peer has allowed. If not, only a probe may go."""
        return self._next + size <= self._limit

    def use_link(self, link: bytes) -> None:
        """Send to another next hop from now on: `link` is the new link header."""
        self._header.use_link(link)

    # Sending

    def run_to_send(self, size: int, segment: int, now_us: int) -> bytes:
        """The headers of a run of `size` bytes in segments of `segment`, the last of which may be shorter.

        `may_send(size)` holds. Call `on_sent(size)` once the run is gone; if it cannot go now, ask again later.
        """
        assert self._next + size <= self._limit
        return self._build(size, segment, self._next, ACK, now_us)

    def probe_to_send(self, size: int, now_us: int) -> bytes:
        """The headers of one segment that may go although nothing new may. It takes no new numbers: `on_sent(0)`."""
        return self._build(size, size, self._next - size, ACK, now_us)

    def ack_to_send(self, now_us: int) -> bytes:
        """The whole frame of a bare acknowledgement. Call `on_sent(0)` once it is gone."""
        return self._build(0, 0, self._next, ACK, now_us)

    def fin_to_send(self, now_us: int) -> bytes:
        """The whole frame that ends the connection; nothing may be sent after it but the same again."""
        return self._build(0, 0, self._next, ACK | FIN, now_us)

    def _build(self, size: int, segment: int, sequence: int, flags: int, now_us: int) -> bytes:
        tsval = (self._clock_ms + now_us // 1000) & _MASK
        received = self._received & _MASK
        return self._header.for_run(size, segment, sequence & _MASK, received, WINDOW, tsval, self._tsecr, flags)

    def on_sent(self, size: int) -> None:
        """Count a run of `size` new bytes as sent, and with it the acknowledgement that it carried."""
        self._next += size
        self._acknowledged = self._received
        self._owes = False

    # Receiving

    def on_run(self, segment: Segment, now_us: int) -> bool:
        """Take a segment of which a record has opened; return whether an acknowledgement is due at once."""
        self.on_bare(segment)
        received = self._received
        ahead = (segment.sequence + segment.length - received + _HALF & _MASK) - _HALF
        if ahead > 0:
            self._received = received = received + ahead
        tsval = segment.tsval
        if tsval is not None and (tsval - self._tsecr) & _MASK < _HALF:
            self._tsecr = tsval
        self._last_came_us = now_us
        if not self._owes:
            self._owes = True
            self._first_owed_us = now_us
        return received - self._acknowledged >= self._quarter

    def on_bare(self, segment: Segment) -> None:
        """Take what the peer allows with a segment, authentic or not. What it acknowledges must have been sent."""
        if segment.flags & (ACK | RST) == ACK:
            # What was never sent comes out as nearly 2^32 behind, and allows nothing.
            behind = self._next - segment.acknowledged & _MASK
            window = segment.window if segment.flags & SYN else segment.window << self._peer_scale
            self._limit = max(self._limit, self._next - behind + window)

    def is_plausible(self, segment: Segment) -> bool:
        """Whether the peer could have sent it: a FIN or RST elsewhere than in or near the window is forged or stale."""
        ahead = (segment.sequence - self._received + _HALF & _MASK) - _HALF
        return -4 * self._quarter <= ahead <= 4 * self._quarter

    @property
    def next_ack_us(self) -> int | None:
        """When a bare acknowledgement is to be sent: None for never, unless something comes."""
        if not self._owes:
            return None
        if self._received - self._acknowledged >= self._quarter:
            return self._last_came_us
        return min(self._last_came_us + ACK_IDLE_US, self._first_owed_us + ACK_MOST_US)
