"""Figures as an operator reads them: `95.5 Mbit/s`, `1.5 GB`, `12.3 ms`, `0.4 %`, `1 h 2 min`.

Three figures, decimal units for what is carried and binary ones for memory. What is not known is a dash.
"""

UNKNOWN = "-"

_RATES = ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s")
_AMOUNTS = ("B", "kB", "MB", "GB", "TB", "PB")
_MEMORY = ("B", "KiB", "MiB", "GiB", "TiB")


def rate(bits_a_second: float | None) -> str:
    """`0 bit/s`, `95.5 Mbit/s`."""
    return UNKNOWN if bits_a_second is None else _scaled(bits_a_second, 1000, _RATES)


def amount(count_bytes: int) -> str:
    """Bytes carried: `999 B`, `1.5 MB`."""
    return _scaled(count_bytes, 1000, _AMOUNTS)


def memory(count_bytes: int) -> str:
    """Bytes kept: `64 MiB`."""
    return _scaled(count_bytes, 1024, _MEMORY)


def trip(time_ms: float | None) -> str:
    """A round-trip time: `0.21 ms`, `12.3 ms`, `1.5 s`."""
    if time_ms is None:
        return UNKNOWN
    if time_ms < 999.5:
        return f"{_three(time_ms)} ms"
    return f"{_three(time_ms / 1000)} s"


def percent(ratio: float | None) -> str:
    """A share of 1: `0 %`, `0.04 %`, `1.2 %`, `12 %`. What rounds to nothing is nothing."""
    if ratio is None:
        return UNKNOWN
    hundredths = ratio * 100
    places = 0 if hundredths >= 9.95 or hundredths < 0.005 else 1 if hundredths >= 0.995 else 2
    return f"{hundredths:.{places}f} %"


def share(part: int, whole: int) -> str:
    """`8/10`."""
    return f"{part}/{whole}"


def duration(time_s: float) -> str:
    """Seconds to the two largest units: `4 d 7 h`, `12 s`."""
    left = int(time_s)
    parts: list[str] = []
    for unit, size_s in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size_s)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    """A value that would round up to the next unit is written in that one."""
    power, limit = 0, step - 0.5
    while power < len(units) - 1 and value >= limit:
        value /= step
        power += 1
    return f"{_three(value) if power else round(value)} {units[power]}"


def _three(value: float) -> str:
    """Always as many figures, so that a column stays as it is while its figures change."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
