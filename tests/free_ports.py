"""Ports of 127.0.0.1 that nobody has, for TCP and for UDP."""

import socket


def free_ports(count: int) -> list[int]:
    """So many, ascending."""
    held: list[tuple[socket.socket, socket.socket]] = []
    while len(held) < count:
        held.append((socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        held[-1][0].bind(("127.0.0.1", 0))
        try:
            held[-1][1].bind(held[-1][0].getsockname())
        except OSError:
            for sock in held.pop():
                sock.close()
    ports = sorted(stream.getsockname()[1] for stream, _ in held)
    for pair in held:
        for sock in pair:
            sock.close()
    return ports


def free_port() -> int:
    """One."""
    return free_ports(1)[0]
