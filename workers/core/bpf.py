"""Classic BPF programs for the sockets of fake-TCP ports, as bytes that SO_ATTACH_FILTER takes.

A program is an array of `struct sock_filter` (linux/filter.h), in the byte order of this machine:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-------------------------------+---------------+---------------+
    |             code              |  skip if true | skip if false |
    +-------------------------------+---------------+---------------+
    |                               k                               |
    +---------------------------------------------------------------+

It returns how many bytes of the packet to keep; 0 drops it. A load outside the packet drops it too. Jumps lead forward
only, and a conditional one over at most 255 instructions. A program has at most 4096 instructions.

What offset 0 means depends on the socket: the TCP header on a TCP socket, the link header on AF_PACKET (the IP header
where the device has none).
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from struct import Struct
from typing import Literal, NamedTuple

INSTRUCTION = Struct("=HBBI")
INSTRUCTIONS_MAX = 4096

# Codes: linux/bpf_common.h.
LD_WORD, LD_HALF, LD_BYTE = 0x20, 0x28, 0x30
LD_HALF_X, LD_BYTE_X = 0x48, 0x50
LD_CONSTANT, LD_LENGTH, LD_MEMORY = 0x00, 0x80, 0x60
LDX_CONSTANT, LDX_MEMORY, LDX_HEADER_LENGTH = 0x01, 0x61, 0xB1
ST, STX, TAX, TXA = 0x02, 0x03, 0x07, 0x87
ADD, ADD_X, AND, LSH_X, RSH, MOD = 0x04, 0x0C, 0x54, 0x6C, 0x74, 0x94
JUMP, JUMP_EQ, JUMP_EQ_X, JUMP_GT, JUMP_GE, JUMP_SET = 0x05, 0x15, 0x1D, 0x25, 0x35, 0x45
RETURN, RETURN_A = 0x06, 0x16

# Negative offsets with a meaning of their own: linux/filter.h. The first stands for skb->pkt_type.
PACKET_TYPE = 2**32 - 0x1000 + 4
NETWORK_HEADER = 2**32 - 0x100000
PACKET_HOST, PACKET_OUTGOING = 0, 4  # linux/if_packet.h

KEEP_ALL = 2**32 - 1
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


class Code:
    """An assembler: instructions in order, with named places for jumps to lead to."""

    __slots__ = ("_instructions", "_places", "_serial")

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, str, str]] = []
        self._places: dict[str, int] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._instructions)

    def do(self, code: int, k: int = 0) -> None:
        self._instructions.append((code, k, "", ""))

    def jump(self, code: int, k: int = 0, *, true: str = "", false: str = "") -> None:
        """A jump; an empty place is the next instruction."""
        self._instructions.append((code, k, true, false))

    def place(self, name: str) -> None:
        assert name not in self._places, name
        self._places[name] = len(self._instructions)

    def new_place(self) -> str:
        """A name that is not in use."""
        self._serial += 1
        return f"#{self._serial}"

    def assemble(self) -> bytes:
        """The program. Raises ValueError when it is too long."""
        if len(self._instructions) > INSTRUCTIONS_MAX:
            raise ValueError(f"{len(self._instructions)} instructions")
        return b"".join(self._encoded())

    def _encoded(self) -> Iterator[bytes]:
        for at, (code, k, true, false) in enumerate(self._instructions, 1):
            if code == JUMP:
                yield INSTRUCTION.pack(code, 0, 0, self._places[true] - at)
            else:
                skip_true, skip_false = (self._places[name] - at if name else 0 for name in (true, false))
                yield INSTRUCTION.pack(code, skip_true, skip_false, k)


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
) -> bytes:
    """For AF_PACKET: segments that come in for fake-TCP ports, and the kernel's own frames that make a template.

    That is, unfragmented TCP over IPv4, or over IPv6 without extension headers, between one of the server's `ports` and
    anywhere: everything addressed to this host; and of what this host sends, on a client each ACK without payload, on a
    server each SYN-ACK.

    link_bytes: of the device's link header, 14 (Ethernet) or 0 (none).
    hosts: other hosts' addresses of 4 or 16 bytes; empty for any.
    share: (index, of how many): only connections whose client's port `socket_choice` gives to that index.
    Exact for as many ports as fit, 1000 wherever they are; past that, ports between them slip through.
    """
    wanted = sorted(set(ports))
    gap = 0
    while True:
        code = Code()
        _write_headers(code, side, link_bytes, hosts, share)
        _write_search(code, _elements(wanted, gap))
        if len(code) <= INSTRUCTIONS_MAX:
            return code.assemble()
        gap = 2 * gap + 1


def _write_headers(
    code: Code, side: Literal["client", "server"], link: int, hosts: Collection[bytes], share: tuple[int, int] | None
) -> None:
    """Up to the search: the server's port is in A."""
    incoming = _Fields(link + 12, link + 8, link, link + 2)
    outgoing = _Fields(link + 16, link + 24, link + 2, link)
    if side == "server":  # the server's port is its own, which its peers write in the other field
        incoming = incoming._replace(port_at=link + 2, other_port_at=link)
        outgoing = outgoing._replace(port_at=link, other_port_at=link + 2)
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


def _write_template(code: Code, side: Literal["client", "server"], link: int) -> None:
    """A frame of our own that teaches the headers: nothing else that this host sends is wanted, least of all data."""
    code.do(LD_BYTE_X, link + _FLAGS_AT)
    code.do(AND, _FLAGS)
    code.jump(JUMP_EQ, _ACK if side == "client" else _SYN_ACK, false="drop")
    code.do(STX, 0)
    code.do(LD_BYTE_X, link + _DATA_OFFSET_AT)
    code.do(RSH, 2)
    code.do(AND, 0x3C)
    code.do(ADD_X)
    code.do(ADD, link)
    code.do(TAX)
    code.do(LD_LENGTH)
    code.jump(JUMP_EQ_X, false="drop")
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


def _write_search(code: Code, elements: Sequence[_Element]) -> None:
    """Binary search for the port in A."""
    if not elements:
        code.do(RETURN, 0)
        return
    if any(element.mask for element in elements):  # X: the port's bit
        code.do(ST, 1)
        code.do(AND, _BLOCK_PORTS - 1)
        code.do(TAX)
        code.do(LD_CONSTANT, 1)
        code.do(LSH_X)
        code.do(TAX)
        code.do(LD_MEMORY, 1)
    code.jump(JUMP_GE, elements[0].first, true="tree")
    code.do(RETURN, 0)
    code.place("tree")
    _write_tree(code, elements)


def _write_tree(code: Code, elements: Sequence[_Element], accept: str = "", drop: str = "") -> None:
    """The port is not below the first element, nor as high as the one behind the last."""
    if not accept and len(elements) <= _LEAVES:
        accept, drop = code.new_place(), code.new_place()
        _write_tree(code, elements, accept, drop)
        code.place(accept)
        code.do(RETURN, KEEP_ALL)
        code.place(drop)
        code.do(RETURN, 0)
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
    _write_tree(code, elements[:middle], accept, drop)
    code.place(right)
    _write_tree(code, elements[middle:], accept, drop)


def _write_leaf(code: Code, element: _Element, accept: str, drop: str) -> None:
    if not element.mask:
        code.jump(JUMP_GT, element.last, true=drop, false=accept)
        return
    code.jump(JUMP_GT, element.last, true=drop)
    code.do(TXA)
    code.jump(JUMP_SET, element.mask, true=accept, false=drop)
