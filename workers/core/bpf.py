"""Classic BPF programs for the sockets of fake-TCP ports.

A program returns how many bytes of the packet to keep; 0 drops it. A load outside the packet drops it too.

What offset 0 means depends on the socket: the TCP header on a TCP socket, the link header on AF_PACKET (the IP header
where the device has none).
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

from workers.core.bpf_code import (
    ADD,
    ADD_X,
    AND,
    INSTRUCTIONS_MAX,
    JUMP,
    JUMP_EQ,
    JUMP_EQ_X,
    JUMP_GE,
    JUMP_GT,
    JUMP_SET,
    KEEP_ALL,
    LD_BYTE,
    LD_BYTE_X,
    LD_CONSTANT,
    LD_HALF,
    LD_HALF_X,
    LD_LENGTH,
    LD_MEMORY,
    LD_WORD,
    LDX_CONSTANT,
    LDX_HEADER_LENGTH,
    LDX_MEMORY,
    LSH_X,
    MOD,
    NETWORK_HEADER,
    PACKET_HOST,
    PACKET_OUTGOING,
    PACKET_TYPE,
    RETURN,
    RETURN_A,
    RSH,
    ST,
    STX,
    TAX,
    TXA,
    Code,
)

ETHERNET_BYTES = 14
_ETHERTYPE_AT, _ETHERTYPE_IP4, _ETHERTYPE_IP6 = 12, 0x0800, 0x86DD
_TCP = 6
_IP4_FRAGMENT = 0x3FFF  # more fragments, or an offset: DF is the bit above
_IP6_BYTES = 40
_FLAGS_AT, _DATA_OFFSET_AT = 13, 12
_FLAGS, _ACK, _SYN_ACK = 0x3F, 0x10, 0x12  # without ECE and CWR, which a SYN-ACK may carry

# Elements of the port search that share one pair of returns: at most 4 instructions each, within reach of a jump.
_LEAVES = 32
_BLOCK_PORTS = 32


def _drop_all() -> bytes:
    code = Code()
    code.do(RETURN, 0)
    return code.assemble()


def _drop_payload() -> bytes:
    code = Code()
    code.do(LD_BYTE, _DATA_OFFSET_AT)
    code.do(RSH, 2)
    code.do(AND, 0x3C)
    code.do(TAX)
    code.do(LD_LENGTH)
    code.jump(JUMP_EQ_X, true="bare")
    code.do(RETURN, 0)
    code.place("bare")
    code.do(RETURN, KEEP_ALL)
    return code.assemble()


DROP_ALL = _drop_all()
"""For a TCP socket: the kernel neither sees nor answers any segment."""

DROP_PAYLOAD = _drop_payload()
"""For a TCP socket, or a listening one, whose children inherit it: only segments without payload reach TCP."""


def socket_choice(sockets: int) -> bytes:
    """For SO_ATTACH_REUSEPORT_CBPF: the socket's index is half the source port, modulo `sockets`.

    Half, since connect() prefers even ports. The network header stands before offset 0 there.
    """
    code = Code()
    code.do(LD_BYTE, NETWORK_HEADER)
    code.do(RSH, 4)
    code.do(LDX_CONSTANT, _IP6_BYTES)
    code.jump(JUMP_EQ, 6, true="ports")
    code.do(LDX_HEADER_LENGTH, NETWORK_HEADER)
    code.place("ports")
    code.do(LD_HALF_X, NETWORK_HEADER)
    code.do(RSH, 1)
    code.do(MOD, sockets)
    code.do(RETURN_A)
    return code.assemble()


class _Fields(NamedTuple):
    """Where, seen from one direction, the other host's address and the two ports stand in their headers."""

    ip4_at: int
    ip6_at: int
    port_at: int
    other_port_at: int


def capture(
    side: Literal["client", "server"],
    ports: Iterable[int],
    *,
    link_bytes: int,
    hosts: Collection[bytes] = (),
    share: tuple[int, int] | None = None,
    loops: bool = False,
) -> bytes:
    """For AF_PACKET: segments that come in for fake-TCP ports, and the kernel's own frames that make a template.

    That is, unfragmented TCP over IPv4, or over IPv6 without extension headers, between one of the server's `ports` and
    anywhere: everything addressed to this host; and of what this host sends, on a client each ACK without payload, on a
    server each SYN-ACK.

    link_bytes: of the device's link header, 14 (Ethernet) or 0 (none).
    hosts: other hosts' addresses of 4 or 16 bytes; empty for any.
    share: (index, of how many): only connections whose client's port `socket_choice` gives to that index.
    loops: what this host sends is only seen as it comes back, so nothing tells the two apart but their ports. Not with
    `hosts` or `share`, and exact for half as many ports.
    Exact for as many ports as fit, 1000 wherever they are; past that, ports between them slip through.
    """
    wanted = sorted(set(ports))
    gap = 0
    while True:
        code = Code()
        elements = _elements(wanted, gap)
        if loops:
            _write_loop(code, side, link_bytes, elements)
        else:
            _write_headers(code, side, link_bytes, hosts, share)
        _write_search(code, elements)
        if len(code) <= INSTRUCTIONS_MAX:
            return code.assemble()
        gap = 2 * gap + 1


def _write_headers(
    code: Code, side: Literal["client", "server"], link: int, hosts: Collection[bytes], share: tuple[int, int] | None
) -> None:
    """Up to the search: the server's port is in A."""
    incoming, outgoing = _fields(side, link)
    _write_version(code, link)
    for version, length in ((4, 4), (6, 16)):
        code.place(f"ip{version}")
        _write_ip(code, version, link)
        if hosts:
            _write_hosts(code, version, [host for host in hosts if len(host) == length], incoming, outgoing)
        code.do(*((LDX_HEADER_LENGTH, link) if version == 4 else (LDX_CONSTANT, _IP6_BYTES)))
        code.jump(JUMP, true="tcp")
    code.place("tcp")
    code.do(LD_WORD, PACKET_TYPE)
    code.jump(JUMP_EQ, PACKET_OUTGOING, true="outgoing")
    code.jump(JUMP_EQ, PACKET_HOST, false="drop")
    _write_ports(code, incoming, share)
    code.place("outgoing")
    _write_template(code, side, link)
    _write_ports(code, outgoing, share)
    code.place("drop")
    code.do(RETURN, 0)
    code.place("search")


def _write_loop(code: Code, side: Literal["client", "server"], link: int, elements: Sequence["_Element"]) -> None:
    """As `_write_headers`, where a segment may be one or the other: the search is for what comes in, then a second one
    for what went out."""
    incoming, outgoing = _fields(side, link)
    code.do(STX, 0)  # the kernel wants it stored on each way to the load, those over "drop" too
    _write_version(code, link)
    for version in (4, 6):
        code.place(f"ip{version}")
        _write_ip(code, version, link)
        code.do(*((LDX_HEADER_LENGTH, link) if version == 4 else (LDX_CONSTANT, _IP6_BYTES)))
        code.jump(JUMP, true="tcp")
    code.place("tcp")
    code.do(STX, 0)
    code.do(LD_HALF_X, incoming.port_at)
    code.jump(JUMP, true="first search")
    code.place("drop")
    code.do(RETURN, 0)
    code.place("first search")
    _write_search(code, elements, missed="outgoing")
    code.place("outgoing")
    code.do(LDX_MEMORY, 0)
    _write_template(code, side, link, drop="no template")
    _write_ports(code, outgoing, None)
    code.place("no template")
    code.do(RETURN, 0)
    code.place("search")


def _fields(side: Literal["client", "server"], link: int) -> tuple[_Fields, _Fields]:
    """Of what comes in, and of what goes out."""
    incoming = _Fields(link + 12, link + 8, link, link + 2)
    outgoing = _Fields(link + 16, link + 24, link + 2, link)
    if side == "server":  # the server's port is its own, which its peers write in the other field
        incoming = incoming._replace(port_at=link + 2, other_port_at=link)
        outgoing = outgoing._replace(port_at=link, other_port_at=link + 2)
    return incoming, outgoing


def _write_version(code: Code, link: int) -> None:
    if link:
        code.do(LD_HALF, _ETHERTYPE_AT)
        code.jump(JUMP_EQ, _ETHERTYPE_IP4, true="ip4")
        code.jump(JUMP_EQ, _ETHERTYPE_IP6, true="ip6", false="drop")
    else:
        code.do(LD_BYTE, 0)
        code.do(RSH, 4)
        code.jump(JUMP_EQ, 4, true="ip4")
        code.jump(JUMP_EQ, 6, true="ip6", false="drop")


def _write_ip(code: Code, version: int, link: int) -> None:
    """TCP, and not a fragment."""
    code.do(LD_BYTE, link + (9 if version == 4 else 6))
    code.jump(JUMP_EQ, _TCP, false="drop")
    if version == 4:
        code.do(LD_HALF, link + 6)
        code.jump(JUMP_SET, _IP4_FRAGMENT, true="drop")


def _write_hosts(code: Code, version: int, hosts: Sequence[bytes], incoming: _Fields, outgoing: _Fields) -> None:
    """The other host is one of `hosts`."""
    good, sent = f"host of ip{version}", f"sent by ip{version}"
    code.do(LD_WORD, PACKET_TYPE)
    code.jump(JUMP_EQ, PACKET_OUTGOING, true=sent)
    for fields in (incoming, outgoing):
        if fields is outgoing:
            code.place(sent)
        for host in hosts:
            other = code.new_place()
            for word in range(0, len(host), 4):
                code.do(LD_WORD, (fields.ip4_at if version == 4 else fields.ip6_at) + word)
                code.jump(JUMP_EQ, int.from_bytes(host[word : word + 4], "big"), false=other)
            code.jump(JUMP, true=good)
            code.place(other)
        code.jump(JUMP, true="drop")
    code.place(good)


