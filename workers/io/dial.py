"""Dialling: the stripes of a client's session that this worker owns are connected, replaced when they die or stall.

`workers.core.dialplan` decides what to dial when. One greenlet asks it, one greenlet per dial connects and shakes
hands; then the socket goes to the event loop's callbacks.
"""

import heapq
import logging
import math
import random
import socket as plain_socket
from typing import Any

import gevent
from gevent import socket
from gevent.event import Event

from workers.core import frame
from workers.core.dialplan import Attempt, DialPlan, Route
from workers.core.errors import RemoteProtocolError
from workers.core.handshake import ClientHandshake, Hello, Mode, Welcome
from workers.io import mesh, sockets
from workers.io.context import TICK_S, Context, clock_us
from workers.io.establish import SUITES, make_stripe, record_keys
from workers.io.reach import Reach
from workers.io.session import Session
from workers.io.stripe import Stripe
from workers.settings import Key, StripeClientTunnel

log = logging.getLogger("forwarder.dial")


class Dialler:
    """Keeps this worker's part of the session's stripes up. `session_id` goes into every handshake."""

    def __init__(
        self, context: Context, tunnel: StripeClientTunnel, key: Key, session: Session, session_id: int, entropy: Any
    ) -> None:
        self._context = context
        self._tunnel = tunnel
        self._key = key
        self._session = session
        self._session_id = session_id
        self._entropy = entropy
        self._reaches = _reaches(tunnel)
        self._plan = DialPlan(len(self._reaches), *self._pace(), lambda: random.uniform(0.5, 1.0))
        self._greenlets: dict[Attempt, gevent.Greenlet[..., None]] = {}
        self._joining = -1
        self._used_us = clock_us()
        self._most = tunnel.somaxconn
        self._allowed = sockets.stripes_allowed(len(context.settings.client_tunnels))
        self._is_shrunk = self._is_capped = False
        self._wake = Event()
        self.dialled = self.failed = 0
        self._stopped = False
        self._want()
        self._greenlet = gevent.spawn(self._run)

    @property
    def wanted(self) -> int:
        """Stripes that this worker should have."""
        return len(self._plan.wanted)

    @property
    def wanted_of_all(self) -> int:
        """Stripes that all workers together should have while the tunnel is in use."""
        return self._most

    @property
    def dialling(self) -> int:
        """Dials on their way."""
        return self._plan.attempts

    # How many

    def resize(self, most: int) -> None:
        """All workers together are to have `most` stripes."""
        if most != self._most:
            self._most = most
            self._want()

    def on_stream_opened(self) -> None:
        """Grow back to the full number of stripes."""
        self._used_us = clock_us()
        if self._is_shrunk:
            self._set_shrunk(False)

    def _set_shrunk(self, is_shrunk: bool) -> None:
        self._is_shrunk = is_shrunk
        self._want()

    def _want(self) -> None:
        if self._stopped:
            return
        own = range(self._context.seat, self._most if self._context.in_charge else 0, self._context.workers)
        was_capped, self._is_capped = self._is_capped, len(own) > self._allowed
        if self._is_capped and not was_capped:
            log.warning("few descriptors for stripes tunnel=%s stripes=%d", self._tunnel.name, self._allowed)
        own = own[: self._allowed]
        self._plan.want(own[:1] if self._is_shrunk else own)
        for index in [each for each in self._session.stripes if each not in self._plan.wanted]:
            self._session.stripes[index].fail("not needed")
        for attempt in list(self._greenlets):
            if attempt.index not in self._plan.wanted:
                self._give_up(attempt)
        self._wake.set()

    def use(self, tunnel: StripeClientTunnel, key: Key) -> None:
        """Other settings and another key for the dials that follow. The server and our addresses stay the same."""
        assert (tunnel.remote_ends, tunnel.sources) == (self._tunnel.remote_ends, self._tunnel.sources)
        self._tunnel, self._key = tunnel, key
        self._reaches = _reaches(tunnel)
        self._plan.pace(*self._pace())
        self._wake.set()

    def _pace(self) -> tuple[int, int]:
        tunnel = self._tunnel
        return int(self._context.workers / tunnel.dial_rate_per_s * 1e6), int(tunnel.connect_timeout_s * 1e6)

    def resume(self) -> None:
        """Dial what this worker should have: it is in charge now."""
        self._want()

    def stop(self) -> None:
        """Dial no more."""
        self._stopped = True
        for attempt in list(self._greenlets):
            self._give_up(attempt)
        self._wake.set()

    # What befalls a stripe

    def on_stripe_lost(self, index: int, why: str) -> None:
        """Replace a stripe, unless it is just being replaced or not needed."""
        if index == self._joining or self._stopped:
            return
        route = self._plan.on_lost(index, clock_us())
        if route is not None:
            self._warn(route, f"a stripe was lost soon after the handshake: {why}")
        self._wake.set()

    def on_moved(self, index: int) -> None:
        """Replace a stripe whose worker at the server is on its way out."""
        self._plan.move(index)
        self._wake.set()

    def on_stale(self, index: int, is_stale: bool) -> None:
        """Replace a stripe that stalls, or keep one that works again."""
        if is_stale:
            self._plan.on_stale(index)
            self._wake.set()
        else:
            self._plan.on_fresh(index)

    def _warn(self, route: Route, why: str) -> None:
        log.warning("cannot connect tunnel=%s server=%s reason=%s", self._tunnel.name, self._reaches[route.number], why)

    # Dials

    def _run(self) -> None:
        while not self._stopped:
            now_us = clock_us()
            attempt = self._plan.next_dial(now_us)
            if attempt is not None:
                self.dialled += 1
                self._greenlets[attempt] = gevent.spawn(self._dial, attempt)
                continue
            wait_us = self._plan.wait_us(now_us)
            self._wake.wait(None if wait_us is None else max(wait_us, 1000) / 1e6)
            self._wake.clear()

    def _give_up(self, attempt: Attempt) -> None:
        self._plan.end(attempt)
        greenlet = self._greenlets.pop(attempt, None)
        if greenlet is not None:
            greenlet.kill(block=False)

    def _dial(self, attempt: Attempt) -> None:
        why = None
        try:
            with gevent.Timeout(self._tunnel.connect_timeout_s, TimeoutError("timed out")):
                self._connect(attempt)
        except (OSError, RemoteProtocolError) as error:
            why = str(error) or type(error).__name__
        self._greenlets.pop(attempt, None)
        self.failed += why is not None
        if why is not None and not self._stopped and self._plan.on_failed(attempt, clock_us()):
            self._warn(self._plan.routes[attempt.route], why)
        self._wake.set()

    def _connect(self, attempt: Attempt) -> None:
        tunnel, context = self._tunnel, self._context
        started_us = clock_us()
        in_outage = not self._session.liveness.total_up
        gone_told = len(context.gone)
        sock = self._reaches[attempt.route].connect()
        try:
            handshake = self._handshake(attempt.index)
            welcome = _shake_hands(sock, handshake)
            connected = plain_socket.socket(fileno=sock.detach())
        finally:
            sock.close()
        if self._stopped or not self._plan.is_current(attempt):
            self._plan.end(attempt)
            connected.close()
            return
        keys = record_keys(context, handshake.split())
        try:
            stripe = make_stripe(context, tunnel, connected, attempt.index, keys)
        except OSError:
            connected.close()
            raise
        stripe.gone_told = gone_told
        for useless in self._plan.on_up(attempt, clock_us()):
            self._give_up(useless)
        self._join(stripe, welcome, handshake.leftover, started_us if in_outage else None)

    def _handshake(self, index: int) -> ClientHandshake:
        context = self._context
        hello = Hello(self._session_id, context.boot_id, index, context.slot, self._tunnel.name, context.roster_ids())
        suite = SUITES[context.settings.suite]
        return ClientHandshake(
            self._key.key_id, self._key.secret, suite, Mode.STRIPE, hello, ephemeral_private=self._entropy(32)
        )

    def _join(self, stripe: Stripe, welcome: Welcome, leftover: bytes, outage_us: int | None) -> None:
        session = self._session
        roster = dict(welcome.roster)
        stripe.owner = session
        stripe.far = (welcome.worker_slot, roster[welcome.worker_slot], welcome.boot_id)
        session.peer_text = sockets.address_text(stripe.sock, peer=True)
        session.far_end.on_roster(
            {int(slot): serial for slot, serial in roster.items()},
            welcome.boot_id,
            is_first=not session.liveness.total_up,
        )
        if outage_us is not None and not welcome.session_known:
            session.share.on_forgotten(stripe.far, outage_us)
        stripe.send(frame.pack(frame.PING, 0, 0, 0, clock_us() & (2**63 - 1)))
        self._joining = stripe.index
        session.exchange.tell_all(mesh.REPLACED, value=stripe.index)
        self._context.mesh.flush()
        session.add_stripe(stripe)
        self._joining = -1
        if session.stripes.get(stripe.index) is not stripe:
            self.on_stripe_lost(stripe.index, "it broke at once")
            return
        stripe.flush()
        stripe.start(session, leftover)

    # Time

    def on_time(self, now_us: int) -> None:
        """Notice that failures are over, rotate old stripes, shrink the pool while nobody uses it."""
        if self._stopped:
            return
        for route in self._plan.on_time(now_us):
            log.info("reconnected tunnel=%s server=%s", self._tunnel.name, self._reaches[route.number])
        if self._plan.has_work:
            self._wake.set()
        elif self._tunnel.rotate_after_s is not None and not self._plan.attempts:
            self._rotate(now_us, self._tunnel.rotate_after_s)
        session = self._session
        used_us = now_us if session.share.streams else max(self._used_us, session.exchange.last_guest_us)
        self._used_us = used_us
        is_idle = now_us - used_us > self._tunnel.idle_timeout_s * 1e6
        if is_idle != self._is_shrunk:
            self._set_shrunk(is_idle)

    def _rotate(self, now_us: int, after_s: float) -> None:
        """Replace stripes of that age, the new one first, oldest first, and as evenly as all of them come of age."""
        stripes = self._session.stripes.values()
        most = 1 + int(len(stripes) * TICK_S / after_s)
        for stripe in heapq.nsmallest(most, stripes, key=lambda each: each.up_since_us):
            if now_us - stripe.up_since_us > after_s * 1e6:
                self._plan.refresh(stripe.index)
                self._wake.set()


def _reaches(tunnel: StripeClientTunnel) -> list[Reach]:
    """Every route."""
    ends, sources = tunnel.remote_ends, tunnel.sources or (None,)
    return [
        Reach(ends[number % len(ends)], sources[number % len(sources)], tunnel.congestion)
        for number in range(math.lcm(len(ends), len(sources)))
    ]


def _shake_hands(sock: socket.socket, handshake: ClientHandshake) -> Welcome:
    """The server's answer. Raises OSError and RemoteProtocolError."""
    sock.sendall(handshake.message_to_send)
    welcome = None
    while welcome is None:
        try:
            data = sock.recv(2048)
        except TimeoutError:
            raise TimeoutError("no answer to the handshake") from None
        if not data:
            raise ConnectionResetError("closed by the server during the handshake")
        welcome = handshake.receive(data)
    return welcome
