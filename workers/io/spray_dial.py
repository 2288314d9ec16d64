"""The client's ports: dialled at a bounded pace, each with a handshake of its own, again when they die.

1. `on_time` asks each port (`workers.core.port`) whether it wants to be dialled; 2. the host's name is looked up
(`_look_up`), unless it is an address; 3. a wire is made; 4. message 1 is sent, and again until message 2 comes or the
port gives up; 5. the port is handed to the session. A port that is old enough is dialled anew before it goes
(`rotate_after`).
"""

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import Any

import gevent
from gevent import socket as green_socket

from workers.core.cuts import Records
from workers.core.datagram import DatagramOpener, DatagramSealer
from workers.core.errors import RemoteProtocolError
from workers.core.handshake import ClientHandshake, Hello, Mode, Welcome
from workers.core.port import Port
from workers.core.port_state import State, Step
from workers.io.context import TICK_S, Context, clock_us
from workers.io.establish import SUITES
from workers.io.port_carrier import PortCarrier, SprayStaging
from workers.io.spray_session import SpraySession, jitter
from workers.io.wire import Diallers, Wire
from workers.settings import Key, SprayClientTunnel

RETRY_US = 250_000
"""When message 1 is sent again; twice as long after each."""
ANSWERS_MAX = 16
"""Answers that are looked at for one message 1: whoever does not know the key must not cost more than that."""
OUTAGE_PAUSE_US = 500_000
"""The longest pause before a dial while no port is up: the server may be back at any moment."""
WARN_US = 10_000_000
"""Not more often: a thousand ports fail for one reason."""
TOLD_US = 1_000_000
"""How often it is logged how many ports are up."""

log = logging.getLogger("forwarder.spray")


class Dial:
    """One dial of one port: from the lookup to message 2. Owns `wire` until the handshake is done."""

    __slots__ = (
        "_answers",
        "_dialler",
        "_ephemeral",
        "_hello",
        "_retry_us",
        "index",
        "next_us",
        "port",
        "sent_us",
        "wire",
    )

    def __init__(self, dialler: "SprayDialler", index: int, port: Port, hello: Hello) -> None:
        self._dialler = dialler
        self.index = index
        self.port = port
        self.wire: Wire | None = None
        self.next_us: int | None = None
        self.sent_us = 0
        self._hello = hello
        self._ephemeral = os.urandom(32)
        self._retry_us = RETRY_US
        self._answers = ANSWERS_MAX

    def handshake(self) -> ClientHandshake:
        """Before message 2. The same each time: a forged answer spoils only the one that it was fed to."""
        key, suite = self._dialler.key, SUITES[self._dialler.context.settings.suite]
        return ClientHandshake(
            key.key_id, key.secret, suite, Mode.SPRAY, self._hello, ephemeral_private=self._ephemeral
        )

    def begin(self, wire: Wire, now_us: int) -> None:
        """The wire is there."""
        self.wire = wire
        wire.owner = self
        self.send(now_us)

    def send(self, now_us: int) -> None:
        """Send message 1."""
        assert self.wire is not None
        self.sent_us = now_us
        self.next_us = now_us + self._retry_us
        self._retry_us *= 2
        self.wire.send_one(self.handshake().message_to_send, now_us)

    def on_payload(self, wire: Wire, records: Records, start: int, end: int, hint: int, now_us: int) -> None:
        """See WireOwner: it should be message 2."""
        if not self._answers:
            return
        self._answers -= 1
        handshake = self.handshake()
        try:
            welcome = handshake.receive(records.view[start:end])
        except RemoteProtocolError as error:
            log.debug("answer refused tunnel=%s reason=%s", self._dialler.tunnel.name, error)
            return
        if welcome is not None:
            wire.on_opened(now_us)
            self._dialler.on_welcome(self, welcome, handshake.split(), now_us)

    def on_writable(self, wire: Wire) -> None:
        """See WireOwner."""

    def on_reset(self, wire: Wire) -> None:
        """See WireOwner. Nothing has been proven yet, so it is believed."""
        self._dialler.on_no_wire(self.index, "reset by the other end")

    def close(self) -> None:
        """Give up."""
        self.next_us = None
        if self.wire is not None:
            self.wire.close()
            self.wire = None


