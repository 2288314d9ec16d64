"""Keys of socket addresses, against what the kernel writes and against `socket`."""

import ipaddress
import socket
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.io.sockaddr import IPV4_KEY_BYTES, IPV6_KEY_BYTES, address_of, key_bytes, key_of

ports = st.integers(0, 65535)


def test_keys_are_the_structures_of_the_kernel() -> None:
    family4, family6 = (int(each).to_bytes(2, sys.byteorder) for each in (socket.AF_INET, socket.AF_INET6))
    assert key_of(("192.0.2.1", 0x1234)) == family4 + bytes.fromhex("1234 c0000201") + bytes(8)
    expected = family6 + bytes.fromhex("1234 00000000 20010db8 00000000 00000000 00000001")
    assert key_of(("2001:db8::1", 0x1234, 0, 7)) == expected + (7).to_bytes(4, sys.byteorder)


@given(st.ip_addresses(v=4), ports)
def test_ipv4_address_comes_back(host: ipaddress.IPv4Address, port: int) -> None:
    key = key_of((str(host), port))
    assert len(key) == IPV4_KEY_BYTES == key_bytes(socket.AF_INET)
    assert address_of(key) == (str(host), port)


@given(st.ip_addresses(v=6), ports, st.integers(0, 2**20 - 1), st.integers(0, 2**32 - 1))
def test_ipv6_address_comes_back(host: ipaddress.IPv6Address, port: int, flow: int, scope: int) -> None:
    key = key_of((str(host), port, flow, scope))
    assert len(key) == IPV6_KEY_BYTES == key_bytes(socket.AF_INET6)
    name, *rest = address_of(key)
    assert (ipaddress.ip_address(name), rest) == (host, [port, flow, scope])


def test_host_with_the_name_of_its_interface_is_the_same_address() -> None:
    assert key_of(("fe80::1%eth0", 53, 0, 2)) == key_of(("fe80::1", 53, 0, 2))


def test_ipv6_address_of_two_values_has_no_flow_and_no_scope() -> None:
    assert key_of(("::1", 53)) == key_of(("::1", 53, 0, 0))


def test_name_is_refused() -> None:
    with pytest.raises(OSError):
        key_of(("localhost", 53))


@pytest.mark.parametrize("key", [b"", b"\0", bytes(16), bytes(28), key_of(("::1", 1))[:16], key_of(("1.2.3.4", 1)) * 2])
def test_what_is_no_key_has_no_address(key: bytes) -> None:
    with pytest.raises(ValueError, match="no key"):
        address_of(key)


def test_other_families_have_no_keys() -> None:
    with pytest.raises(ValueError, match="neither"):
        key_bytes(socket.AF_UNIX)
