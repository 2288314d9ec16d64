"""The keys of one direction of a port: a generation of 2^shift counters each, as `core.datagram` says."""

from workers.core.noise import AEADS, Aead, Suite, rekeyed

# AES-GCM: at most 2^22 records of 2^10 blocks under one key, an advantage of 2^-64 by the birthday bound.
GENERATION_SHIFT = 22


class Generations:
    """The ciphers of the generation in force, the one before it, and on demand the one after it.

    generation: the one in force, from 0. aead: its cipher. shift: counter >> shift is a counter's generation.
    """

    __slots__ = ("_key", "_next", "_previous", "_suite", "aead", "generation", "shift")

    def __init__(self, key: bytes, suite: Suite, shift: int) -> None:
        self.shift = shift
        self.generation = 0
        self.aead = AEADS[suite](key)
        self._suite = suite
        self._key = key
        self._previous: Aead | None = None
        self._next: tuple[bytes, Aead] | None = None

    def aead_of(self, ahead: int) -> Aead | None:
        """The cipher of the generation `ahead` of the one in force; None if it is not at hand."""
        if not ahead:
            return self.aead
        if ahead == -1:
            return self._previous
        return self._following()[1] if ahead == 1 else None

    def advance(self) -> None:
        """Put the next generation in force."""
        self._previous = self.aead
        self._key, self.aead = self._following()
        self._next = None
        self.generation += 1

    def _following(self) -> tuple[bytes, Aead]:
        if self._next is None:
            # Kept even if no record of it opens then: a forger makes us derive it once.
            key = rekeyed(self._key, self._suite)
            self._next = key, AEADS[self._suite](key)
        return self._next
