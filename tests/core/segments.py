"""Frames of fake TCP for the tests, put together field by field, and checksums computed in full (RFC 1071)."""

from dataclasses import dataclass, replace
from ipaddress import ip_address
from struct import pack, unpack_from

from workers.core.tcp_header import ACK, VNET_BYTES

ETHERNET4 = bytes.fromhex("02000000000202000000000108 00".replace(" ", ""))
ETHERNET6 = bytes.fromhex("02000000000202000000000186dd")
NO_VNET = bytes(VNET_BYTES)


def checksum(data: bytes) -> int:
    """The internet checksum, by the book: add, fold, complement."""
    data += bytes(len(data) % 2)
    total = sum(unpack_from(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True)
class Frame:
    """One frame without vnet_hdr; `built` gives its bytes, all checksums complete."""

    source: str = "192.0.2.1"
    destination: str = "198.51.100.7"
    source_port: int = 40000
    destination_port: int = 443
    sequence: int = 0x01020304
    acknowledged: int = 0x0A0B0C0D
    flags: int = ACK
    window: int = 502
    options: bytes = b""
    payload: bytes = b""
    link: bytes | None = None
    hop_limit: int = 64
    traffic_class: int = 0
    flow_label: int = 0
    identification: int = 0x1234
    fragment: int = 0x4000
    ip_options: bytes = b""
    extensions: bytes = b""
    next_header: int = 6

    def but(self, **changes: object) -> "Frame":
        return replace(self, **changes)  # type: ignore[arg-type]

    @property
    def key(self) -> bytes:
        addresses = ip_address(self.source).packed + ip_address(self.destination).packed
        return addresses + pack(">HH", self.source_port, self.destination_port)

    def tcp(self) -> bytes:
        offset_and_flags = (20 + len(self.options)) // 4 << 12 | self.flags
        ports = (self.source_port, self.destination_port)
        head = pack(">HHIIHHHH", *ports, self.sequence, self.acknowledged, offset_and_flags, self.window, 0, 0)
        segment = head + self.options + self.payload
        pseudo = self.key[:-4] + pack(">II", len(segment), 6)
        return segment[:16] + pack(">H", checksum(pseudo + segment)) + segment[18:]

    def ip(self) -> bytes:
        segment, addresses = self.tcp(), self.key[:-4]
        if len(addresses) == 32:
            first = 6 << 28 | self.traffic_class << 20 | self.flow_label
            body = self.extensions + segment
            return pack(">IHBB", first, len(body), self.next_header, self.hop_limit) + addresses + body
        header_bytes = 20 + len(self.ip_options)
        first = (0x40 | header_bytes // 4, self.traffic_class, header_bytes + len(segment), self.identification)
        head = pack(">BBHHHBBH", *first, self.fragment, self.hop_limit, self.next_header, 0) + addresses
        head += self.ip_options
        return head[:10] + pack(">H", checksum(head)) + head[12:] + segment

    def built(self) -> bytes:
        link = self.link
        if link is None:
            link = ETHERNET6 if ":" in self.source else ETHERNET4
        return link + self.ip()


IPV6 = Frame(source="2001:db8::1", destination="2001:db8:ffff::7", flow_label=0xABCDE)


def timestamps(tsval: int, tsecr: int) -> bytes:
    return pack(">BBBBII", 1, 1, 8, 10, tsval, tsecr)
