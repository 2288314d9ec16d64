"""One worker's part of a spray session: the ports that it owns, and which of them takes the next run of datagrams.

1. `send`: datagrams of one conversation and size go to the ports in runs, as `workers.core.port_choice` says. One that
   no record holds is split, and with `copies = 2` each goes on two ports. 2. `exchange`: a worker without ports gives
   them to one that has some. 3. What no port takes now waits, in bounded memory (`_wait`), and `has_room` is false.
4. `on_opened`: what came is delivered, or handed to the worker that owns its conversation.
"""

import random
from collections.abc import Callable

from workers.core import fragment, inner
from workers.core.cuts import Datagrams, Records
from workers.core.inner import Opened
from workers.core.port import Port, PortSettings
from workers.core.port_state import State
from workers.io import mesh
from workers.io.context import Context, clock_us
from workers.io.mesh import Descriptor, Peer
from workers.io.port_carrier import PortCarrier
from workers.io.spray_buffers import Assembly, SprayBuffers
from workers.io.spray_exchange import SprayExchange
from workers.io.spray_ports import SprayPorts
from workers.io.spray_waiting import PIECE, Waiting, copies_of, datagrams_in
from workers.settings import SprayTunnel
from workers.shm.totals import TunnelTotals
from workers.status import SessionStatus

TIMER_S = 0.02
"""How exactly probes are sent and deaths are noticed while datagrams come and go."""
QUIET_US = 1_000_000
IDLE_US = 30_000_000
"""A server's session without ports is forgotten after so long, and not before its conversations."""


def jitter() -> float:
    """From 0.5 to 1."""
    return random.uniform(0.5, 1.0)


