"""Checks of the ports that tunnels listen on, and of the names that they connect to."""

import contextlib
import socket
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

from forwarder.doctor.finding import Finding, hint, not_applicable, ok, shortfall, unknown
from forwarder.doctor.host import Host, Unseen
from forwarder.doctor.raw import CAPABILITIES, granting
from forwarder.doctor.subject import Subject
from forwarder.tunnels import overlap
from forwarder.units import address_family, format_ports
from workers.settings import Address, Kind, SprayServerTunnel, StripeClientTunnel, StripeServerTunnel, Tunnel

_TCP_LISTEN, _UDP_UNCONNECTED = "0A", "07"
_CAP_NET_BIND_SERVICE = 10


class Held(NamedTuple):
    """A port that some socket listens on; `inode` is the socket's."""

    kind: Kind
    address: Address
    inode: str


def ports(host: Host, subject: Subject) -> Iterator[Finding]:
    """Each tunnel's, and that of the metrics: free, or held by the running instance."""
    if subject.settings is None:
        yield not_applicable("ports", "no -c FILE")
        return
    try:
        held = _held(host)
        own = _own_sockets(host, subject.pids[0]) if subject.pids else set()
    except Unseen as reason:
        yield unknown("ports", str(reason))
        return
    for tunnel in subject.settings.tunnels:
        wanted = [each for pair in _wanted(tunnel) for each in _resolved(host, *pair)]
        yield _ports_of(subject, f"ports of {tunnel.name}", _described(tunnel), wanted, held, own)
        if not subject.pids:
            yield from _privileged(host, tunnel)
    if (listen := subject.settings.metrics_listen) is not None:
        wanted = list(_resolved(host, "tcp", listen))
        yield _ports_of(subject, "port of the metrics", f"tcp {listen}", wanted, held, own)


def _ports_of(
    subject: Subject,
    name: str,
    where: str,
    wanted: Collection[tuple[Kind, Address]],
    held: Collection[Held],
    own: Collection[str],
) -> Finding:
    there = [(kind, each, other) for kind, each in wanted for other in held if _meets(kind, each, other)]
    taken = [(kind, each) for kind, each, other in there if other.inode not in own]
    if not taken and subject.pids:
        pid = subject.pids[0]
        if there:
            return ok(name, f"{where}: held by pid {pid}")
        why = "the configuration may be newer than what runs"
        return hint(name, f"{where}: free", f"held by pid {pid}", why, f"forwarder reload -c {subject.file}")
    if not taken:
        return ok(name, f"{where}: free")
    kind, address = taken[0]
    more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
    if subject.unseen:
        return unknown(name, f"{kind} {address}{more}: taken, perhaps by the own instance ({subject.unseen})")
    why = "an instance does not start while another program listens there"
    command = f"ss -{'t' if kind == 'tcp' else 'u'}lnp sport = :{address.port}"
    return shortfall(name, f"{kind} {address}{more}: taken by another program", "free", why, command)


def _meets(kind: Kind, address: Address, other: Held) -> bool:
    return other.kind == kind and overlap(address, other.address)


def _resolved(host: Host, kind: Kind, address: Address) -> Iterator[tuple[Kind, Address]]:
    """A name's addresses. Raises Unseen."""
    found = [address.host] if address_family(address.host) is not None else host.look_up(address.host)
    if isinstance(found, list):
        yield from ((kind, Address(each, address.port)) for each in found)


def _wanted(tunnel: Tunnel) -> Iterator[tuple[Kind, Address]]:
    match tunnel:
        case StripeClientTunnel():
            yield "tcp", tunnel.local
        case StripeServerTunnel():
            yield "tcp", tunnel.listen
        case SprayServerTunnel():
            yield from ((kind, Address(tunnel.listen, port)) for kind, port in tunnel.carriers)
        case _:
            yield "udp", tunnel.local


