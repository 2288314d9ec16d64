"""Which records of a port have been opened: the window against replay (RFC 4303, section 3.4.3, and RFC 6479).

Counters are grouped into blocks of 1,024, a bitmap each, in a ring of 65: the block of the highest counter and the 64
before it. Invariant: a counter of the last 65,536 has its bit set if and only if it was marked; older ones are never
fresh. A block is cleared when the highest counter enters its place, at most the whole ring at a time, so neither time
nor memory depends on how far a counter leaps.
"""

WINDOW = 65_536
"""Counters behind the highest one that are still taken."""

_BLOCK_BITS = 10
_BLOCK = 1 << _BLOCK_BITS
_OFFSET = _BLOCK - 1
_BLOCKS = (WINDOW >> _BLOCK_BITS) + 1


class ReplayWindow:
    """The counters opened so far. `highest` is -1 before the first.

    A counter is 0 or more, a run's count 1 or more. Check before the tag, mark after it.
    """

    __slots__ = ("_bits", "highest")

    def __init__(self) -> None:
        self.highest = -1
        self._bits = [0] * _BLOCKS

    def is_fresh(self, counter: int) -> bool:
        """Whether the counter was not marked and is not too old to tell."""
        highest = self.highest
        if counter > highest:
            return True
        if counter <= highest - WINDOW:
            return False
        return not self._bits[(counter >> _BLOCK_BITS) % _BLOCKS] >> (counter & _OFFSET) & 1

    def mark(self, counter: int) -> None:
        """Remember a counter that is fresh."""
        block = counter >> _BLOCK_BITS
        highest = self.highest
        if counter > highest:
            if block != highest >> _BLOCK_BITS:
                self._advance(counter)
            self.highest = counter
        self._bits[block % _BLOCKS] |= 1 << (counter & _OFFSET)

    def fresh_run(self, first: int, count: int) -> bool:
        """Whether `count` counters from `first` on are all fresh."""
        highest = self.highest
        if first > highest:
            return True
        if first <= highest - WINDOW:
            return False
        # What lies above the highest is fresh, and its blocks may still hold the bits of older ones.
        return not any(
            self._bits[block % _BLOCKS] & mask for block, mask in _masks(first, min(count, highest + 1 - first))
        )

    def mark_run(self, first: int, count: int) -> None:
        """Remember `count` counters from `first` on, all fresh, at most WINDOW of them."""
        last = first + count - 1
        if last > self.highest:
            self._advance(last)
        block = first >> _BLOCK_BITS
        if block == last >> _BLOCK_BITS:
            self._bits[block % _BLOCKS] |= (1 << count) - 1 << (first & _OFFSET)
            return
        for block, mask in _masks(first, count):
            self._bits[block % _BLOCKS] |= mask

    def _advance(self, highest: int) -> None:
        block = self.highest >> _BLOCK_BITS
        target = highest >> _BLOCK_BITS
        self.highest = highest
        for entered in range(max(block, target - _BLOCKS) + 1, target + 1):
            self._bits[entered % _BLOCKS] = 0


def _masks(first: int, count: int) -> list[tuple[int, int]]:
    """The blocks of a run, with the bits of the run in each."""
    masks = []
    while count:
        offset = first & _OFFSET
        taken = min(count, _BLOCK - offset)
        masks.append((first >> _BLOCK_BITS, (1 << taken) - 1 << offset))
        first += taken
        count -= taken
    return masks