class SpraySession:
    """`carriers` are this worker's, by index. The tunnel sets the hooks.

    deliver(conversation, size, payload, now_us): datagrams of `size` bytes, the last perhaps shorter, for the
    application; False if another worker was given them. lost(carrier): a port is gone. unknown(carrier, records, start,
    end, now_us): payload of which nothing opened. room(): what waited has left.
    """

    def __init__(self, context: Context, tunnel: SprayTunnel, number: int, key_index: int, buffers: SprayBuffers):
        self.context, self.tunnel = context, tunnel
        self.number, self.key_index = number, key_index
        self.peer_text = ""
        now_us = clock_us()
        self.past = TunnelTotals(tunnel.name, "spray")
        self.ports = SprayPorts(now_us, self.past)
        self.carriers = self.ports.carriers
        self.used_us = self._lone_us = now_us
        self.deliver: Callable[[int, int, bytes, int], bool] = lambda *_: True
        self.lost: Callable[[PortCarrier], None] = lambda _: None
        self.unknown: Callable[[PortCarrier, Records, int, int, int], None] = lambda *_: None
        self.room: Callable[[], None] = lambda: None
        self.bytes_in = self.bytes_out = self.dropped = self.too_large = self.undelivered = 0
        self._buffers = buffers
        self._choice = self.ports.choice
        self._waiting = Waiting()
        self.exchange = SprayExchange(context, tunnel.index, number, key_index)
        self._sequence = random.getrandbits(32)
        self._assembly = Assembly(number, buffers.reassembler)
        self._timer = context.loop.timer(TIMER_S, TIMER_S)
        self._ticking = False

    # Ports come and go

    def port_settings(self) -> PortSettings:
        """What all ports of the session have in common."""
        tunnel = self.tunnel
        rotate_s: float = getattr(tunnel, "rotate_after_s", None) or 0.0
        return PortSettings(
            most_bytes=self._buffers.record_max,
            keepalive_us=int(tunnel.keepalive_s * 1e6),
            rotate_us=int(rotate_s * 1e6),
            ports=len(tunnel.carriers),
        )

    def add(self, carrier: PortCarrier, now_us: int) -> None:
        """A port has come up, perhaps in place of another of its index."""
        self.ports.add(carrier, now_us)
        carrier.ping(now_us)
        self._tell()
        self._drain()

    def remove(self, carrier: PortCarrier, now_us: int) -> None:
        """The port is gone, or has to go."""
        self.ports.remove(carrier, now_us)
        self._tell()

    def _tell(self) -> None:
        """Let the other workers know how many ports here are fit for data."""
        self.exchange.tell_carriers(self.ports.up)

    def on_up(self, carrier: PortCarrier) -> None:
        """See CarrierOwner."""

    def on_lost(self, carrier: PortCarrier) -> None:
        """See CarrierOwner."""
        self.remove(carrier, clock_us())
        self.lost(carrier)

    def on_unknown(self, carrier: PortCarrier, records: Records, start: int, end: int, now_us: int) -> None:
        """See CarrierOwner."""
        self.unknown(carrier, records, start, end, now_us)

    @property
    def total_up(self) -> int:
        """Ports of all workers together."""
        return len(self.carriers) + self.exchange.up

    # Egress

    @property
    def has_room(self) -> bool:
        """Whether more may be read for this session."""
        return not self._waiting

    def send(
        self, conversation: int, source: Datagrams, first: int, count: int, size: int, last: int, now_us: int
    ) -> None:
        """Send `count` datagrams of `size` bytes, the last of `last`, from `source` on; all are taken or counted."""
        self._on_use(now_us)
        if self._waiting:
            self._wait(conversation, source, first, count, size, last)
            return
        if self.tunnel.copies > 1:
            self._send_each(conversation, source, first, count, size, last, now_us)
            return
        prefix = inner.data_prefix(conversation)
        choice = self._choice
        while count:
            carrier = self.ports.next()
            is_elsewhere = carrier is None or choice.in_doubt
            if is_elsewhere and self.exchange.hand_out(conversation, source, first, count, size, last):
                return
            if carrier is None:
                self._wait(conversation, source, first, count, size, last)
                return
            if size > carrier.payload_max:
                self._send_each(conversation, source, first, count, size, last, now_us)
                return
            most = carrier.datagrams_max(size)
            # In equal parts: the rest of 50 after 49 would cost as much as they.
            taken = count if count <= most else -(-count // -(-count // most))
            end = last if taken == count else size
            records, sent = carrier.send_datagrams(prefix, source, first, taken, size, end, now_us)
            self.bytes_out += (taken - 1) * size + end
            choice.on_sent(carrier.port, records, sent, now_us)
            if carrier.is_blocked:
                choice.on_blocked(carrier.port)
            first += taken
            count -= taken

    def _send_each(
        self, conversation: int, source: Datagrams, first: int, count: int, size: int, last: int, now_us: int
    ) -> None:
        """Send datagrams that do not fit, or that are to go twice, one by one."""
        for index in range(first, first + count):
            length = last if index == first + count - 1 else size
            at = source.position(size, index)
            # A copy: sealing the one after it writes over what stands in front of it.
            self.send_numbered(conversation, self._next_number(), bytes(source.view[at : at + length]), now_us)

    def send_numbered(self, conversation: int, number: int, datagram: bytes, now_us: int) -> None:
        """Send one as pieces or copies. The worker that has read it numbers it, whosever ports it goes on: between the
        numbers of two workers, the receiver could not tell a copy."""
        carrier = self.ports.next()
        is_elsewhere = carrier is None or self._choice.in_doubt
        if is_elsewhere and self.exchange.hand_out_numbered(conversation, number, datagram):
            return
        if not self.carriers:
            self.dropped += 1
            return
        self.bytes_out += len(datagram)
        copies, piece_max = self.tunnel.copies > 1, self.ports.piece_max(now_us)
        if copies and len(datagram) + inner.COPY_HEAD.size <= piece_max:
            self._send_inner(inner.pack_copy(conversation, number, datagram), now_us)
        elif not copies and carrier is not None and len(datagram) <= carrier.payload_max:
            self._send_inner(inner.data_prefix(conversation) + datagram, now_us)
        else:
            pieces = fragment.split(conversation, number, datagram, piece_max)
            self.too_large += not pieces
            for piece in pieces:
                self._send_inner(piece, now_us)

    def _next_number(self) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return self._sequence

    def _send_inner(self, content: bytes, now_us: int) -> None:
        """Send an inner, or with `copies` two of it, on two ports if there are two that take one."""
        choice = self._choice
        port = choice.next()
        if port is None:
            self._queue(0, PIECE, content)
            return
        self._send_on(port, content, now_us)
        if self.tunnel.copies == 1:
            return
        aside = choice.next() is port
        if aside:
            choice.on_blocked(port)
        other = choice.next()
        if other is not None:
            self._send_on(other, content, now_us)
        if aside:
            choice.on_writable(port)
            if other is None:
                self._send_on(port, content, now_us)

    def _send_on(self, port: Port, content: bytes, now_us: int) -> None:
        carrier = self.carriers.get(port.index)
        if carrier is None or len(content) > carrier.piece_max:
            self.dropped += 1
            return
        records, sent = carrier.send_inner(content, now_us)
        self._choice.on_sent(port, records, sent, now_us)
        if carrier.is_blocked:
            self._choice.on_blocked(port)

    # What waits

    def _wait(self, conversation: int, source: Datagrams, first: int, count: int, size: int, last: int) -> None:
        """Keep a copy until a port takes it. Where no port is up, nobody knows for how long, and it is dropped."""
        if not self.carriers:
            self.dropped += count
            return
        for _, payload in copies_of(source, first, count, size, last):
            self._queue(conversation, size, payload)

    def _queue(self, conversation: int, size: int, payload: bytes) -> None:
        if not self.carriers or not self._waiting.put((conversation, size, payload)):
            self.dropped += datagrams_in(size, payload)

    def on_room(self, carrier: PortCarrier) -> None:
        """See CarrierOwner."""
        self._choice.on_writable(carrier.port)
        self._drain()

    def _drain(self) -> None:
        """Send what waits, as far as ports take it."""
        if not self._waiting:
            return
        waiting, now_us = self._waiting.take_all(), clock_us()
        while waiting:
            conversation, size, payload = waiting.popleft()
            if size == PIECE:
                self._send_inner(payload, now_us)
            else:
                self._send_loaded(conversation, size, payload, now_us)
            if self._waiting:
                for entry in waiting:
                    self._queue(*entry)
                return
        self.room()

    # Ingress

    def on_opened(self, carrier: PortCarrier, opened: Opened, now_us: int) -> None:
        """See CarrierOwner."""
        self._on_use(now_us)
        self.take(opened, now_us)

    def take(self, opened: Opened, now_us: int) -> None:
        """Take what came for a conversation: datagrams, or pieces and copies that one worker has to put together."""
        kind, conversation, size, payload = opened
        if kind == inner.DATA:
            if self.deliver(conversation, size, payload, now_us):
                self.bytes_in += len(payload)
            return
        owner = self.owner_of(conversation)
        if owner != self.context.slot and self.exchange.hand_in(owner, opened):
            return
        whole = self._assembly.receive(kind, conversation, payload, now_us)
        if whole is not None:
            self.bytes_in += len(whole)
            self.deliver(conversation, len(whole), whole, now_us)

    def owner_of(self, conversation: int) -> int:
        """The slot of the worker that puts the pieces of a conversation together."""
        raise NotImplementedError

    def forget(self, conversation: int) -> None:
        """A conversation is closed, or there is none of that number."""
        self._assembly.forget(conversation)

    # Mesh

    def on_peer_joined(self, peer: Peer) -> None:
        """A worker has taken a dead one's place."""
        self.exchange.on_peer_joined(peer)

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker is dead."""
        self.exchange.on_peer_lost(peer)

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """One descriptor that names this session."""
        handed = self.exchange.on_descriptor(peer, descriptor)
        if handed is None:
            return
        now_us = clock_us()
        kind, conversation, size, payload = handed
        if descriptor[0] == mesh.IN and inner.DATA <= kind <= inner.COPY:
            self.take(handed, now_us)
        elif descriptor[0] == mesh.OUT and self.carriers:
            if kind == inner.COPY:
                self.send_numbered(conversation, *inner.unpack_copy(payload), now_us)
            else:
                self._send_loaded(conversation, size, payload, now_us)
        else:
            self.exchange.dropped += 1

    def _send_loaded(self, conversation: int, size: int, payload: bytes, now_us: int) -> None:
        """Send datagrams of `size` bytes back to back, the last perhaps shorter."""
        count = max(-(-len(payload) // max(size, 1)), 1)
        source = self._buffers.load(payload)
        self.send(conversation, source, 0, count, size, len(payload) - (count - 1) * size, now_us)

    # Time

    def _on_use(self, now_us: int) -> None:
        self.used_us = now_us
        if not self._ticking:
            self._ticking = True
            self._timer.again(self._on_timer)
            self._weigh(now_us)

    def _on_timer(self) -> None:
        now_us = clock_us()
        if now_us - self.used_us > QUIET_US:
            self._ticking = False
            self._timer.stop()
        self.on_time(now_us)

    def on_time(self, now_us: int) -> None:
        """At least every 100 ms, and every TIMER_S while datagrams come and go."""
        self.ports.on_time(now_us)
        if self._ticking or self._waiting:
            self._weigh(now_us)

    def _weigh(self, now_us: int) -> None:
        """Look at all ports, ten times a second, unless nothing goes on: with 1,000 ports it took 3 % of a core."""
        if now_us >= self._choice.next_us:
            self._choice.on_time(now_us)
            # Copies are numbered by the worker that sends them.
            loss = self._choice.common_loss if self.tunnel.copies == 1 else 0.0
            self.exchange.on_loss(loss, self.bytes_out, now_us)
            self._tell()
            self._drain()

    def is_idle(self, now_us: int) -> bool:
        """Whether nothing has gone on for long, and no worker has a port."""
        if self.total_up:
            self._lone_us = now_us
        return now_us - max(self.used_us, self._lone_us) > max(IDLE_US, self.tunnel.duration_s * 1e6)

    def close(self) -> None:
        """Give all ports up."""
        now_us = clock_us()
        self._ticking = True
        self._timer.stop()
        self._timer.close()
        self.ports.close(now_us)
        self._tell()
        self._waiting.take_all()

    def status(self, key_id: str, wanted: int, now_us: int) -> SessionStatus:
        """This worker's part of the session."""
        return SessionStatus(
            id=f"{self.number:016x}",
            key_id=key_id,
            peer=self.peer_text,
            carriers_up=sum(each.port.state in (State.UP, State.SUSPECT) for each in self.carriers.values()),
            carriers_wanted=wanted,
            reinjected_bytes=0,
            duplicate_bytes=0,
            resumes=0,
            carriers=[each.status(self.context.slot, now_us) for each in self.carriers.values()],
        )
