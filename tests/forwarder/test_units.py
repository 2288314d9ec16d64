"""Notations: what is written, what is read, and that the two agree."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.units import (
    PORTS_MAX,
    PortMistake,
    address_family,
    format_ports,
    format_size,
    format_time,
    parse_endpoint,
    parse_host,
    parse_ports,
    parse_size,
    parse_time,
)

SIZES = st.integers(0, 1 << 40) | st.integers(0, 1 << 20).map(lambda count: count << 20)
TIMES_MS = st.integers(0, 10**9) | st.integers(0, 10**4).map(lambda count: count * 60_000)
PORTS = st.integers(1, 65535)


@given(SIZES)
def test_size_written_reads_back(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes == parse_size(size_bytes)


@given(TIMES_MS)
def test_time_written_reads_back(time_ms: int) -> None:
    assert parse_time(format_time(time_ms / 1000)) == time_ms / 1000


@given(st.ip_addresses(v=6), PORTS)
def test_ipv6_endpoint_reads_without_brackets(address: object, port: int) -> None:
    assert parse_endpoint(f"[{address}]:{port}") == (str(address), port)


@given(st.ip_addresses(v=4), PORTS)
def test_ipv4_endpoint_reads(address: object, port: int) -> None:
    assert parse_endpoint(f"{address}:{port}") == (str(address), port)


@given(st.text(max_size=40) | st.from_regex(r"[\[\]:.a-z0-9]{0,20}", fullmatch=True))
def test_any_text_is_a_host_or_a_value_error(text: str) -> None:
    try:
        host = parse_host(text)
    except ValueError:
        return
    assert parse_host(host) == host
    assert parse_endpoint(f"[{host}]:1" if ":" in host else f"{host}:1") == (host, 1)


@given(st.text(max_size=12) | st.integers() | st.floats() | st.booleans() | st.none() | st.lists(st.integers()))
def test_any_value_is_a_size_and_a_time_or_a_value_error(value: object) -> None:
    for parse in (parse_size, parse_time):
        with contextlib.suppress(ValueError):
            assert parse(value) >= 0


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("0B", 0), ("7B", 7), ("64KiB", 65536), ("8MiB", 8 << 20), ("1GiB", 1 << 30), (4096, 4096)]
)
def test_size_is_read_in_bytes(text: object, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "value", ["64", "64KB", "64kib", "64 KiB", "1.5MiB", "-1KiB", "KiB", "", "٣KiB", -1, True, 1.0]
)
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(value)


@pytest.mark.parametrize(("text", "time_s"), [("250ms", 0.25), ("10s", 10.0), ("5m", 300.0), ("1h", 3600.0), ("0s", 0)])
def test_time_is_read_in_seconds(text: str, time_s: float) -> None:
    assert parse_time(text) == time_s


@pytest.mark.parametrize("value", ["10", 10, 1.5, "1.5s", "10 s", "10sec", "1d", "-1s", "s", "", "10S", "1h30m", None])
def test_what_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not a time"):
        parse_time(value)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("localhost", "localhost"),
        ("Server.Example.NET.", "Server.Example.NET."),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("10.0.0.1", "10.0.0.1"),
        ("::", "::"),
        ("[::]", "::"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_host_is_read_in_its_usual_form(text: str, host: str) -> None:
    assert parse_host(text) == host


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "a-", "-a", "a..b", "1.2.3", "1.2.3.4.5", "10.0.0.256", "*", "bücher", "a b", "a/b", "a:1", "a\n"),
        *("[]", "[::", "::1]", "[]:", "[name]", "[10.0.0.1]"),
        *("fe80::1%", "fe80::1%e\0", "[fe80::1%a\nb]", "fe80::1%a b", "fe80::1%" + "x" * 16),
        "x" * 64,
        ".".join(["x" * 60] * 5),
    ],
)
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_host(text)


@pytest.mark.parametrize(
    "text", ["", ":", ":80", "a", "a:", "a:0", "a:65536", "a:080808", "a:+1", "a: 1", "::1:80", "a:٣"]
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_endpoint(text)


@pytest.mark.parametrize(("host", "family"), [("10.0.0.1", 4), ("::1", 6), ("fe80::1%eth0", 6), ("a.example", None)])
def test_family_of_a_host(host: str, family: int | None) -> None:
    assert address_family(host) == family


@given(st.sets(PORTS | st.integers(10000, 10040), min_size=1, max_size=60))
def test_ports_written_read_back(ports: set[int]) -> None:
    text = format_ports(sorted(ports))
    assert parse_ports(text) == tuple(sorted(ports))
    assert text.count(",") + 1 == sum(port - 1 not in ports for port in ports)  # no two items that could be one


@given(st.lists(st.tuples(st.integers(0, 66000), st.integers(-3, 300)), min_size=1, max_size=5))
def test_ports_of_items_are_all_or_a_mistake(items: list[tuple[int, int]]) -> None:
    text = ",".join(f"{low}-{max(low + more, 0)}" if more else str(low) for low, more in items)
    every = [port for low, more in items for port in range(low, max(low + more, 0) + 1)]
    sound = all(more >= 0 for _, more in items) and len(set(every)) == len(every)
    if sound and min(every) >= 1 and max(every) <= 65535:
        assert parse_ports(text) == tuple(sorted(every))
    else:
        with pytest.raises(PortMistake):
            parse_ports(text)


def test_ports_are_at_most_so_many() -> None:
    assert len(parse_ports(f"1-{PORTS_MAX}")) == PORTS_MAX
    for text in (f"1-{PORTS_MAX + 1}", f"1-{PORTS_MAX},60000", "1-65535"):
        with pytest.raises(PortMistake):
            parse_ports(text)


@given(st.text(max_size=20) | st.from_regex(r"[0-9,\- ]{0,20}", fullmatch=True))
def test_any_text_is_ports_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        ports = parse_ports(text)
        assert ports == parse_ports(format_ports(ports))
