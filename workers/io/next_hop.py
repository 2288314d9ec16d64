"""Keeps the link headers of fake-TCP wires right: routes, neighbours and devices change while connections live.

The kernel is asked when it says that something has changed, and every ROUND_S; a few wires each tick, so that a
server's thousands hold nobody up. A next hop that the kernel does not know at the moment stays what it was.
"""

import errno
import logging
from collections.abc import Iterator
from contextlib import suppress

from workers.io.packet import find_device
from workers.io.raw_device import usual_devices
from workers.io.raw_wire import RawWire, RawWires
from workers.io.route import drain, neighbour, open_netlink, route_to

ROUND_S = 10.0
SPACING_S = 1.0
"""At least this long between rounds, however much changes."""
LOOKUPS = 32
"""Peers that are looked up in one tick, at some 40 us each."""

log = logging.getLogger("forwarder.raw")


class NextHops:
    """Looks after the wires and devices of `wires`. Call `on_time` every tick."""

    __slots__ = ("_asking", "_changed", "_last_us", "_round", "_watching", "_wires")

    def __init__(self, wires: RawWires) -> None:
        """Raises OSError."""
        self._wires = wires
        self._asking = open_netlink()
        try:
            self._watching = open_netlink(watch=True)
        except OSError:
            self._asking.close()
            raise
        self._round: Iterator[None] = iter(())
        self._changed = False
        self._last_us = 0

    def device_to(self, host: str) -> str:
        """The name of the device by which packets to `host` leave. Raises OSError."""
        return self._wires.tunnel.device or route_to(self._asking, host).device

    def open_usual(self, loopback: bool) -> None:
        """Open the tunnel's device, or where it has none all that connections may come by. Raises OSError for none."""
        wires = self._wires
        fixed = wires.tunnel.device
        failed: OSError | None = None
        for name in [fixed] if fixed is not None else usual_devices(loopback):
            try:
                wires.device(name)
            except OSError as error:
                failed = error
        if not wires.devices:
            raise failed or OSError(errno.ENODEV, "no device is up")

    def on_time(self, now_us: int) -> None:
        """Go on with the round, or begin the next."""
        with suppress(OSError):
            self._changed |= drain(self._watching)
        since_s = (now_us - self._last_us) / 1e6
        if next(self._round, self) is self and since_s >= (SPACING_S if self._changed else ROUND_S):
            self._changed = False
            self._last_us = now_us
            self._round = self._run_round()

    def _run_round(self) -> Iterator[None]:
        """Yields after LOOKUPS peers."""
        wires = self._wires
        for device in list(wires.devices.values()):
            with suppress(OSError):  # it is down or gone: perhaps it comes back
                found = find_device(self._asking, device.name, any_link=wires.wanted.backend == "pcap")
                device.refresh(found, wires.wanted)
        if wires.wanted.side == "server":
            with suppress(OSError):
                self.open_usual("lo" in wires.devices)
        hops: dict[str, tuple[str, bytes]] = {}
        for wire in list(wires.table.values()):
            if isinstance(wire, RawWire) and wires.table.get(wire.key) is wire:
                if wire.host not in hops:
                    if len(hops) % LOOKUPS == LOOKUPS - 1:
                        yield
                    hops[wire.host] = self._find_hop(wire)
                self._update(wire, *hops[wire.host])

    def _find_hop(self, wire: RawWire) -> tuple[str, bytes]:
        """Where the route to the wire's peer leads, and the link address of its next hop there; empty if not known."""
        device = wire.device.port.device
        try:
            route = route_to(self._asking, wire.host)
            if route.device != device.name:
                return route.device, b""
            return route.device, neighbour(self._asking, device.number, route.gateway or wire.host.partition("%")[0])
        except OSError:
            return "", b""

    def _update(self, wire: RawWire, hop: str, address: bytes) -> None:
        wire.measure()
        if hop == wire.device.name:
            wire.on_next_hop(address)
        if hop and wire.hop and hop != wire.hop and wire.owner is not None:
            log.debug("route leads elsewhere peer=%s device=%s", wire.peer, hop)
            wire.owner.on_reset(wire)  # whether the peer still hears it shows at once
        wire.hop = hop or wire.hop

    def close(self) -> None:
        self._asking.close()
        self._watching.close()
