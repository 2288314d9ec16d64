"""All open listening sockets, by what they are for, so that a port stays open while tunnels come, change and go."""

import errno
import os
import socket
import time
from typing import Any

from forwarder.errors import BootError
from forwarder.listeners import Listeners, Wanted, group_grown, open_wanted, wanted_by
from forwarder.tunnels import overlap
from workers.settings import Settings


class Doors:
    """Owns the sockets, for the supervisor and through every reload."""

    def __init__(self) -> None:
        self._open: dict[Wanted, list[socket.socket]] = {}

    def open_missing(self, settings: Settings, workers: int, patience_s: float = 0.0) -> None:
        """Opens what these settings want and is not open yet, for so many workers. Raises BootError, and then leaves
        all as it was.

        patience_s: how long to wait for a taken port, for a predecessor that was killed and is just being cleared away.
        """
        deadline = time.monotonic() + patience_s
        added: dict[Wanted, list[socket.socket]] = {}
        known: dict[str, Any] = {}
        try:
            for tunnel in settings.tunnels:
                for wanted in wanted_by(tunnel):
                    if wanted not in self._open and wanted not in added:
                        added[wanted] = self._open_one(tunnel.name, wanted, deadline, known)
            self._grow(added, workers)
        except BootError:
            for sockets in added.values():
                _close(sockets)
            raise

    def close_unwanted(self, settings: Settings) -> None:
        """Closes what these settings do not want."""
        kept = {wanted for tunnel in settings.tunnels for wanted in wanted_by(tunnel)}
        for wanted in self._open.keys() - kept:
            _close(self._open.pop(wanted))

    def listeners(self, settings: Settings) -> Listeners:
        """The sockets of each tunnel, as workers get them; they stay this object's."""
        return {
            tunnel.index: [sock for wanted in wanted_by(tunnel) for sock in self._open[wanted]]
            for tunnel in settings.tunnels
        }

    def close_in_child(self, kept: Listeners) -> None:
        """Closes all but what a worker gets."""
        own = {sock for sockets in kept.values() for sock in sockets}
        for sockets in self._open.values():
            _close([sock for sock in sockets if sock not in own])

    def close(self) -> None:
        for sockets in self._open.values():
            _close(sockets)
        self._open.clear()

    def saved(self) -> list[tuple[Wanted, list[int]]]:
        """What is open, as descriptors, for `restore`."""
        return [(wanted, [sock.fileno() for sock in sockets]) for wanted, sockets in self._open.items()]

    def restore(self, saved: list[tuple[Wanted, list[int]]]) -> None:
        """Takes the descriptors over."""
        self._open = {wanted: [taken_over(fd) for fd in fds] for wanted, fds in saved}

    def _open_one(self, name: str, wanted: Wanted, deadline: float, known: dict[str, Any]) -> list[socket.socket]:
        try:
            return open_wanted(name, wanted, deadline, known)
        except BootError as error:
            taken = error.message.endswith(os.strerror(errno.EADDRINUSE).lower())
            for other in self._open if taken else ():
                if overlap(wanted.address, other.address) and (wanted.kind == "udp") == (other.kind == "udp"):
                    raise BootError(
                        error.code, f"{error.message}, by this instance's {other}: changing that takes a restart"
                    ) from None
            raise

    def _grow(self, added: dict[Wanted, list[socket.socket]], workers: int) -> None:
        """Takes `added` in, with one socket of every group for each worker."""
        every = self._open | added
        try:
            for wanted, sockets in every.items():
                if wanted.use == "datagrams":
                    # What has grown before another fails stays: sockets too many lose nothing.
                    grown = group_grown(sockets, workers)
                    (added if wanted in added else self._open)[wanted] = grown
        except OSError as error:
            raise BootError(69, f"cannot listen on {wanted}: {str(error.strerror).lower()}") from None
        self._open |= added


def taken_over(fd: int) -> socket.socket:
    """The non-blocking socket that another program of this process left."""
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


def _close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()
