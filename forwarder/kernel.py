"""What the kernel of this host has to offer, asked before an instance starts."""

import errno
import socket
from pathlib import Path

from forwarder.errors import ConfigError
from forwarder.tunnels import key_of_tunnel
from workers.settings import Settings

AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


def check_congestion(file: Path, settings: Settings) -> None:
    """Raises ConfigError for a congestion control that this kernel does not have, or not for this user.

    Where the kernel does not say, the stripes will find out.
    """
    for tunnel in settings.client_tunnels or settings.server_tunnels:
        if tunnel.congestion is None or (refusal := _refusal(tunnel.congestion)) is None:
            continue
        key = f"{key_of_tunnel(tunnel.index, tunnel.name)}.congestion"
        found = f'"{tunnel.congestion}"'
        if refusal == errno.EPERM:
            raise ConfigError.mistake(
                file, key, "one that this user may choose (tcp_allowed_congestion_control)", found
            )
        raise ConfigError.mistake(file, key, f"one that this kernel has ({', '.join(_available())})", found)


def _refusal(algorithm: str) -> int | None:
    """The error of choosing it; None where it can be chosen, or where that is not known."""
    option = getattr(socket, "TCP_CONGESTION", None)
    if option is None:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, option, algorithm.encode())
        except OSError as error:
            return error.errno if error.errno in (errno.ENOENT, errno.EPERM) else None
    return None


def _available() -> list[str]:
    try:
        return AVAILABLE.read_text().split()
    except OSError:
        return ["its list cannot be read"]
