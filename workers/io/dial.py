"""Dialling: the stripes of a client's session that this worker owns are connected, replaced when they die, and paced.

One greenlet decides, one greenlet per dial connects and shakes hands; then the socket goes to the event loop's
callbacks. While nothing answers, a single dial at a time tries, with growing and jittered pauses; a provider that
sees hundreds of connection attempts a second suspends the host.
"""

import logging
import random
import socket as plain_socket
from collections import deque
from typing import Any

import gevent
from gevent import socket
from gevent.event import Event

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.handshake import ClientHandshake, Hello, Mode, Welcome
from workers.io import sockets
from workers.io.context import Context, clock_us
from workers.io.establish import SUITES, make_stripe, record_keys
from workers.io.session import Session
from workers.io.stripe import Stripe
from workers.settings import Key, StripeClientTunnel

CONCURRENT = 32
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.1, 2.0
"""The longest pause is short: a server that comes back is found within 3 s."""
YOUNG_S = 5.0
"""A stripe lost at this age is as good as a failed dial: a server may accept a handshake and then drop the stripe."""
SETTLED_S = 1.0
"""Failures are over when a stripe has stayed up for so long."""

log = logging.getLogger("forwarder.dial")


class Dialler:
    """Keeps `wanted` stripes of `session` up. `session_id` goes into every handshake."""

    def __init__(
        self, context: Context, tunnel: StripeClientTunnel, key: Key, session: Session, session_id: int, entropy: Any
    ) -> None:
        self._context = context
        self._tunnel = tunnel
        self._key = key
        self._session = session
        self._session_id = session_id
        self._entropy = entropy
        self._own = [index for index in range(tunnel.somaxconn) if index % context.workers == context.slot]
        self._missing: deque[int] = deque(self._own)
        self._dialling: set[int] = set()
        self._failures = 0
        self._failing_since_us = 0
        self._next_dial_s = 0.0
        self._paused_until_s = 0.0
        self._used_us = clock_us()
        self._shrunk = False
        self._wake = Event()
        self._stopped = False
        self._greenlet = gevent.spawn(self._run)

    @property
    def wanted(self) -> int:
        """Stripes that this worker should have."""
        return min(1, len(self._own)) if self._shrunk else len(self._own)

    @property
    def dialling(self) -> int:
        """Dials on their way."""
        return len(self._dialling)

    def _wants(self, index: int) -> bool:
        return not self._stopped and (not self._shrunk or index == self._own[0])

    def on_stripe_lost(self, index: int, age_s: float, why: str) -> None:
        """Replace a stripe, unless the pool is shrunk, or the stripe that replaces it is on its way."""
        if not self._wants(index) or index in self._dialling:
            return
        if age_s < YOUNG_S:
            self._on_failure(index, f"lost {age_s:.1f} s after the handshake: {why}")
        else:
            self._missing.append(index)
        self._wake.set()

    def on_stream_opened(self) -> None:
        """Grow back to the full number of stripes."""
        self._used_us = clock_us()
        if self._shrunk:
            self._grow()

    def stop(self) -> None:
        """Dial no more."""
        self._stopped = True
        self._wake.set()

    def _run(self) -> None:
        loop = self._context.loop
        spacing_s = self._context.workers / self._tunnel.dial_rate_per_s
        while not self._stopped:
            wait_s = self._next_dial_s - loop.now()
            limit = CONCURRENT if not self._failures else 1
            if not self._missing or len(self._dialling) >= limit:
                wait_s = None
            elif wait_s <= 0:
                index = self._missing.popleft()
                if index not in self._session.stripes and index not in self._dialling:
                    self._dialling.add(index)
                    self._next_dial_s = loop.now() + spacing_s
                    gevent.spawn(self._dial, index)
                continue
            self._wake.wait(wait_s)
            self._wake.clear()

    def _dial(self, index: int) -> None:
        why = None
        try:
            with gevent.Timeout(self._tunnel.connect_timeout_s, TimeoutError("timed out")):
                self._connect(index)
        except (OSError, RemoteProtocolError) as error:
            why = str(error) or type(error).__name__
        self._dialling.discard(index)
        if why is not None:
            self._on_failure(index, why)
        self._wake.set()

    def _on_failure(self, index: int, why: str) -> None:
        """Pause before the next dial. What fails during a pause has the same cause and makes it no longer."""
        if self._wants(index):
            self._missing.append(index)
        now_s = self._context.loop.now()
        if now_s < self._paused_until_s:
            return
        if not self._failures:
            self._failing_since_us = clock_us()
            log.warning("cannot connect tunnel=%s server=%s reason=%s", self._tunnel.name, self._tunnel.remote_end, why)
        pause_s = min(BACKOFF_MIN_S * 2 ** min(self._failures, 10), BACKOFF_MAX_S)
        self._failures += 1
        self._next_dial_s = self._paused_until_s = now_s + pause_s * random.uniform(0.5, 1.0)

    def _on_settled(self) -> None:
        log.info("reconnected tunnel=%s server=%s", self._tunnel.name, self._tunnel.remote_end)
        self._failures = 0
        self._wake.set()

    def _connect(self, index: int) -> None:
        tunnel, context = self._tunnel, self._context
        started_us = clock_us()
        in_outage = not self._session.total_up
        gone_told = len(context.gone)
        source = (tunnel.source, 0) if tunnel.source else None
        address = (tunnel.remote_end.host, tunnel.remote_end.port)
        sock = socket.create_connection(address, timeout=tunnel.connect_timeout_s, source_address=source)
        try:
            sockets.set_congestion(sock, tunnel.congestion)
            handshake = self._handshake(index)
            sock.sendall(handshake.message_to_send)
            welcome = None
            while welcome is None:
                data = sock.recv(2048)
                if not data:
                    raise ConnectionResetError("closed by the server during the handshake")
                welcome = handshake.receive(data)
            connected = plain_socket.socket(fileno=sock.detach())
        finally:
            sock.close()
        if not self._wants(index):
            connected.close()
            return
        stripe = make_stripe(context, tunnel, connected, index, record_keys(context, handshake.split()))
        stripe.gone_told = gone_told
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
        session.on_far_roster({int(slot): serial for slot, serial in roster.items()}, welcome.boot_id)
        if outage_us is not None and not welcome.session_known:
            session.share.on_forgotten(stripe.far, outage_us)
        stripe.send(frame.pack(frame.PING, 0, 0, 0, clock_us() & (2**63 - 1)))
        session.add_stripe(stripe)
        stripe.flush()
        stripe.start(session, leftover)

    def on_time(self, now_us: int) -> None:
        """Notice that failures are over, rotate old stripes, shrink the pool while nobody uses it."""
        session = self._session
        if self._failures and any(
            stripe.up_since_us > self._failing_since_us and now_us - stripe.up_since_us > SETTLED_S * 1e6
            for stripe in session.stripes.values()
        ):
            self._on_settled()
        rotate_s = self._tunnel.rotate_after_s
        if rotate_s is not None and self._context.loop.now() >= self._paused_until_s:
            self._rotate(now_us - int(rotate_s * 1e6))
        self._used_us = now_us if session.share.streams else max(self._used_us, session.exchange.last_guest_us)
        is_idle = now_us - self._used_us > self._tunnel.idle_timeout_s * 1e6
        if is_idle and not self._shrunk:
            self._shrink()
        elif self._shrunk and not is_idle:
            self._grow()

    def _rotate(self, before_us: int) -> None:
        """Replace one stripe that is older, the new one first."""
        for stripe in self._session.stripes.values():
            is_due = stripe.up_since_us < before_us and stripe.index not in self._dialling
            if is_due and len(self._dialling) < CONCURRENT:
                self._dialling.add(stripe.index)
                gevent.spawn(self._dial, stripe.index)
                break

    def _shrink(self) -> None:
        self._shrunk = True
        self._missing = deque(index for index in self._own[:1] if index not in self._session.stripes)
        for index in self._own[1:]:
            stripe = self._session.stripes.get(index)
            if stripe is not None:
                stripe.fail("idle")
        self._wake.set()

    def _grow(self) -> None:
        self._shrunk = False
        self._missing.extend(
            index for index in self._own if index not in self._session.stripes and index not in self._missing
        )
        self._wake.set()