def _described(tunnel: Tunnel) -> str:
    if isinstance(tunnel, SprayServerTunnel):
        return f"{' and '.join(tunnel.kinds)} {format_ports(tunnel.ports)}"
    kind, address = next(_wanted(tunnel))
    return f"{kind} {address}"


def _held(host: Host) -> list[Held]:
    """What is listened on in this network namespace. Raises Unseen."""
    found: list[Held] = []
    for kind, state in (("tcp", _TCP_LISTEN), ("udp", _UDP_UNCONNECTED)):
        for table in (kind, f"{kind}6"):
            for line in (host.read(f"proc/net/{table}") or "").splitlines()[1:]:
                fields = line.split()
                if fields[3] == state:
                    found.append(Held("tcp" if kind == "tcp" else "udp", _address(fields[1]), fields[9]))
    return found


def _address(text: str) -> Address:
    """`0100007F:1F90`: the address in 32-bit words of the host's byte order, the port as a number."""
    digits, port = text.split(":")
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return Address(socket.inet_ntop(family, packed), int(port, 16))


def _own_sockets(host: Host, supervisor: int) -> set[str]:
    """Inodes of the sockets that an instance's processes have open. Raises Unseen."""
    sockets = _sockets_of(host, supervisor)
    children = (host.read(f"proc/{supervisor}/task/{supervisor}/children") or "").split()
    for child in children:
        with contextlib.suppress(Unseen):  # one that has ended meanwhile
            sockets |= _sockets_of(host, int(child))
    return sockets


def _sockets_of(host: Host, pid: int) -> set[str]:
    links = host.links(f"proc/{pid}/fd")
    return {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def _privileged(host: Host, tunnel: Tunnel) -> Iterator[Finding]:
    """Low ports are for root and for those with CAP_NET_BIND_SERVICE."""
    first = (host.numbers("net.ipv4.ip_unprivileged_port_start") or [1024])[0]
    low = sorted({address.port for _, address in _wanted(tunnel) if address.port < first})
    if not low:
        return
    name = f"low ports of {tunnel.name}"
    held = CAPABILITIES.search(host.read("proc/self/status") or "")
    if held and int(held[1], 16) >> _CAP_NET_BIND_SERVICE & 1:
        yield ok(name, f"{format_ports(low)}: permitted here")
        return
    why = f"ports below {first} are for root and for those with the capability CAP_NET_BIND_SERVICE"
    command = granting("net_bind_service")
    yield shortfall(name, f"{format_ports(low)}: not for this user", "permitted", why, command)


def names(host: Host, subject: Subject) -> Iterator[Finding]:
    """The names of servers and of targets: known, and with a way there."""
    hosts = list(dict.fromkeys(_hosts(subject)))
    if not hosts:
        yield not_applicable("names", "no -c FILE" if subject.settings is None else "none")
    for each in hosts:
        if address_family(each) is None:
            yield _known(host, each)
        elif host.way_to(each) is None:
            yield shortfall(f"way to {each}", "none", "a route", "nothing can be sent there", f"ip route get {each}")
        else:
            yield ok(f"way to {each}", f"by {host.way_to(each)}")


def _hosts(subject: Subject) -> Iterator[str]:
    if subject.settings is None:
        return
    for stripe in subject.settings.client_tunnels:
        yield from (end.host for end in stripe.remote_ends)
    for spray in subject.settings.spray_client_tunnels:
        yield from spray.hosts
    yield from (tunnel.target.host for tunnel in subject.settings.server_tunnels)
    yield from (tunnel.target.host for tunnel in subject.settings.spray_server_tunnels)


def _known(host: Host, name: str) -> Finding:
    label = f"name {name}"
    try:
        found = host.look_up(name)
    except Unseen as reason:
        return unknown(label, str(reason))
    if isinstance(found, str):
        return shortfall(label, found, "an address", "it is looked up for every connection", f"getent ahosts {name}")
    return ok(label, ", ".join(found[:3]))
