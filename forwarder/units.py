"""The notations of a configuration file: sizes, times, hosts, endpoints and lists of ports. Every parser raises
ValueError."""

import re
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address

_SIZE = re.compile(r"([0-9]{1,15})(B|KiB|MiB|GiB)")
_TIME = re.compile(r"([0-9]{1,12})(ms|s|m|h)")
_PORT = re.compile(r"[0-9]{1,5}")
_PORT_LIST = re.compile(r"([0-9]{1,5}(-[0-9]{1,5})?)(,[0-9]{1,5}(-[0-9]{1,5})?)*")
_NAME = re.compile(
    r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*([A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)\.?"
)

# An interface's name; `ip_address` takes anything for it, a zero byte too.
_SCOPE = re.compile(r"[A-Za-z0-9._-]{1,15}")

PORTS_MAX = 4096
"""The most ports of one list."""

_BYTES = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}
_MILLISECONDS = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}


class PortMistake(ValueError):
    """A list of ports in the right notation that breaks a rule; its text says by what."""


def parse_size(value: object) -> int:
    """`"64KiB"`, `"8MiB"`, or an integer of bytes -> bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError("not a size")
    return int(match[1]) * _BYTES[match[2]]


def format_size(size_bytes: int) -> str:
    """Bytes -> the shortest exact notation that `parse_size` reads."""
    unit = next(unit for unit, scale in _BYTES.items() if size_bytes % scale == 0) if size_bytes else "B"
    return f"{size_bytes // _BYTES[unit]}{unit}"


def parse_time(value: object) -> float:
    """`"250ms"`, `"10s"`, `"5m"`, `"1h"` -> seconds. A bare number is refused: it would not say its unit."""
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ValueError("not a time")
    return int(match[1]) * _MILLISECONDS[match[2]] / 1000


def format_time(time_s: float) -> str:
    """Seconds -> the shortest notation that `parse_time` reads, exact to the millisecond."""
    time_ms = round(time_s * 1000)
    unit = next(unit for unit, scale in _MILLISECONDS.items() if time_ms % scale == 0) if time_ms else "s"
    return f"{time_ms // _MILLISECONDS[unit]}{unit}"


def parse_host(text: str) -> str:
    """A name, an IPv4 or an IPv6 address (brackets allowed) -> the same bare, addresses in their usual form.

    Nothing is looked up.
    """
    bracketed = text.startswith("[") and text.endswith("]")
    bare = text[1:-1] if bracketed else text
    try:
        address = ip_address(bare)
    except ValueError:
        name = _NAME.fullmatch(bare)
        # A name never ends in a number (RFC 1123, section 2.1): that is an IPv4 address gone wrong.
        if bracketed or not name or name[1].isdigit() or len(bare) > 253:
            raise ValueError("not a host") from None
        return bare
    if bracketed and not isinstance(address, IPv6Address):
        raise ValueError("only IPv6 addresses stand in brackets")
    if isinstance(address, IPv6Address) and address.scope_id is not None and not _SCOPE.fullmatch(address.scope_id):
        raise ValueError("not the name of an interface")
    return str(address)


def parse_endpoint(text: str) -> tuple[str, int]:
    """`"10.0.0.1:80"`, `"[::1]:80"`, `"name:80"` -> host without brackets, port."""
    host, _, port = text.rpartition(":")
    if ":" in host and not host.startswith("["):
        raise ValueError("an IPv6 address with a port needs brackets")
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise ValueError("not a port")
    return parse_host(host), int(port)


def address_family(host: str) -> int | None:
    """4 or 6 for an address without brackets, None for a name."""
    try:
        return ip_address(host).version
    except ValueError:
        return None


def parse_ports(text: str) -> tuple[int, ...]:
    """`"80,443,10000-10005"` -> the ports, ascending. PortMistake for one that is there twice, a range that goes down,
    a port out of range, and more than PORTS_MAX."""
    if not _PORT_LIST.fullmatch(text):
        raise ValueError("not a list of ports")
    found: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high <= 65535:
            raise PortMistake(f'"{item}"')
        if high - low >= PORTS_MAX - len(found):
            raise PortMistake(f"more than {PORTS_MAX}")
        ports = range(low, high + 1)
        if twice := found.intersection(ports):
            raise PortMistake(f"{min(twice)} twice")
        found.update(ports)
    return tuple(sorted(found))


def format_ports(ports: Sequence[int]) -> str:
    """Ascending ports -> the shortest notation that `parse_ports` reads."""
    runs: list[list[int]] = []
    for port in ports:
        if runs and port == runs[-1][1] + 1:
            runs[-1][1] = port
        else:
            runs.append([port, port])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
