"""A fuzzer's bytes as a supply of choices."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

Choice = TypeVar("Choice")


class Source:
    """Gives out `data` from its start; at the end everything is 0 and empty, so that every input has a meaning."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __len__(self) -> int:
        return len(self._data) - self._at

    def take(self, most: int) -> bytes:
        """The next bytes, at most so many."""
        taken = self._data[self._at : self._at + most]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self))

    def block(self) -> bytes:
        """A length in one byte, then so many bytes."""
        return self.take(self.number())

    def number(self, size: int = 1) -> int:
        """The next bytes as a number, big-endian."""
        return int.from_bytes(self.take(size), "big")

    def flag(self) -> bool:
        """Yes or no."""
        return bool(self.number() & 1)

    def choose(self, choices: Sequence[Choice]) -> Choice:
        """One of at most 256."""
        return choices[self.number() % len(choices)]

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """`data` in pieces of 1 to 256 bytes, as the source says; whole once the source is empty."""
        position = 0
        while position < len(data):
            size = self.number() + 1 if len(self) else len(data)
            yield data[position : position + size]
            position += size
