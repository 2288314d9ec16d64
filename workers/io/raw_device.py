"""A network device as the fake-TCP wires of one tunnel in one worker use it: frames in, frames out, and waiting.

It reads through a filter that passes nothing but the segments of the worker's own ports and the handshake frames of the
own kernel, from which the wires learn their headers.
"""

import logging
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from workers.core.bpf import capture
from workers.core.cuts import Records
from workers.core.tcp_header import Segment, parse
from workers.io.context import clock_us
from workers.io.packet import Device, PacketPort, find_device, open_socket
from workers.io.pcap_port import LOOPBACK, PcapPort

READ = 1
TURN_BYTES = 512 << 10
"""Read in one turn of the event loop."""
FRAME_COST_BYTES = 4096
"""What a frame counts for in that, besides its bytes."""
BLOCKED_S = 0.001
HOSTS_MAX = 32
"""So many other hosts are told apart in the filter; with more, it looks at ports only."""

log = logging.getLogger("forwarder.raw")


class Receiver(Protocol):
    """A wire, as the device sees it."""

    def receive(self, segment: Segment, now_us: int) -> None:
        """A segment came; its payload is in the device's buffer."""

    def on_room(self) -> None:
        """The device, which refused a frame, may take one again."""


class FramePort(Protocol):
    """What a backend provides; `workers.io.packet.PacketPort` says what each does."""

    @property
    def device(self) -> Device: ...
    @property
    def link_bytes(self) -> int: ...

    def fileno(self) -> int: ...
    def bind(self, device: Device, program: bytes) -> None: ...
    def set_filter(self, program: bytes) -> None: ...
    def send(self, header: bytes, payload: bytes | memoryview) -> int: ...
    def receive_into(self, view: memoryview) -> int: ...
    def close(self) -> None: ...


PROGRAM_MAX = 8192
"""Bytes of a filter. Linux before 6.6 lets a socket have 20,480 (net.core.optmem_max), and while one takes another's
place there are two. Of many scattered ports all between the lowest and the highest are passed: the table of connections
knows better."""


@dataclass(slots=True)
class Wanted:
    """What the filters of a tunnel's devices pass. ports: the server's. hosts: the other ends; empty for any."""

    side: Literal["client", "server"]
    ports: tuple[int, ...]
    backend: Literal["packet", "pcap"] = "packet"
    hosts: set[bytes] = field(default_factory=set)

    def program(self, device: Device) -> bytes:
        """The filter for that device."""
        # libpcap hides what goes out by the loopback device, and shows it when it comes in.
        loops = self.backend == "pcap" and device.name == LOOPBACK
        hosts = sorted(self.hosts) if len(self.hosts) <= HOSTS_MAX and not loops else ()
        program = capture(self.side, self.ports, link_bytes=device.link_bytes, hosts=hosts, loops=loops)
        if len(program) > PROGRAM_MAX:
            between = range(min(self.ports), max(self.ports) + 1)
            program = capture(self.side, between, link_bytes=device.link_bytes, hosts=hosts, loops=loops)
        return program


def open_packet_port(name: str, wanted: Wanted) -> FramePort:
    """The `packet` backend on the device of that name. Raises OSError."""
    sock = open_socket()
    try:
        device = find_device(sock, name)
        return PacketPort(sock, device, wanted.program(device))
    except OSError:
        sock.close()
        raise


def open_pcap_port(name: str, wanted: Wanted) -> FramePort:
    """The `pcap` backend on the device of that name. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        device = find_device(sock, name, any_link=True)
    return PcapPort(device, wanted.program(device))


BACKENDS: dict[str, Callable[[str, Wanted], FramePort]] = {"packet": open_packet_port, "pcap": open_pcap_port}


def usual_devices(loopback: bool) -> list[str]:
    """Devices by which connections may come and go: not the members of bridges and bonds."""
    names = [name for _, name in socket.if_nameindex()]
    return [
        name for name in names if (loopback or name != "lo") and not Path("/sys/class/net", name, "master").exists()
    ]


class RawDevice:
    """Owns `port`. Segments go to the wire in `table` that has their key, others to `on_unknown`.

    lost: frames that the device refused.
    """

    __slots__ = ("_loop", "_on_unknown", "_records", "_table", "_timer", "_waiting", "_watcher", "lost", "port")

    def __init__(
        self,
        loop: Any,
        port: FramePort,
        table: dict[bytes, Receiver],
        records: Records,
        on_unknown: Callable[["RawDevice", Segment, memoryview, int], None],
    ) -> None:
        """`records`: the buffer that frames are read to, one for all devices of a tunnel; FRAME_BYTES_MAX fit."""
        self.port = port
        self.lost = 0
        self._loop = loop
        self._table = table
        self._records = records
        self._on_unknown = on_unknown
        self._waiting: deque[Receiver] = deque()
        self._timer = loop.timer(BLOCKED_S, BLOCKED_S)
        self._watcher = loop.io(port.fileno(), READ)
        self._watcher.start(self.read)

    @property
    def name(self) -> str:
        return self.port.device.name

    def read(self) -> None:
        """Hand on what has come, as much as there is or a turn allows."""
        port, table, view = self.port, self._table, self._records.view
        link_bytes = port.link_bytes
        left = TURN_BYTES
        now_us = clock_us()
        while left > 0:
            try:
                length = port.receive_into(view)
            except OSError as error:  # told once when the device goes down
                log.debug("device failed device=%s reason=%s", self.name, error)
                return
            if not length:
                return
            left -= length + FRAME_COST_BYTES
            frame = view[:length]
            segment = parse(frame, link_bytes)
            if segment is not None:
                wire = table.get(segment.key)
                if wire is not None:
                    wire.receive(segment, now_us)
                else:
                    self._on_unknown(self, segment, frame, now_us)

    def send(self, header: bytes, payload: bytes | memoryview) -> int:
        """Send one frame or run; return the bytes of payload that were taken, whole segments, -1 if it must wait.
        What the device refuses is lost, as it may be on the way."""
        try:
            return self.port.send(header, payload)
        except OSError:
            self.lost += 1
            return len(payload)

    def wait(self, wire: Receiver) -> None:
        """Call `wire.on_room` once, soon."""
        # Not when the socket is writable: mostly the queue behind it is full, of which nothing tells.
        if not self._waiting:
            self._timer.start(self._on_time)
        self._waiting.append(wire)

    def _on_time(self) -> None:
        waiting = self._waiting
        for _ in range(len(waiting)):
            held = len(waiting)
            waiting.popleft().on_room()
            if len(waiting) == held:  # it was refused again, and so would the others
                break
        if not waiting:
            self._timer.stop()

    # Changes

    def filter(self, wanted: Wanted) -> None:
        """Pass what is wanted now. Raises OSError."""
        self.port.set_filter(wanted.program(self.port.device))

    def refresh(self, found: Device, wanted: Wanted) -> None:
        """Go on with the device as it is now: it may have been made anew, or have another MTU. Raises OSError."""
        before = self.port.device
        if found != before:
            self.port.bind(found, wanted.program(found))
        if found.number != before.number:
            log.info("device is back device=%s", found.name)

    def close(self) -> None:
        self._watcher.stop()
        self._watcher.close()
        self._timer.stop()
        self._timer.close()
        self._waiting.clear()
        self.port.close()
