"""Keys from what a terminal sends: ASCII, and the escape sequences of cursor and paging keys (ECMA-48, xterm)."""

_ESCAPE = b"\x1b"

_FINALS = {b"A": "up", b"B": "down", b"C": "right", b"D": "left", b"H": "home", b"F": "end", b"Z": "backtab"}
_TILDES = {b"1": "home", b"7": "home", b"4": "end", b"8": "end", b"5": "page up", b"6": "page down"}
_PLAIN = {b"\r": "enter", b"\n": "enter", b" ": "space", b"\t": "tab", b"\x7f": "backspace", b"\x0c": "redraw"}
_SEQUENCE_MAX = 32


class Keys:
    """Cuts input into keys' names. A printable character is its own name; what has no name is left out."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def pending(self) -> bool:
        """Whether there is the beginning of a sequence, or the escape key alone: `flush` if nothing follows."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[str]:
        """The keys that are complete."""
        self._rest += data
        keys = []
        while self._rest:
            length = self._length()
            if not length:
                break
            key = _name(self._rest[:length])
            self._rest = self._rest[length:]
            if key:
                keys.append(key)
        return keys

    def flush(self) -> list[str]:
        """Nothing has followed for a while."""
        rest, self._rest = self._rest, b""
        return ["escape"] if rest == _ESCAPE else []

    def _length(self) -> int:
        """Of the first key; 0 if it is not complete."""
        rest = self._rest
        if rest[:1] != _ESCAPE:
            return 1
        if len(rest) < 2:
            return 0
        if rest[1:2] == b"O":
            return 3 if len(rest) >= 3 else 0
        if rest[1:2] != b"[":
            return 1 if rest[1:2] == _ESCAPE else 2
        for index in range(2, min(len(rest), _SEQUENCE_MAX)):
            if 0x40 <= rest[index] <= 0x7E:
                return index + 1
        return len(rest) if len(rest) >= _SEQUENCE_MAX else 0


def _name(sequence: bytes) -> str:
    if sequence == _ESCAPE:
        return "escape"
    if sequence[:1] == _ESCAPE:
        if sequence[-1:] == b"~":
            return _TILDES.get(sequence[2:-1].partition(b";")[0], "")
        return _FINALS.get(sequence[-1:], "") if len(sequence) > 2 else ""
    return _PLAIN.get(sequence) or (sequence.decode() if 0x20 < sequence[0] < 0x7F else "")