def _write_template(code: Code, side: Literal["client", "server"], link: int, drop: str = "drop") -> None:
    """A frame of our own that teaches the headers: nothing else that this host sends is wanted, least of all data."""
    code.do(LD_BYTE_X, link + _FLAGS_AT)
    code.do(AND, _FLAGS)
    code.jump(JUMP_EQ, _ACK if side == "client" else _SYN_ACK, false=drop)
    code.do(STX, 0)
    code.do(LD_BYTE_X, link + _DATA_OFFSET_AT)
    code.do(RSH, 2)
    code.do(AND, 0x3C)
    code.do(ADD_X)
    code.do(ADD, link)
    code.do(TAX)
    code.do(LD_LENGTH)
    code.jump(JUMP_EQ_X, false=drop)
    code.do(LDX_MEMORY, 0)


def _write_ports(code: Code, fields: _Fields, share: tuple[int, int] | None) -> None:
    """X: bytes of the IP header."""
    if share is not None:
        index, count = share
        code.do(LD_HALF_X, fields.other_port_at)
        code.do(RSH, 1)
        code.do(MOD, count)
        code.jump(JUMP_EQ, index, false="drop")
    code.do(LD_HALF_X, fields.port_at)
    code.jump(JUMP, true="search")


class _Element(NamedTuple):
    """Ports `first` to `last`: all, or those whose bit of `mask` is set (bit: port modulo 32)."""

    first: int
    last: int
    mask: int


def _elements(ports: Sequence[int], gap: int) -> list[_Element]:
    """`ports` (sorted) as ranges; where a block of 32 holds three or more, as its bit mask, which is shorter then.

    Ports between two that are at most `gap` apart count as wanted.
    """
    ranges: list[list[int]] = []
    for port in ports:
        if ranges and port <= ranges[-1][1] + 1 + gap:
            ranges[-1][1] = port
        else:
            ranges.append([port, port])
    by_block: dict[int, list[_Element]] = {}
    elements: list[_Element] = []
    for first, last in ranges:
        block = first // _BLOCK_PORTS
        if block == last // _BLOCK_PORTS:
            by_block.setdefault(block, []).append(_Element(first, last, 0))
        else:
            elements.append(_Element(first, last, 0))
    for inside in by_block.values():
        elements += inside if len(inside) < 3 else [_masked(inside)]
    return sorted(elements)


def _masked(inside: Sequence[_Element]) -> _Element:
    mask = 0
    for first, last, _ in inside:
        mask |= ((1 << (last - first + 1)) - 1) << first % _BLOCK_PORTS
    return _Element(inside[0].first, inside[-1].last, mask)


def _write_search(code: Code, elements: Sequence[_Element], missed: str = "") -> None:
    """Binary search for the port in A; where it is not found the packet is dropped, or the program goes on."""
    if not elements:
        _write_miss(code, missed)
        return
    if any(element.mask for element in elements):  # X: the port's bit
        code.do(ST, 1)
        code.do(AND, _BLOCK_PORTS - 1)
        code.do(TAX)
        code.do(LD_CONSTANT, 1)
        code.do(LSH_X)
        code.do(TAX)
        code.do(LD_MEMORY, 1)
    tree = code.new_place()
    code.jump(JUMP_GE, elements[0].first, true=tree)
    _write_miss(code, missed)
    code.place(tree)
    _write_tree(code, elements, missed)


def _write_miss(code: Code, missed: str) -> None:
    if missed:
        code.jump(JUMP, true=missed)
    else:
        code.do(RETURN, 0)


def _write_tree(code: Code, elements: Sequence[_Element], missed: str, accept: str = "", drop: str = "") -> None:
    """The port is not below the first element, nor as high as the one behind the last."""
    if not accept and len(elements) <= _LEAVES:
        accept, drop = code.new_place(), code.new_place()
        _write_tree(code, elements, missed, accept, drop)
        code.place(accept)
        code.do(RETURN, KEEP_ALL)
        code.place(drop)
        _write_miss(code, missed)
        return
    if len(elements) == 1:
        _write_leaf(code, elements[0], accept, drop)
        return
    middle = len(elements) // 2
    right = code.new_place()
    if accept:
        code.jump(JUMP_GE, elements[middle].first, true=right)
    else:  # too far for a conditional jump
        left = code.new_place()
        code.jump(JUMP_GE, elements[middle].first, false=left)
        code.jump(JUMP, true=right)
        code.place(left)
    _write_tree(code, elements[:middle], missed, accept, drop)
    code.place(right)
    _write_tree(code, elements[middle:], missed, accept, drop)


def _write_leaf(code: Code, element: _Element, accept: str, drop: str) -> None:
    if not element.mask:
        code.jump(JUMP_GT, element.last, true=drop, false=accept)
        return
    code.jump(JUMP_GT, element.last, true=drop)
    code.do(TXA)
    code.jump(JUMP_SET, element.mask, true=accept, false=drop)
