"""Checks of what fake TCP needs: capabilities, a device, and the device's offloads."""

import re
from collections.abc import Iterator

from forwarder.doctor.finding import Finding, hint, not_applicable, ok, shortfall, unknown
from forwarder.doctor.host import Host, Unseen
from forwarder.doctor.subject import Subject
from forwarder.doctor.wanted import MTU
from forwarder.privileges import CAP_NET_ADMIN, CAP_NET_RAW
from forwarder.units import address_family

CAPABILITIES = re.compile(r"^CapEff:\s+([0-9a-f]+)", re.MULTILINE)
_LACKING = {
    CAP_NET_RAW: ("CAP_NET_RAW", 'opens packet sockets: without it no tunnel of type "tcp" or "all" starts'),
    CAP_NET_ADMIN: (
        "CAP_NET_ADMIN",
        "keeps payload from the kernel's TCP by a filter and makes buffers larger than net.core.*mem_max: without it "
        "signatures that nobody has take the filter's place, and buffers stay small",
    ),
}
_NO_FAKE_TCP = "no tunnel with fake TCP"


def capabilities(host: Host, subject: Subject) -> Iterator[Finding]:
    """Those of the running instance's workers; where none runs, of whoever would start one here."""
    if not subject.wants_fake_tcp:
        yield not_applicable("capabilities", _NO_FAKE_TCP)
        return
    processes = [str(pid) for pid in subject.pids[1:]] or ["self"]
    whose = "its workers" if subject.pids else "root" if host.is_root else "this user"
    try:
        texts = [host.read(f"proc/{process}/status") or "" for process in processes]
    except Unseen as reason:
        yield unknown("capabilities", str(reason))
        return
    sets = [int(match[1], 16) for match in map(CAPABILITIES.search, texts) if match]
    if not sets:
        yield unknown("capabilities", "/proc does not say")
        return
    for number, (name, effect) in _LACKING.items():
        if all(held >> number & 1 for held in sets):
            yield ok(name, f"{whose}: held")
            continue
        needed = number == CAP_NET_RAW and bool(subject.fake_tcp_tunnels)
        make = shortfall if needed else hint
        yield make(name, f"{whose}: not held", "held", effect, granting(name[len("CAP_") :].lower()))


def granting(*names: str) -> str:
    """The command that starts an instance with capabilities that its user does not have."""
    added = ",".join(f"+{name}" for name in names)
    wanted = " ".join(f"CAP_{name.upper()}" for name in names)
    account = "--reuid=USER --regid=USER --init-groups"
    start = f"setpriv {account} --inh-caps={added} --ambient-caps={added} forwarder start -c FILE"
    return f"{start}  # systemd: AmbientCapabilities={wanted}"


def devices(host: Host, subject: Subject) -> Iterator[Finding]:
    """Each device that fake TCP goes through: there, up, wide enough, and cutting and merging runs by itself."""
    if not subject.wants_fake_tcp:
        yield not_applicable("devices", _NO_FAKE_TCP)
        return
    names = _devices(host, subject)
    if not names:
        yield unknown("devices", "no route to the other end, and no dev in the configuration")
    for name, mtu in names.items():
        yield from _device(host, name, max(MTU, mtu))


def _devices(host: Host, subject: Subject) -> dict[str, int]:
    """Names, and the MTU that a tunnel asks for."""
    found: dict[str, int] = {}
    for tunnel in subject.fake_tcp_tunnels:
        named = [tunnel.device] if tunnel.device else [host.way_to(end) for end in _ends(tunnel)]
        for name in named or _likely(host):
            if name is not None:
                found[name] = max(found.get(name, 0), tunnel.mtu or 0)
    return found if subject.settings is not None else dict.fromkeys(_likely(host), 0)


def _likely(host: Host) -> list[str]:
    """The device of the default route; without one, all that are up."""
    default = host.default_device()
    return [default] if default is not None else host.devices_up()


def _ends(tunnel: object) -> list[str]:
    """Addresses of the other end that the configuration names; a name's device is the default route's."""
    return [host for host in getattr(tunnel, "hosts", ()) if address_family(host) is not None]


def _device(host: Host, name: str, mtu: int) -> Iterator[Finding]:
    label = f"device {name}"
    found = host.device(name)
    if found is None:
        why = "an instance does not start without the device that it is told to use"
        yield shortfall(label, "none of that name", "a network device", why, "ip -brief link")
        return
    up, running, size = found
    if not (up and running):
        state = "down" if not up else "up, without a carrier"
        yield shortfall(label, state, "up", "nothing can be sent through it", f"ip link set {name} up")
    else:
        yield ok(label, "up")
    if size < mtu:
        why = "packets as large as the configuration has them would not leave"
        yield shortfall(f"{label}, MTU", str(size), str(mtu), why, f"ip link set {name} mtu {mtu}")
    else:
        yield ok(f"{label}, MTU", str(size), str(mtu))
    offloads = host.offloads(name)
    for offload, why in (
        ("gso", "the kernel cuts a run of datagrams: 1660 Mbit/s with it, 708 where each is sent by itself"),
        ("gro", "a run arrives as one frame, which costs a worker one read and not 44"),
    ):
        if offload in offloads and not offloads[offload]:
            yield hint(f"{label}, {offload}", "off", "on", why, f"ethtool -K {name} {offload} on")
        elif offload in offloads:
            yield ok(f"{label}, {offload}", "on")
        else:
            yield unknown(f"{label}, {offload}", "its driver does not say")
    if "tso" in offloads:
        yield ok(f"{label}, tso", "on" if offloads["tso"] else "off: the kernel cuts runs, at some CPU")


def backend(host: Host, subject: Subject) -> Iterator[Finding]:
    """The Python package that backend = "pcap" takes."""
    if not any(tunnel.backend == "pcap" for tunnel in subject.fake_tcp_tunnels):
        yield not_applicable("pcap", 'no tunnel with backend = "pcap"')
    elif host.has_module("pcap"):
        yield ok("pcap", "pypcap is installed")
    else:
        why = 'backend = "pcap" captures with it'
        yield shortfall("pcap", "no pypcap here", "pypcap", why, 'pip install "forwarder[raw]"  # Python 3.11')
