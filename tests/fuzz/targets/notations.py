"""What people write by hand: sizes, times, hosts, endpoints, keys in base64."""

import base64
from ipaddress import ip_address

from forwarder import keys
from forwarder.units import (
    address_family,
    format_size,
    format_time,
    parse_endpoint,
    parse_host,
    parse_size,
    parse_time,
)
from tests.fuzz.source import Source


def run(data: bytes) -> None:
    """First byte: which notation; then the text."""
    source = Source(data)
    parser = source.choose((_size, _time, _host, _endpoint, _key))
    text = source.rest().decode("utf-8", "surrogateescape")
    try:
        parser(text)
    except ValueError:
        return


def _size(text: str) -> None:
    size_bytes = parse_size(text)
    _keeps(parse_size(format_size(size_bytes)) == size_bytes)


def _time(text: str) -> None:
    time_s = parse_time(text)
    _keeps(parse_time(format_time(time_s)) == time_s or time_s > 2**40)


def _host(text: str) -> None:
    host = parse_host(text)
    _keeps(parse_host(host) == host and host.isprintable() and "[" not in host)
    family = address_family(host)
    if family:
        _keeps(ip_address(host).version == family)


def _endpoint(text: str) -> None:
    host, port = parse_endpoint(text)
    written = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    _keeps(1 <= port <= 65535 and parse_endpoint(written) == (host, port))


def _key(text: str) -> None:
    key = keys.decode(text)
    _keeps(len(key) == keys.KEY_BYTES and keys.decode(base64.b64encode(key).decode()) == key)


def _keeps(holds: bool) -> None:
    """As assert, but never mistaken for a ValueError of the parser."""
    if not holds:
        raise AssertionError("taken, but it does not read back")


SEEDS = {
    "size": b"\x0064KiB",
    "size-bytes": b"\x00512B",
    "size-large": b"\x00999999999999999GiB",
    "time": b"\x01250ms",
    "time-hours": b"\x011h",
    "time-large": b"\x01999999999999h",
    "host-name": b"\x02server.example.net",
    "host-v4": b"\x02192.0.2.1",
    "host-v6": b"\x02[2001:db8::1%eth0]",
    "host-scope-zero": b"\2fe80::1%e\0",
    "host-number": b"\x02example.123",
    "endpoint-v4": b"\x03127.0.0.1:8080",
    "endpoint-v6": b"\x03[::]:8080",
    "endpoint-name": b"\x03name.:65535",
    "key": b"\x04" + base64.b64encode(bytes(range(32))) + b"\n",
    "key-short": b"\x04" + base64.b64encode(bytes(31)),
}
