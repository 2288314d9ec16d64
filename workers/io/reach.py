"""Connecting to a name: all its addresses are tried, each with a head start before the next (RFC 8305).

What a name was last known to stand for is used where looking it up takes long: in an outage the name server is away,
too. Greenlets only.
"""

import errno
import socket as plain_socket
from collections.abc import Sequence
from typing import Any

import gevent
from gevent import socket
from gevent.queue import Queue

from workers.io import sockets
from workers.settings import Address

HEAD_START_S = 0.25
LOOKUP_S = 1.0
"""After so long what is known of the name is used, if anything is."""

Target = tuple[int, Any]
"""Address family and socket address."""


class Reach:
    """Connects to `end`, from `source` if that is given."""

    def __init__(self, end: Address, source: str | None, congestion: str | None) -> None:
        self.end = end
        self._source = source
        self._congestion = congestion
        self._known: list[Target] = []

    def __str__(self) -> str:
        return f"{self.end} from {self._source}" if self._source else str(self.end)

    def connect(self) -> socket.socket:
        """A connected socket, of the first address that answers. Raises OSError; whoever wants a limit kills it."""
        targets = self._look_up()
        if len(targets) == 1:
            return self._connect(targets[0])
        answers: Queue[socket.socket | OSError] = Queue()
        racers = [
            gevent.spawn_later(place * HEAD_START_S, self._race, each, answers) for place, each in enumerate(targets)
        ]
        try:
            return self._winner(answers, len(racers))
        finally:
            gevent.killall(racers, block=False)
            while not answers.empty():
                answer = answers.get()
                if not isinstance(answer, OSError):
                    answer.close()

    def _winner(self, answers: "Queue[socket.socket | OSError]", racers: int) -> socket.socket:
        last: OSError = OSError("no address")
        for _ in range(racers):
            answer = answers.get()
            if not isinstance(answer, OSError):
                return answer
            last = answer
        raise last

    def _race(self, target: Target, answers: "Queue[socket.socket | OSError]") -> None:
        try:
            answers.put(self._connect(target))
        except OSError as error:
            answers.put(error)

    def _look_up(self) -> Sequence[Target]:
        """The name's addresses, of the source's family if there is one. Raises OSError."""
        patience = gevent.Timeout(LOOKUP_S if self._known else None)
        try:
            with patience:
                found = self._addresses()
        except gevent.Timeout as expired:
            if expired is not patience:
                raise
            return self._known
        except plain_socket.gaierror:
            if not self._known:
                raise
            return self._known
        family = 0 if self._source is None else socket.AF_INET6 if ":" in self._source else socket.AF_INET
        targets = [(each[0], each[4]) for each in found if family in (0, each[0])]
        if not targets:
            raise OSError(f"{self.end.host} has no address that can be reached from {self._source}")
        self._known = targets
        return targets

    def _addresses(self) -> list[Any]:
        """As getaddrinfo. Only a name goes to gevent's resolver threads, which wait for a busy data path."""
        host, port, kind = self.end.host, self.end.port, socket.SOCK_STREAM
        try:
            return plain_socket.getaddrinfo(host, port, type=kind, flags=socket.AI_NUMERICHOST)
        except plain_socket.gaierror:
            return list(socket.getaddrinfo(host, port, 0, kind))

    def _connect(self, target: Target) -> socket.socket:
        family, address = target
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if sockets.is_of_reserve(sock, sockets.LAST_DESCRIPTORS):
                raise OSError(errno.EMFILE, "few descriptors are left")
            sockets.set_congestion(sock, self._congestion)
            if self._source is not None:
                sock.bind((self._source, 0))
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock
