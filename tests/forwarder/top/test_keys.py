"""Keys from the bytes of a terminal."""

import pytest

from forwarder.top.keys import Keys

NAMED = [
    (b"q", "q"),
    (b"?", "?"),
    (b" ", "space"),
    (b"\r", "enter"),
    (b"\n", "enter"),
    (b"\x0c", "redraw"),
    (b"\x1b[A", "up"),
    (b"\x1bOB", "down"),
    (b"\x1b[C", "right"),
    (b"\x1b[1;5D", "left"),
    (b"\x1b[5~", "page up"),
    (b"\x1b[6;2~", "page down"),
    (b"\x1b[H", "home"),
    (b"\x1b[4~", "end"),
]


@pytest.mark.parametrize(("data", "key"), NAMED)
def test_key_has_a_name_whole_and_byte_by_byte(data: bytes, key: str) -> None:
    assert Keys().feed(data) == [key]
    keys = Keys()
    assert [each for byte in data for each in keys.feed(bytes([byte]))] == [key]
    assert not keys.pending


def test_many_keys_at_once() -> None:
    assert Keys().feed(b"".join(data for data, _ in NAMED)) == [key for _, key in NAMED]


@pytest.mark.parametrize("data", ["ä€".encode(), b"\x00\x01\x03", b"\x1b[?1;2c", b"\x1bx", b"\x1b[200~", b"\x1bOP"])
def test_what_has_no_name_is_left_out(data: bytes) -> None:
    assert Keys().feed(data + b"q") == ["q"]


def test_escape_alone_is_a_key_once_nothing_follows() -> None:
    keys = Keys()
    assert keys.feed(b"\x1b") == [] and keys.pending
    assert keys.flush() == ["escape"] and not keys.pending
    assert keys.feed(b"\x1b[") == [] and keys.flush() == [] and keys.feed(b"A") == ["A"]


def test_sequence_without_an_end_does_not_stay() -> None:
    keys = Keys()
    keys.feed(b"\x1b[" + b"1" * 100)
    assert len(keys.feed(b"q")) >= 1
