"""Which numbered datagrams of one conversation and direction have come: the second copy of each is dropped.

A number is 32 bits and wraps. It is taken for the one, among those that look like it, that lies nearest to the highest
number seen, and then, counted from that highest one downwards:

    ahead, or 0..WINDOW - 1 behind    new, unless it has come before
    WINDOW..RESTART - 1 behind        too late to tell: counts as a copy
    RESTART and more behind           the sender has begun anew, at a number of its own choice: new, all else forgotten

A sender begins anew when its worker was replaced, or when it had closed the conversation and this end had not. It may
begin at any number, so that this falls among the late ones once in 2^14 times, and into the window once in 2^16.

Invariant: `_blocks` holds, for each block of `BLOCK` numbers of which one came and which the window still touches, the
set of those that came as the bits of an integer. A conversation that is idle or in order costs one or two such blocks.
"""

SEQUENCE_BITS = 32
WINDOW = 1 << 16
"""What a fast path may be ahead of a slow one: 0.65 s at 100,000 datagrams a second."""
RESTART = 1 << 18
"""No copy is this late: 2.6 s at that rate."""

SHIFT = 10
BLOCK = 1 << SHIFT
_OFFSET = BLOCK - 1
_MASK = (1 << SEQUENCE_BITS) - 1
_HALF = 1 << (SEQUENCE_BITS - 1)


class SequenceWindow:
    """The numbers of one conversation and direction. Memory: at most WINDOW / BLOCK + 2 blocks, whatever the gaps."""

    __slots__ = ("_blocks", "_highest")

    def __init__(self) -> None:
        self._highest = 0  # unwrapped: it goes on past 2^32, and below 0 for what precedes the first
        self._blocks: dict[int, int] = {}

    def has(self, sequence: int) -> bool:
        """Whether `admit` would refuse `sequence` now."""
        behind = self._behind(sequence)
        if behind >= WINDOW:
            return behind < RESTART
        place = self._highest - behind
        return bool(self._blocks.get(place >> SHIFT, 0) >> (place & _OFFSET) & 1)

    def _behind(self, sequence: int) -> int:
        """How far below the highest number it lies; negative above it."""
        if not self._blocks:
            return RESTART
        return _HALF - 1 - ((sequence - self._highest + _HALF - 1) & _MASK)

    def admit(self, sequence: int) -> bool:
        """Whether `sequence` (0..2^32 - 1) is new; from now on it is not."""
        highest, blocks = self._highest, self._blocks
        place = highest + ((sequence - highest + _HALF - 1) & _MASK) - _HALF + 1
        if highest - place >= WINDOW or not blocks:
            if blocks and highest - place < RESTART:
                return False
            blocks.clear()
            self._highest = highest = place = sequence
        number = place >> SHIFT
        bits = blocks.get(number)
        bit = 1 << (place & _OFFSET)
        if bits is not None and bits & bit:
            return False
        if place > highest:
            self._highest = place
        if bits is None:
            self._forget_old_blocks()
            bits = 0
        blocks[number] = bits | bit
        return True

    def _forget_old_blocks(self) -> None:
        """Drop the blocks that the window has left. Only a new block calls this, so it costs little per number."""
        blocks, lowest = self._blocks, (self._highest - WINDOW + 1) >> SHIFT
        for number in [number for number in blocks if number < lowest]:
            del blocks[number]
