"""Checks of the kernel, the clocks and the container, if it is one."""

import itertools
import os
import platform
import re
import sys
import time
from collections.abc import Iterator

from forwarder.doctor.finding import Finding, hint, ok, shortfall, unknown
from forwarder.doctor.host import Host, Unseen
from forwarder.doctor.subject import Subject

_NEEDED = (5, 0)
_NEEDS = (
    ((3, 17), "memfd_create, the memory that workers share"),
    ((4, 9), "BBR"),
    ((4, 18), "UDP_SEGMENT, a run of datagrams sent at once"),
    ((5, 0), "UDP_GRO, a run of datagrams received at once"),
)
_SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies")
_CLOCK_LOG = "journalctl -k | grep -i clocksource"
_READINGS = 1000
_FEW_IDS = 1 << 31
"""A user namespace that maps fewer user ids than this is none of the host's own."""


def kernel(host: Host, subject: Subject) -> Iterator[Finding]:
    """Its version beside what came with which."""
    release = (host.read("proc/sys/kernel/osrelease") or platform.release()).strip()
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        yield unknown("kernel", f"{release}: not a version")
    elif (version := (int(match[1]), int(match[2]))) < _NEEDED:
        lacking = "; ".join(f"{what} ({old}.{minor})" for (old, minor), what in _NEEDS if version < (old, minor))
        yield shortfall("kernel", release, "5.0", f"it lacks {lacking}", "apt-get install linux-image-amd64")
    else:
        yield ok("kernel", release, "5.0")
    missing = [name for name in ("memfd_create", "eventfd") if not hasattr(os, name)]
    if missing and sys.platform == "linux":
        why = "workers share memory and wake each other by them"
        yield shortfall("Python", f"without os.{' and os.'.join(missing)}", "Python 3.11 for Linux", why, "python3 -V")
    else:
        yield ok("Python", platform.python_version())


def clocks(host: Host, subject: Subject) -> Iterator[Finding]:
    """Timers rest on the monotonic clock alone; the wall clock stamps log lines."""
    readings = [time.monotonic() for _ in range(_READINGS)]
    if any(later < earlier for earlier, later in itertools.pairwise(readings)):
        why = "every timer rests on it"
        yield shortfall("monotonic clock", "it went back", "it never does", why, _CLOCK_LOG)
    else:
        yield ok("monotonic clock", f"{(readings[-1] - readings[0]) / _READINGS * 1e9:.0f} ns a reading")
    try:
        source = (host.read("sys/devices/system/clocksource/clocksource0/current_clocksource") or "").strip()
        is_set = host.clock_is_set()
    except Unseen as reason:
        yield unknown("wall clock", str(reason))
        return
    if source in _SLOW_CLOCKS:
        why = "each reading asks a device for a microsecond or more, and a worker reads the clock for every turn"
        yield hint(
            "clock source", source, "tsc, kvm-clock or arch_sys_counter", why, "journalctl -k | grep -i clocksource"
        )
    if is_set:
        yield ok("wall clock", "synchronised")
    else:
        why = "nothing but the times in the log depends on it"
        yield hint("wall clock", "not synchronised", "synchronised", why, "timedatectl set-ntp true")


def container(host: Host, subject: Subject) -> Iterator[Finding]:
    """What of the host cannot be set from here."""
    signs = [path for path in ("run/.containerenv", ".dockerenv", "run/systemd/container") if _there(host, path)]
    mapped = (host.read("proc/self/uid_map") or "").split()
    if len(mapped) == 3 and int(mapped[2]) < _FEW_IDS:
        signs.append("a user namespace")
    writable = host.may_write("proc/sys/net/core/somaxconn") or not host.is_root
    if not signs and writable:
        yield ok("container", "none to be seen")
        return
    named = [f"/{sign}" if sign != "a user namespace" else sign for sign in signs]
    found = ", ".join(named) or "none to be seen"
    if not writable:
        found += "; /proc/sys is read-only"
    why = "net.core.*mem_max and conntrack's sizes are set on the container's host, the rest of net.* in each container"
    yield hint("container", found, "", why)


def _there(host: Host, path: str) -> bool:
    try:
        return host.stat(path) is not None
    except Unseen:
        return False
