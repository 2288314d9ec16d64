"""Checks of the kernel's settings (sysctl): those that should be larger, and those that depend on the configuration."""

import errno
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from forwarder.doctor.finding import Finding, Setting, Status, hint, not_applicable, ok, shortfall, unknown
from forwarder.doctor.host import Host, Unseen
from forwarder.doctor.subject import Subject
from forwarder.doctor.wanted import (
    CONNTRACK_BUCKETS,
    CONNTRACK_MAX,
    CONNTRACK_PER_BUCKET,
    LOCAL_PORTS,
    RECEIVE_MAX,
    SEND_MAX,
    SOMAXCONN,
    SYN_BACKLOG,
    TCP_RECEIVE,
    TCP_SEND,
    Wanted,
)
from forwarder.units import format_ports

CONNTRACK_FULL = 0.8
"""Above this share of the table in use, a burst of connections may fill it."""
_RP_FILTER_STRICT = 1


def sizes(host: Host, subject: Subject) -> Iterator[Finding]:
    """Those that are large enough, or not."""
    for wanted in (SOMAXCONN, SYN_BACKLOG, RECEIVE_MAX, SEND_MAX, TCP_RECEIVE, TCP_SEND):
        if wanted.spray and not subject.wants_spray:
            yield not_applicable(wanted.key, "no spray tunnel")
        elif wanted.stripe and not subject.wants_stripes:
            yield not_applicable(wanted.key, "no stripe tunnel")
        else:
            finding = compare(host, wanted, _least(wanted, subject))
            in_force = wanted is not SYN_BACKLOG or not any(host.numbers("net.ipv4.tcp_syncookies") or [1])
            lacking = finding.status is Status.SHORTFALL
            yield replace(finding, status=Status.HINT) if lacking and not in_force else finding


def _least(wanted: Wanted, subject: Subject) -> int:
    """What this configuration needs of it: never more than the largest window of its tunnels can use."""
    if not wanted.stripe or subject.settings is None:
        return wanted.value
    tunnels = subject.settings.client_tunnels or subject.settings.server_tunnels
    return min(wanted.value, 2 * max(tunnel.window_max_bytes for tunnel in tunnels))


def compare(host: Host, wanted: Wanted, least: int) -> Finding:
    """A setting beside the least that it should be."""
    try:
        numbers = host.numbers(wanted.key)
    except Unseen as reason:
        return unknown(wanted.key, str(reason))
    if numbers is None or len(numbers) <= wanted.place:
        return unknown(wanted.key, "not to be seen here (a container, or another kernel)")
    found = numbers[wanted.place]
    if found >= least:
        return ok(wanted.key, str(found), str(least))
    value = " ".join(map(str, (*numbers[: wanted.place], least, *numbers[wanted.place + 1 :])))
    setting = Setting(wanted.key, value, wanted.optional)
    return shortfall(wanted.key, str(found), str(least), wanted.why, setting.command, setting)


