"""What fake TCP needs of this host: rights and a device. Asked before an instance starts, so that it says in one line
what is missing."""

import errno
import os
import socket

from forwarder.errors import BootError
from workers.settings import Settings, SprayClientTunnel, SprayServerTunnel


def check_raw(settings: Settings) -> None:
    """Raises BootError for the first thing that a spray tunnel needs and that is not there."""
    for tunnel in settings.spray_tunnels:
        if "tcp" in tunnel.kinds:
            _check_device(tunnel)
            _check_backend(tunnel)
            _check_rights(tunnel)


def _check_device(tunnel: SprayClientTunnel | SprayServerTunnel) -> None:
    if tunnel.device is not None:
        try:
            socket.if_nametoindex(tunnel.device)
        except OSError:
            raise BootError(69, f"tunnel {tunnel.name!r}: no device {tunnel.device!r} on this host") from None


def _check_backend(tunnel: SprayClientTunnel | SprayServerTunnel) -> None:
    if tunnel.backend == "pcap":
        raise BootError(69, f'tunnel {tunnel.name!r}: backend "pcap" is not in this version: leave it at "packet"')
    if not hasattr(socket, "AF_PACKET"):
        raise BootError(69, f'tunnel {tunnel.name!r}: backend "packet" is for Linux only')


def _check_rights(tunnel: SprayClientTunnel | SprayServerTunnel) -> None:
    """Protocol 0: the socket that is opened for this receives nothing."""
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except PermissionError:
        missing = "fake TCP needs root or the capability CAP_NET_RAW"
        raise BootError(77, f'tunnel {tunnel.name!r}: {missing} (type = "udp" does without)') from None
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO).lower()
        raise BootError(69, f"tunnel {tunnel.name!r}: cannot open a packet socket: {reason}") from None
