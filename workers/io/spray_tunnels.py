"""The spray tunnels of one worker, each with the wires of its kinds."""

import socket

from workers.core.datagram import RECORD_MAX
from workers.io.capturing import open_capture
from workers.io.context import Context
from workers.io.spray_buffers import Inbox, SprayBuffers
from workers.io.spray_client import SprayClientEnd
from workers.io.spray_server import SprayServerEnd
from workers.io.tcp_wire import TcpDiallers
from workers.io.udp_wire import UdpDiallers
from workers.io.wire import Diallers
from workers.settings import SprayClientTunnel, SprayServerTunnel

SprayEnd = SprayClientEnd | SprayServerEnd


class SprayMaker:
    """Makes them. What they share is made with the first. `senders`: to the inboxes of other workers, by slot."""

    def __init__(self, context: Context, senders: dict[int, socket.socket]) -> None:
        self._context = context
        self._senders = senders
        self._shared: tuple[SprayBuffers, dict[int, Inbox]] | None = None

    def _share(self) -> tuple[SprayBuffers, dict[int, Inbox]]:
        if self._shared is None:
            inboxes: dict[int, Inbox] = {family: Inbox(family) for family in (socket.AF_INET, socket.AF_INET6)}
            self._shared = SprayBuffers(RECORD_MAX), inboxes
        return self._shared

    def client(self, tunnel: SprayClientTunnel, session_id: int, listeners: list[socket.socket]) -> SprayClientEnd:
        """A client's end; the `listeners` are this worker's own."""
        diallers: dict[str, Diallers] = {}
        record = open_capture(tunnel, self._context.slot)
        if "udp" in tunnel.kinds:
            diallers["udp"] = UdpDiallers(self._context, tunnel, record)
        if "tcp" in tunnel.kinds:
            diallers["tcp"] = TcpDiallers(self._context, tunnel, record)
        key = self._context.settings.keys[0]
        buffers, inboxes = self._share()
        return SprayClientEnd(self._context, tunnel, key, session_id, listeners, diallers, buffers, inboxes)

    def server(self, tunnel: SprayServerTunnel, listeners: list[socket.socket]) -> SprayServerEnd:
        """A server's end, at the ports that are this worker's own; its copies of the others are closed."""
        context = self._context
        buffers, inboxes = self._share()
        record = open_capture(tunnel, context.slot)
        end = SprayServerEnd(context, tunnel, buffers, inboxes, self._senders, record)
        each = max(len(listeners) // len(tunnel.carriers), 1)
        for place, sock in enumerate(listeners):
            carrier = place // each
            if tunnel.owner_of(carrier, context.workers) == context.seat:
                end.hold(carrier, sock)
            else:
                sock.close()
        if context.has_ports:
            end.take_ports()
        elif context.in_charge:
            end.begin()
        return end