def conntrack(host: Host, subject: Subject) -> Iterator[Finding]:
    """Whether the table of connections is large enough, and not about to be full."""
    try:
        limit, count = host.numbers(CONNTRACK_MAX.key), host.numbers("net.netfilter.nf_conntrack_count")
    except Unseen as reason:
        yield unknown(CONNTRACK_MAX.key, str(reason))
        return
    if not limit:
        for wanted in (CONNTRACK_MAX, CONNTRACK_BUCKETS):
            yield not_applicable(wanted.key, "conntrack is not loaded")
        return
    least = max(CONNTRACK_MAX.value, _entries(subject))
    yield compare(host, CONNTRACK_MAX, least)
    yield compare(host, CONNTRACK_BUCKETS, max(limit[0], least) // CONNTRACK_PER_BUCKET)
    if count and count[0] > CONNTRACK_FULL * limit[0]:
        found = f"{count[0]} of {limit[0]} entries"
        full = Setting(CONNTRACK_MAX.key, str(2 * limit[0]), optional=True)
        why = "a full table drops every new connection of this host"
        most = f"at most {CONNTRACK_FULL:.0%} of them"
        yield shortfall("conntrack entries in use", found, most, why, full.command)
    elif count:
        yield ok("conntrack entries in use", f"{count[0]} of {limit[0]}")


def _entries(subject: Subject) -> int:
    """The entries that this configuration may have at once: its carriers, and twice each connection of a server."""
    if subject.settings is None:
        return 0
    entries = 2 * sum(tunnel.somaxconn for tunnel in subject.settings.client_tunnels)
    entries += 2 * sum(len(tunnel.carriers) for tunnel in subject.settings.spray_tunnels)
    entries += 2 * sum(tunnel.max_streams for tunnel in subject.settings.server_tunnels)
    return entries + sum(tunnel.max_conversations for tunnel in subject.settings.spray_server_tunnels)


def local_ports(host: Host, subject: Subject) -> Iterator[Finding]:
    """Whether there are ports enough to connect from, and whether a connection may take a tunnel's."""
    key = "net.ipv4.ip_local_port_range"
    try:
        numbers = host.numbers(key)
    except Unseen as reason:
        yield unknown(key, str(reason))
        return
    if numbers is None or len(numbers) != 2:
        yield unknown(key, "not to be seen here")
        return
    low, high = numbers
    wanted = LOCAL_PORTS
    if subject.settings is not None and subject.settings.role == "client":
        # While stripes are rotated there are two of each.
        wanted = 2 * max((tunnel.somaxconn for tunnel in subject.settings.client_tunnels), default=1)
    found = f"{low} to {high}: {high - low + 1} ports"
    if high - low + 1 < wanted:
        setting = Setting(key, "32768 60999" if low >= 32768 else f"{low} 60999")
        why = "each connection to one address and port, a stripe or one of a server's to its target, takes a port here"
        mendable = setting if high < 60999 else None
        yield shortfall(key, found, f"{wanted} ports", why, setting.command, mendable)
    else:
        yield ok(key, found, f"{wanted} ports")
    yield from _reserved(host, subject, low, high)


def _reserved(host: Host, subject: Subject, low: int, high: int) -> Iterator[Finding]:
    """Ports that a tunnel listens on and that the kernel may give to any outgoing connection before the start."""
    name = "net.ipv4.ip_local_reserved_ports"
    text = (host.read("proc/sys/net/ipv4/ip_local_reserved_ports") or "").strip()
    ports = sorted({port for port in _listening(subject) if low <= port <= high and not _within(port, text)})
    if not ports:
        if subject.settings is not None:
            yield ok(name, text or "none", "no port of a tunnel in the range that connections take theirs from")
        return
    some = ", ".join(map(str, ports[:4])) + (f" and {len(ports) - 4} more" if len(ports) > 4 else "")
    value = ",".join(filter(None, [text, format_ports(ports)]))
    why = "at a restart another program's outgoing connection may have taken the port"
    yield hint(name, f"{some} not reserved", "ports of tunnels reserved", why, Setting(name, value).command)


def _listening(subject: Subject) -> Iterator[int]:
    if subject.settings is None:
        return
    yield from (tunnel.local.port for tunnel in subject.settings.client_tunnels)
    yield from (tunnel.listen.port for tunnel in subject.settings.server_tunnels)
    yield from (tunnel.local.port for tunnel in subject.settings.spray_client_tunnels)
    for tunnel in subject.settings.spray_server_tunnels:
        yield from tunnel.ports


def _within(port: int, ranges: str) -> bool:
    for item in filter(None, ranges.split(",")):
        first, _, last = item.partition("-")
        if int(first) <= port <= int(last or first):
            return True
    return False


def reverse_path(host: Host, subject: Subject) -> Iterator[Finding]:
    """A strict filter drops what arrives on another device than packets to its sender would leave by."""
    settings = subject.settings
    stripes, ports = (settings.client_tunnels, settings.spray_client_tunnels) if settings else ((), ())
    each = [tunnel.sources for tunnel in stripes] + [tunnel.sources for tunnel in ports]
    sources = sorted(set(itertools.chain.from_iterable(each)))
    if len(sources) < 2:
        yield not_applicable("rp_filter", "fewer than two source addresses")
        return
    for source in sources:
        if not host.has_address(source):
            why = "a stripe or a port from there cannot be dialled"
            yield shortfall(f"source {source}", "not here", "an address of this host", why, "ip -brief address")
        elif ":" not in source and (device := host.device_of(source)) is not None:
            yield _reverse_path_of(host, source, device)


def _reverse_path_of(host: Host, source: str, device: str) -> Finding:
    key = f"net.ipv4.conf.{device}.rp_filter"
    try:
        # A dot in a device's name stays one in the path.
        modes = [host.read(f"proc/sys/net/ipv4/conf/{each}/rp_filter") for each in ("all", device)]
    except Unseen as reason:
        return unknown(key, str(reason))
    if None in modes:
        return unknown(key, "not to be seen here")
    mode = max(int(each or 0) for each in modes)  # the larger one holds (ip-sysctl)
    if mode != _RP_FILTER_STRICT:
        return ok(key, f"{mode} for {source}", "not 1")
    why = f"answers to {source} that arrive here are dropped when the route to their sender is another device's"
    command = f"sysctl -w {key.replace(device, device.replace('.', '/'))}=2"
    return shortfall(key, "1 (strict)", "2 (loose), with several sources", why, command)


def congestion(host: Host, subject: Subject) -> Iterator[Finding]:
    """The congestion control of each tunnel that names one, and whether the kernel has BBR."""
    available = (host.read("proc/sys/net/ipv4/tcp_available_congestion_control") or "").split()
    settings = subject.settings
    tunnels = (settings.client_tunnels or settings.server_tunnels) if settings else ()
    for algorithm in sorted({tunnel.congestion for tunnel in tunnels if tunnel.congestion}):
        yield _chosen(host, algorithm, available)
    if not subject.wants_stripes:
        yield not_applicable("congestion control", "no stripe tunnel")
        return
    current = (host.read("proc/sys/net/ipv4/tcp_congestion_control") or "unknown").strip()
    if "bbr" in available or host.refuses_congestion("bbr") in (None, errno.EPERM):
        yield ok("congestion control", f"bbr is there, {current} is the default")
        return
    why = "with 1 % loss and 50 ms, 10 stripes moved 38 Mbit/s with cubic and 430 with BBR"
    found = f"{', '.join(available) or current}"
    yield hint("congestion control", found, 'bbr, for congestion = "bbr"', why, "modprobe tcp_bbr")


def _chosen(host: Host, algorithm: str, available: Sequence[str]) -> Finding:
    name = f"congestion {algorithm}"
    refused = host.refuses_congestion(algorithm)
    if refused is None:
        return ok(name, "can be had")
    if refused == errno.EPERM:
        allowed = (host.read("proc/sys/net/ipv4/tcp_allowed_congestion_control") or "").split()
        setting = Setting("net.ipv4.tcp_allowed_congestion_control", " ".join((*allowed, algorithm)))
        why = "the configuration names it, and an instance of this user does not start"
        return shortfall(name, "not for this user", "allowed to everybody", why, setting.command)
    why = "the configuration names it, and an instance does not start without"
    return shortfall(name, ", ".join(available), algorithm, why, f"modprobe tcp_{algorithm}")
