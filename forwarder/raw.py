"""What spray tunnels need of this host: for fake TCP rights and a device, and a place for captures. Asked before an
instance starts, so that it says in one line what is missing."""

import errno
import importlib
import os
import socket
import sys
from pathlib import Path

from forwarder.errors import BootError
from workers.settings import Settings, SprayClientTunnel, SprayServerTunnel

PCAP_ENDS = (3, 12)
"""The first Python for which pypcap's C code is too old."""


def check_raw(settings: Settings) -> None:
    """Raises BootError for the first thing that a spray tunnel needs and that is not there."""
    for tunnel in settings.spray_tunnels:
        _check_capture(tunnel)
        if "tcp" in tunnel.kinds:
            _check_device(tunnel)
            _check_backend(tunnel)
            _check_rights(tunnel)


def _check_capture(tunnel: SprayClientTunnel | SprayServerTunnel) -> None:
    if tunnel.capture is not None and not Path(tunnel.capture).parent.is_dir():
        where = Path(tunnel.capture).parent
        raise BootError(69, f"tunnel {tunnel.name!r}: capture: no directory {str(where)!r} on this host")


def _check_device(tunnel: SprayClientTunnel | SprayServerTunnel) -> None:
    if tunnel.device is not None:
        try:
            socket.if_nametoindex(tunnel.device)
        except OSError:
            raise BootError(69, f"tunnel {tunnel.name!r}: no device {tunnel.device!r} on this host") from None


def _check_backend(tunnel: SprayClientTunnel | SprayServerTunnel) -> None:
    if tunnel.backend == "pcap":
        _check_pcap(tunnel.name)
    if not hasattr(socket, "AF_PACKET"):
        raise BootError(69, f'tunnel {tunnel.name!r}: backend "packet" is for Linux only')


def _check_pcap(name: str) -> None:
    try:
        importlib.import_module("pcap")
    except ImportError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        if sys.version_info >= PCAP_ENDS:
            why = f"which cannot be built for Python 3.12 or newer (this is {version})"
        elif isinstance(error, ModuleNotFoundError):
            why = "which is not installed"
        else:
            why = f"which cannot be loaded: {error}"
        raise BootError(69, f'tunnel {name!r}: backend "pcap" needs pypcap, {why}: leave it at "packet"') from None


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
