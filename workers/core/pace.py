"""How much a stripe holds unsent, and how long its frames are: both follow its rate."""

UNSENT_INITIAL = 64 << 10
UNSENT_MIN = 16 << 10
UNSENT_MAX = 1 << 20
UNSENT_S = 0.020
"""A stripe holds at most so many seconds of unsent data: late binding, with enough to bridge a turn of the event
loop."""
UNSENT_DRY_S = 0.064
MORE_SLACK, LESS_SLACK = 1.25, 0.97
"""A stripe that ran dry before its turn came gets more next time, up to UNSENT_DRY_S; one that did not, less."""
FRAME_INITIAL = 16 << 10
FRAME_MIN = 4 << 10
FRAME_SHARE = 0.8
"""A frame is at most so much of the unsent data (16 ms, as a rule): short enough not to hold up the others."""


class Pace:
    """What one stripe is measured to carry (`rate_bps`, bits a second), and what follows: `unsent_limit` and
    `frame_bytes`."""

    __slots__ = ("_slack_s", "frame_bytes", "rate_bps", "unsent_limit")

    def __init__(self, frame_max_bytes: int) -> None:
        self.rate_bps = 0.0
        self.unsent_limit = UNSENT_INITIAL
        self.frame_bytes = min(FRAME_INITIAL, frame_max_bytes)
        self._slack_s = UNSENT_S

    def on_turn(self, unsent: int) -> None:
        """The stripe had waited for room; when its turn came, so many bytes were left."""
        slack_s = self._slack_s * (LESS_SLACK if unsent else MORE_SLACK)
        self._slack_s = min(max(slack_s, UNSENT_S), UNSENT_DRY_S)

    def on_sample(self, delivery_bps: float, window_bps: float, app_limited: bool, frame_max_bytes: int) -> bool:
        """Take a measurement; whether `unsent_limit` has changed, which it does by a quarter or more.

        What was delivered while there was little to send says too little: then the window counts, up to twice the
        rate so far.
        """
        rate = delivery_bps
        if app_limited:
            rate = max(rate, min(window_bps, 2 * self.rate_bps or window_bps))
        self.rate_bps = rate
        unsent = rate / 8 * self._slack_s
        size = FRAME_MIN
        while size < frame_max_bytes and 2 * size <= unsent * FRAME_SHARE:
            size *= 2
        self.frame_bytes = min(size, frame_max_bytes)
        limit = int(min(max(unsent, UNSENT_MIN), UNSENT_MAX))
        if 3 * self.unsent_limit < 4 * limit < 5 * self.unsent_limit:
            return False
        self.unsent_limit = limit
        return True
