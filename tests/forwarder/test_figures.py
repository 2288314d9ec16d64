"""Figures as people read them."""

import pytest

from forwarder.figures import amount, duration, memory, percent, rate, trip


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1536, "1.54 kB"),
        (999_500, "1.00 MB"),
        (10 * 10**9, "10.0 GB"),
        (3 * 10**18, "3000 PB"),
    ],
)
def test_amount_has_three_figures(count_bytes: int, text: str) -> None:
    assert amount(count_bytes) == text


def test_memory_has_binary_units() -> None:
    assert [memory(0), memory(1023), memory(1536), memory((1 << 20) - 1)] == ["0 B", "1023 B", "1.50 KiB", "1.00 MiB"]


@pytest.mark.parametrize(
    ("bits_a_second", "text"),
    [(None, "-"), (0, "0 bit/s"), (0.4, "0 bit/s"), (95.5e6, "95.5 Mbit/s"), (999.6e6, "1.00 Gbit/s")],
)
def test_rate(bits_a_second: float | None, text: str) -> None:
    assert rate(bits_a_second) == text


@pytest.mark.parametrize(
    ("time_ms", "text"),
    [(None, "-"), (0.079, "0.08 ms"), (1, "1.00 ms"), (12.34, "12.3 ms"), (999.4, "999 ms"), (1250, "1.25 s")],
)
def test_trip(time_ms: float | None, text: str) -> None:
    assert trip(time_ms) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (None, "-"),
        (0, "0 %"),
        (0.00001, "0 %"),
        (0.0004, "0.04 %"),
        (0.00999, "1.0 %"),
        (0.012, "1.2 %"),
        (0.0996, "10 %"),
        (1, "100 %"),
    ],
)
def test_percent(ratio: float | None, text: str) -> None:
    assert percent(ratio) == text


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3600, "1 h 0 min"),
        (90061, "1 d 1 h"),
        (86400 * 400, "400 d 0 h"),
    ],
)
def test_duration_has_two_units(time_s: float, text: str) -> None:
    assert duration(time_s) == text
