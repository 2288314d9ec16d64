"""What applications send in system tests: bytes that can be told apart, and a digest of what arrives.

Each call works on blocking sockets with a timeout; `together` runs several in threads of their own.
"""

import hashlib
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PIECE_BYTES = 256 << 10
_POOL_BYTES = 4 << 20
_STEP_BYTES = 65_537


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The calls' results, in their order; raises what the first of them raised, after all have ended."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def pieces(seed: int, total: int) -> Iterator[memoryview]:
    """`total` bytes that depend on `seed` and on their place: what is lost, repeated or swapped changes the digest."""
    pool = memoryview(random.Random(seed).randbytes(_POOL_BYTES))
    start = 0
    while total:
        piece = pool[start : start + min(PIECE_BYTES, total)]
        yield piece
        total -= len(piece)
        start = (start + _STEP_BYTES) % (_POOL_BYTES - PIECE_BYTES)


def send(connection: socket.socket, seed: int, total: int) -> str:
    """Send that, end this direction; the number of bytes and their sha256."""
    digest = hashlib.sha256()
    for piece in pieces(seed, total):
        connection.sendall(piece)
        digest.update(piece)
    connection.shutdown(socket.SHUT_WR)
    return f"{total} {digest.hexdigest()}"


def receive(connection: socket.socket) -> str:
    """Read to the end; the number of bytes and their sha256, as `send` returns them."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE_BYTES))
    total = 0
    while count := connection.recv_into(buffer):
        digest.update(buffer[:count])
        total += count
    return f"{total} {digest.hexdigest()}"


def exchange(one: socket.socket, other: socket.socket, total: int, seed: int = 1) -> None:
    """`total` bytes each way at once over a connection whose ends are `one` and `other`: all arrive, then the end."""
    sent_up, sent_down, received_up, received_down = together(
        lambda: send(one, seed, total),
        lambda: send(other, seed + 1, total),
        lambda: receive(other),
        lambda: receive(one),
    )
    assert received_up == sent_up
    assert received_down == sent_down


def congestion_control() -> str:
    """One that loss does not beat down, where the kernel has it."""
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    return "bbr" if "bbr" in available else "cubic"
