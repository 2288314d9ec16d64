"""What a UDP port has to know of its route: the largest record that the device sends, and how runs are sent there."""

import fcntl
import struct

from workers.core.datagram import RECORD_MAX
from workers.core.path_mtu import LEAST
from workers.io.route import open_netlink, route_to
from workers.io.run_sender import RunSender

UDP_BYTES = 8
IPV4_BYTES, IPV6_BYTES = 20, 40
LEAST_MTU = 1280
"""Of any device where IPv6 passes (RFC 8200 section 5)."""
USUAL_MTU = 1500
"""Of a route that the kernel does not tell."""

_SIOCGIFMTU = 0x8921
_REQUEST = struct.Struct("=16s24x")  # struct ifreq
_MTU = struct.Struct("=16xi")


class UdpRoutes:
    """The routes of one tunnel in one worker: those by one device share a sender, and so what it has learnt."""

    __slots__ = ("_mtu", "_senders", "of_stranger")

    def __init__(self, mtu: int | None) -> None:
        """`mtu`: the most that an IP packet may have, whatever the device; None: no limit."""
        self._mtu = mtu
        self._senders: dict[str, RunSender] = {}
        # Too little is sent there to look for the route.
        self.of_stranger = self.most_bytes("::", LEAST_MTU), self.sender("")

    def find(self, host: str) -> tuple[int, RunSender]:
        """The largest record to a numeric address, and the sender of its device.

        The device's MTU counts, and not what ICMP has told of the path, which may be forged: that is found by probes.
        """
        device, mtu = "", USUAL_MTU
        try:
            with open_netlink() as netlink:
                device = route_to(netlink, host).device
                answer = fcntl.ioctl(netlink.fileno(), _SIOCGIFMTU, _REQUEST.pack(device.encode()))
                (mtu,) = _MTU.unpack_from(answer)
        except OSError:
            pass  # the port finds out by itself whether there is a way
        return self.most_bytes(host, mtu), self.sender(device)

    def most_bytes(self, host: str, mtu: int) -> int:
        """The largest record to `host` where a packet may have `mtu` bytes."""
        mtu = min(mtu, self._mtu or mtu)
        headers = UDP_BYTES + (IPV6_BYTES if ":" in host else IPV4_BYTES)
        return min(max(mtu - headers, LEAST), RECORD_MAX)

    def sender(self, device: str) -> RunSender:
        """The sender of all wires by that device."""
        found = self._senders.get(device)
        if found is None:
            found = self._senders[device] = RunSender()
        return found

    @property
    def lost(self) -> tuple[int, int]:
        """Datagrams that were too large for a device, and those refused by ICMP, firewall or route."""
        senders = self._senders.values()
        return sum(each.too_large for each in senders), sum(each.undelivered for each in senders)
