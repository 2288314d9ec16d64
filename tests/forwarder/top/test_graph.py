"""Areas of dots."""

import pytest

from forwarder.top.graph import area, peak


def test_braille_has_two_values_a_column_and_four_steps_a_line() -> None:
    assert area([1, 2, 3, 4, 8, 8, 6, 0], 4, 2, True) == ["  ⣿⡄", "⣠⣾⣿⡇"]
    assert area([0, 1], 1, 1, True) == ["⢸"]


def test_plain_characters_do_without_braille() -> None:
    assert area([1, 2, 3, 4, 5, 6, 0], 7, 2, False) == ["   .:# ", ".:#### "]


def test_the_latest_is_at_the_right_and_what_is_not_known_is_blank() -> None:
    assert area([9, 9, None, 3], 5, 1, False) == [" ## ."]
    assert area([3, 1, 2, 3], 2, 1, False) == [":#"]


def test_little_is_never_shown_as_nothing() -> None:
    assert area([1, 1e9], 2, 1, False) == [".#"]


@pytest.mark.parametrize("values", [[], [0, 0], [None]])
def test_nothing_is_an_empty_area(values: list[float | None]) -> None:
    assert area(values, 3, 2, True) == area(values, 3, 2, False) == ["   ", "   "]
    assert peak(values, 3, True) == 0.0
    assert area(values, 0, 1, True) == [""]


def test_peak_is_of_what_is_shown() -> None:
    values = [9.0, 1.0, None, 2.0]
    assert (peak(values, 2, True), peak(values, 2, False), peak(values, 0, True)) == (9.0, 2.0, 0.0)