class SprayDialler:
    """Keeps this worker's part of a client's ports up. `diallers`: by kind."""

    def __init__(
        self,
        context: Context,
        tunnel: SprayClientTunnel,
        key: Key,
        session: SpraySession,
        session_id: int,
        diallers: dict[str, Diallers],
        staging: SprayStaging,
    ) -> None:
        self.context = context
        self.tunnel = tunnel
        self.key = key
        self._session = session
        self._session_id = session_id
        self._diallers = diallers
        self._staging = staging
        now_us, settings = clock_us(), session.port_settings()
        own = [each for each in range(len(tunnel.carriers)) if tunnel.owner_of(each, context.workers) == context.seat]
        self.ports = {index: Port(index, settings, now_us, jitter) for index in own}
        self._down = dict.fromkeys(own)
        self._dials: dict[int, Dial] = {}
        self._successors: dict[int, Port] = {}
        self._settings = settings
        self._budget = 1.0
        self._turns: dict[int, Iterator[int]] = {index: count() for index in own}
        self._warned_us = self._told_us = -WARN_US
        self._told_up = 0
        self._stopped = False
        self.wanted_of_kind = Counter[str](tunnel.carriers[index][0] for index in own)
        self.dialled: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    @property
    def wanted(self) -> int:
        """Ports that this worker should have."""
        return len(self.ports)

    @property
    def dialling(self) -> int:
        """Dials on their way."""
        return len(self._dials)

    @property
    def lost(self) -> int:
        """Frames and datagrams that the own host refused."""
        return sum(diallers.lost for diallers in self._diallers.values())

    def on_time(self, now_us: int) -> None:
        """Every TICK_S."""
        if self._stopped or not self.context.in_charge:
            return
        rate = self.tunnel.dial_rate_per_s * TICK_S / self.context.workers
        self._budget = min(self._budget + rate, max(rate, 1.0))
        self._tell(now_us)
        if not self._session.total_up:
            for port in self.ports.values():
                port.hasten(now_us + OUTAGE_PAUSE_US)
        for index in list(self.ports if self._settings.rotate_us else self._down):
            port = self.ports[index]
            if index in self._dials:
                self._follow(self._dials[index], now_us)
            elif port.state is State.DEAD and port.on_time(now_us) is Step.DIAL:
                self._dial(index, port, now_us)
            elif port.state is State.UP and port.is_expired(now_us):
                self._rotate(index, port, now_us)

    def _rotate(self, index: int, port: Port, now_us: int) -> None:
        """Dial the port that is to follow; like any other, it waits after a dial that failed."""
        successor = self._successors.get(index)
        if successor is None:
            successor = Port(index, self._settings, now_us, jitter, standing=port.standing)
            self._successors[index] = successor
        if successor.on_time(now_us) is Step.DIAL:
            self._dial(index, successor, now_us)

    def _follow(self, dial: Dial, now_us: int) -> None:
        if dial.port.on_time(now_us) is Step.DIED:
            self._give_up(dial, "no answer")
        elif dial.next_us is not None and now_us >= dial.next_us:
            dial.send(now_us)

    def _dial(self, index: int, port: Port, now_us: int) -> None:
        if self._budget < 1:
            return
        self._budget -= 1
        self.dialled[self.tunnel.carriers[index][0]] += 1
        # Behind all others: ports that fail must not use up the budget.
        self.ports[index] = self.ports.pop(index)
        if index in self._down:
            self._down[index] = self._down.pop(index)
        port.on_dial(now_us)
        hello = Hello(
            session_id=self._session_id,
            boot_id=self.context.boot_id,
            carrier_index=index,
            worker_slot=self.context.slot,
            tunnel=self.tunnel.name,
            roster=self.context.roster_ids(),
        )
        self._dials[index] = Dial(self, index, port, hello)
        ends, turn = self.tunnel.remote_ends(index), next(self._turns[index])
        sources = self.tunnel.sources or (None,)
        self._reach(index, ends[turn % len(ends)].host, ends[0].port, turn, sources[turn % len(sources)])

    def _reach(self, index: int, host: str, port: int, turn: int, source: str | None) -> None:
        """Only a name goes to gevent's resolver threads, which have to wait for a busy data path."""
        kind = self.tunnel.carriers[index][0]
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            gevent.spawn(self._look_up, index, self._dials[index], host, port, turn, source)
            return
        self._diallers[kind].dial(index, (numeric(found[0][4]), port), source, self)

    def _look_up(self, index: int, dial: Dial, host: str, port: int, turn: int, source: str | None) -> None:
        family = 0 if source is None else socket.AF_INET6 if ":" in source else socket.AF_INET
        try:
            found = green_socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM)
        except OSError as error:
            if self._dials.get(index) is dial:
                self.on_no_wire(index, f"{host}: {error}")
            return
        if self._dials.get(index) is dial:
            address = found[turn % len(found)][4]
            self._diallers[self.tunnel.carriers[index][0]].dial(index, (numeric(address), port), source, self)

    def on_wire(self, carrier: int, wire: Wire) -> None:
        """See DialOwner."""
        dial = self._dials.get(carrier)
        if dial is None:
            wire.close()
            return
        dial.begin(wire, clock_us())

    def on_no_wire(self, carrier: int, why: str) -> None:
        """See DialOwner."""
        dial = self._dials.get(carrier)
        if dial is not None:
            dial.port.on_dial_failed(clock_us())
            self._give_up(dial, why)

    def _give_up(self, dial: Dial, why: str) -> None:
        """The dial has failed; its port knows already, and says when to try again."""
        index = dial.index
        del self._dials[index]
        self._diallers[self.tunnel.carriers[index][0]].cancel(index)
        dial.close()
        kind, port = self.tunnel.carriers[index]
        self.failed[kind] += 1
        log.debug("no port tunnel=%s port=%d/%s reason=%s", self.tunnel.name, port, kind, why)
        now_us = clock_us()
        if now_us - self._warned_us >= WARN_US:
            self._warned_us = now_us
            up, name = len(self._session.carriers), self.tunnel.name
            why = f"{why} up={up} wanted={self.wanted}"
            log.warning("a port fails tunnel=%s port=%d/%s reason=%s", name, port, kind, why)

    def _tell(self, now_us: int) -> None:
        """Log how many ports are up when the first has come, all have, or the last has gone."""
        up = len(self._session.carriers)
        changed = up != self._told_up and (up in (0, self.wanted) or not self._told_up)
        if changed and now_us - self._told_us >= TOLD_US:
            self._told_us, self._told_up = now_us, up
            log.info("ports tunnel=%s up=%d wanted=%d", self.tunnel.name, up, self.wanted)

    def on_welcome(self, dial: Dial, welcome: Welcome, keys: tuple[bytes, bytes], now_us: int) -> None:
        """Message 2 has come: the port is up, and its first record tells the server so."""
        wire = dial.wire
        assert wire is not None
        dial.wire = None
        del self._dials[dial.index]
        suite = SUITES[self.context.settings.suite]
        layers = DatagramSealer(keys[0], suite), DatagramOpener(keys[1], suite, self._staging.inners)
        carrier = PortCarrier(dial.index, wire, dial.port, layers, self._staging, self._session)
        wire.owner = carrier
        wire.on_proven()
        carrier.proven = True
        dial.port.on_established(now_us, now_us - dial.sent_us)
        self.ports[dial.index] = dial.port
        self._successors.pop(dial.index, None)
        self._down.pop(dial.index, None)
        self._session.peer_text = self._session.peer_text or wire.peer
        self._session.add(carrier, now_us)
        carrier.greet(now_us)

    def on_lost(self, carrier: PortCarrier) -> None:
        """A port has died: its own clock says when to dial again."""
        if self.ports.get(carrier.index) is carrier.port:
            self._down[carrier.index] = None
        kind, port = self.tunnel.carriers[carrier.index]
        log.debug("port lost tunnel=%s port=%d/%s", self.tunnel.name, port, kind)
        now_us, index = clock_us(), carrier.index
        is_ours = self.ports.get(index) is carrier.port and index not in self._dials and not self._stopped
        if is_ours and carrier.port.state is State.DEAD and carrier.port.on_time(now_us) is Step.DIAL:
            self._dial(index, carrier.port, now_us)  # the other end has closed it, and takes another

    def stop(self) -> None:
        """Dial no more."""
        self._stopped = True
        for dial in list(self._dials.values()):
            dial.close()
        self._dials.clear()
        for diallers in self._diallers.values():
            diallers.close()


def numeric(address: tuple[Any, ...]) -> str:
    """The host of a socket address; a link-local one with its zone, without which it leads nowhere."""
    host = str(address[0])
    return f"{host}%{address[3]}" if len(address) == 4 and address[3] and "%" not in host else host
