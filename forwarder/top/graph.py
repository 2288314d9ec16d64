"""Throughput lines: values over time as an area of dots, the latest at the right."""

from collections.abc import Sequence

_BRAILLE = 0x2800
_LEFT = (0x40, 0x44, 0x46, 0x47)  # of a braille cell: the lowest dots of its left half, 1 to 4 of them
_RIGHT = (0x80, 0xA0, 0xB0, 0xB8)
_PLAIN = " .:#"


def peak(values: Sequence[float | None], width: int, braille: bool) -> float:
    """The greatest value that `area` shows in so many columns."""
    return max((value or 0.0 for value in _shown(values, width, braille)), default=0.0)


def area(values: Sequence[float | None], width: int, height: int, braille: bool) -> list[str]:
    """`height` lines of `width` characters, the top one first; the greatest value shown reaches the top.

    Braille has two values a column, four steps a line; plain characters have one and three. A value above nothing is
    never shown as nothing, and None always is.
    """
    shown = _shown(values, width, braille)
    top = max((value or 0.0 for value in shown), default=0.0)
    steps = height * (4 if braille else 3)
    levels = [max(1, round(value / top * steps)) if value else 0 for value in shown]
    levels = [0] * (width * (2 if braille else 1) - len(levels)) + levels
    return [_line(levels, line, braille) for line in range(height - 1, -1, -1)]


def _shown(values: Sequence[float | None], width: int, braille: bool) -> list[float | None]:
    count = width * (2 if braille else 1)
    return list(values)[-count:] if count else []


def _line(levels: Sequence[int], line: int, braille: bool) -> str:
    """The line that begins `line` lines above the lowest."""
    if not braille:
        return "".join(_PLAIN[min(max(level - line * 3, 0), 3)] for level in levels)
    dots = [min(max(level - line * 4, 0), 4) for level in levels]
    cells = zip(dots[::2], dots[1::2], strict=True)
    masks = (_half(_LEFT, left) | _half(_RIGHT, right) for left, right in cells)
    return "".join(chr(_BRAILLE | mask) if mask else " " for mask in masks)


def _half(masks: Sequence[int], dots: int) -> int:
    return masks[dots - 1] if dots else 0
