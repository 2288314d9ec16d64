"""Segments of fake TCP taken apart and put together by hand, independently of the program's own header code."""

import select
import socket
import struct
import time
from typing import NamedTuple

from workers.core.bpf_code import INSTRUCTION, KEEP_ALL, RETURN
from workers.io.packet import FRAME_BYTES_MAX, VNET_HEADER_BYTES, PacketPort

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
SEGMENT = 1400
EVERYTHING = INSTRUCTION.pack(RETURN, 0, 0, KEEP_ALL)
"""A filter that keeps all."""

_NEEDS_CHECKSUM, _TCPV4, _TCPV6 = 1, 1, 4
_CHECKSUM_AT = 16
_HEADER = 32
"""Bytes of a TCP header with timestamps."""


class Segment(NamedTuple):
    """A captured frame. scale: of the window, -1 where no option says it. frame: the whole, virtio_net_hdr in front."""

    ip_bytes: int
    source_port: int
    target_port: int
    sequence: int
    acknowledged: int
    flags: int
    timestamp: int
    echoed: int
    scale: int
    gso_size: int
    payload: bytes
    frame: bytes


def read(port: PacketPort, timeout_s: float) -> Segment | None:
    """The next TCP frame that the port sees; None when there is none in time."""
    buffer = bytearray(FRAME_BYTES_MAX)
    until = time.monotonic() + timeout_s
    while select.select([port], [], [], max(until - time.monotonic(), 0))[0]:
        length = port.receive_into(memoryview(buffer))
        ip = VNET_HEADER_BYTES + port.link_bytes
        if length and buffer[ip + (6 if buffer[ip] >> 4 == 6 else 9)] == socket.IPPROTO_TCP:
            return taken_apart(bytes(buffer[:length]), port.link_bytes)
    return None


def taken_apart(frame: bytes, link_bytes: int) -> Segment:
    ip = VNET_HEADER_BYTES + link_bytes
    if frame[ip] >> 4 == 6:
        tcp, end = ip + 40, ip + 40 + struct.unpack_from("!H", frame, ip + 4)[0]
    else:
        tcp, end = ip + 4 * (frame[ip] & 15), ip + struct.unpack_from("!H", frame, ip + 2)[0]
    source, target, sequence, acknowledged = struct.unpack_from("!HHII", frame, tcp)
    data = tcp + (frame[tcp + 12] >> 4) * 4
    options = options_of(frame[tcp + 20 : data])
    timestamps = struct.unpack("!II", options.get(8, bytes(8)))
    scale = options.get(3, b"\xff")[0]
    return Segment(
        ip_bytes=tcp - ip,
        source_port=source,
        target_port=target,
        sequence=sequence,
        acknowledged=acknowledged,
        flags=frame[tcp + 13],
        timestamp=timestamps[0],
        echoed=timestamps[1],
        scale=-1 if scale == 0xFF else scale,
        gso_size=struct.unpack_from("=H", frame, 4)[0],
        payload=frame[data:end],
        frame=frame,
    )


def options_of(raw: bytes) -> dict[int, bytes]:
    found = {}
    while raw and raw[0]:
        length = 1 if raw[0] == 1 else raw[1]
        found[raw[0]] = raw[2:length]
        raw = raw[length:]
    return found


def send(
    port: PacketPort,
    template: Segment,
    sequence: int,
    payload: bytes,
    *,
    flags: int = ACK,
    answered: int | None = None,
    segment: int = SEGMENT,
) -> int:
    """Send with the addresses of `template`; what is longer than `segment` as a run that the kernel cuts.

    Returns how often it had to wait.
    """
    ip = VNET_HEADER_BYTES + port.link_bytes
    tcp = ip + template.ip_bytes
    run = len(payload) > segment
    kind = (_TCPV4 if template.ip_bytes < 40 else _TCPV6) if run else 0
    vnet = struct.pack(
        "=BBHHHH", _NEEDS_CHECKSUM, kind, tcp + _HEADER - 10, segment if run else 0, tcp - 10, _CHECKSUM_AT
    )
    link, addresses = template.frame[VNET_HEADER_BYTES:ip], bytearray(template.frame[ip:tcp])
    length = _HEADER + len(payload)
    if template.ip_bytes < 40:
        struct.pack_into("!H", addresses, 2, template.ip_bytes + length)
        struct.pack_into("!H", addresses, 10, 0)
        struct.pack_into("!H", addresses, 10, ones_complement(addresses) ^ 0xFFFF)
        pseudo = addresses[12:20]
    else:
        struct.pack_into("!H", addresses, 4, length)
        pseudo = addresses[8:40]
    checksum = ones_complement(pseudo + struct.pack("!II", 6, length))
    acknowledged = template.acknowledged if answered is None else answered
    ports = struct.pack("!HHII", template.source_port, template.target_port, sequence % 2**32, acknowledged % 2**32)
    window = struct.pack("!BBHHH", _HEADER // 4 << 4, flags, 65_535, checksum, 0)
    timestamps = struct.pack("!BBBBII", 1, 1, 8, 10, template.timestamp, template.echoed)
    header = b"".join((vnet, link, addresses, ports, window, timestamps))
    waits = 0
    while port.send(header, payload) < 0:
        waits += 1
        time.sleep(0.001)
        select.select([], [port], [], 5)
    return waits


def ones_complement(data: bytes | bytearray) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
