"""The spray tunnels of one worker, each with the wires of its kinds."""

import socket

from workers.boot import Boot
from workers.core.datagram import RECORD_MAX
from workers.io.context import Context
from workers.io.spray_buffers import Inbox, SprayBuffers
from workers.io.spray_client import SprayClientEnd
from workers.io.spray_server import SprayServerEnd
from workers.io.tcp_wire import TcpDiallers, TcpPorts
from workers.io.udp_wire import UdpDiallers, UdpPorts
from workers.io.wire import Diallers
from workers.settings import SprayServerTunnel

SprayEnd = SprayClientEnd | SprayServerEnd


def start_spray_tunnels(context: Context, boot: Boot) -> dict[int, SprayEnd]:
    """Every spray tunnel of the settings, by index."""
    if not boot.settings.spray_tunnels:
        return {}
    buffers = SprayBuffers(RECORD_MAX)
    inboxes: dict[int, Inbox] = {family: Inbox(family) for family in (socket.AF_INET, socket.AF_INET6)}
    ends: dict[int, SprayEnd] = {}
    for client in boot.settings.spray_client_tunnels:
        diallers: dict[str, Diallers] = {}
        if "udp" in client.kinds:
            diallers["udp"] = UdpDiallers(context, client)
        if "tcp" in client.kinds:
            diallers["tcp"] = TcpDiallers(context, client)
        ends[client.index] = SprayClientEnd(
            context,
            client,
            boot.settings.keys[0],
            boot.session_ids[client.index],
            boot.listeners[client.index],
            diallers,
            buffers,
            inboxes,
        )
    for server in boot.settings.spray_server_tunnels:
        ends[server.index] = _start_server(context, boot, server, buffers, inboxes)
    return ends


def _start_server(
    context: Context, boot: Boot, tunnel: SprayServerTunnel, buffers: SprayBuffers, inboxes: dict[int, Inbox]
) -> SprayServerEnd:
    """This worker listens at the ports that are its own, and closes its copies of the others."""
    end = SprayServerEnd(context, tunnel, buffers, inboxes, boot.inboxes)
    listeners = boot.listeners[tunnel.index]
    each = len(listeners) // len(tunnel.carriers)
    own: dict[str, list[tuple[int, socket.socket]]] = {"tcp": [], "udp": []}
    for place, sock in enumerate(listeners):
        carrier = place // each
        if tunnel.owner_of(carrier, context.workers) == context.slot:
            own[tunnel.carriers[carrier][0]].append((carrier, sock))
        else:
            sock.close()
    if own["udp"]:
        end.ports.append(UdpPorts(context, tunnel, own["udp"], end.door))
    if own["tcp"]:
        end.ports.append(TcpPorts(context, tunnel, own["tcp"], end.door))
    return end
