"""Checks of what an instance may use: open files, memory, room for its log."""

import re
from collections.abc import Iterator
from pathlib import Path

from forwarder import figures
from forwarder.doctor.finding import Finding, hint, not_applicable, ok, shortfall, unknown
from forwarder.doctor.host import Host, Unseen
from forwarder.doctor.subject import Subject
from forwarder.doctor.wanted import LOG_FREE_BYTES, NOFILE, WORKER_BYTES
from forwarder.privileges import descriptors_wanted
from workers.shm.layout import EGRESS_BYTES, INGRESS_BYTES

UNLIMITED = 1 << 62

_NOFILE = re.compile(r"^Max open files\s+(\S+)\s+(\S+)", re.MULTILINE)
_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB", re.MULTILINE)


def descriptors(host: Host, subject: Subject) -> Iterator[Finding]:
    """The limit of open files: of whoever starts an instance here, and of the one that runs."""
    wanted = NOFILE if subject.settings is None else descriptors_wanted(subject.settings)
    per_what = "a stripe, a port and a connection take one each"
    why = f"{per_what}; an instance raises its soft limit to the hard one, and refuses connections beyond"
    command = f"ulimit -n {wanted}  # in the shell that starts it; systemd: LimitNOFILE={wanted}"
    yield _limit(host, "open files", "self", wanted, why, command)
    if subject.unseen:
        yield unknown("open files, running instance", subject.unseen)
    elif not subject.pids:
        yield not_applicable("open files, running instance", "none runs" if subject.file else "no -c FILE")
    else:
        yield _limit_of_instance(host, subject.pids, wanted, why)


def _limit_of_instance(host: Host, pids: tuple[int, ...], wanted: int, why: str) -> Finding:
    name = "open files, running instance"
    command = f"for pid in {' '.join(map(str, pids))}; do prlimit --pid $pid --nofile={wanted}:{wanted}; done"
    findings = [_limit(host, name, str(pid), wanted, why, command, running=True) for pid in pids]
    return next((each for each in findings if each.status != "ok"), findings[0])


def _limit(
    host: Host, name: str, process: str, wanted: int, why: str, command: str, *, running: bool = False
) -> Finding:
    """A process that runs has its soft limit; one that starts raises it as far as it goes."""
    try:
        limits = _NOFILE.search(host.read(f"proc/{process}/limits") or "")
    except Unseen as reason:
        return unknown(name, str(reason))
    if limits is None:
        return unknown(name, f"/proc/{process}/limits does not say")
    soft, hard = (UNLIMITED if text == "unlimited" else int(text) for text in limits.groups())
    found = f"soft {limits[1]}, hard {limits[2]}"
    if (soft if running else hard) >= wanted:
        return ok(name, found, str(wanted))
    return shortfall(name, found, str(wanted), why, command)


def memory(host: Host, subject: Subject) -> Iterator[Finding]:
    """Memory for the workers, and for what their arenas may hold when nobody reads."""
    try:
        available = _AVAILABLE.search(host.read("proc/meminfo") or "")
    except Unseen as reason:
        yield unknown("memory", str(reason))
        return
    if available is None:
        yield unknown("memory", "/proc/meminfo does not say")
        return
    free, limit = int(available[1]) << 10, _cgroup_limit(host)
    if limit is not None:
        free = min(free, limit)
    workers = subject.settings.workers if subject.settings else 1
    found = f"{figures.memory(free)} available" + (" (limit of the control group)" if limit == free else "")
    least, most = workers * WORKER_BYTES, workers * (INGRESS_BYTES + EGRESS_BYTES)
    if subject.pids:
        yield ok("memory", found, "an instance runs")
    elif free < least:
        why = f"{workers} workers take so much with nothing under way; without memory they are killed"
        yield shortfall(
            "memory", found, figures.memory(least), why, f"workers = {max(1, free // WORKER_BYTES)}  # in FILE"
        )
    elif free < most:
        why = (
            "so much may wait in the workers' arenas at the very most, when applications stop reading while the other "
            "end sends to all of them; a smaller window_max makes it less"
        )
        yield hint("memory", found, f"{figures.memory(most)} for {workers} workers", why)
    else:
        yield ok("memory", found, figures.memory(most))


def _cgroup_limit(host: Host) -> int | None:
    """The limit of this process's control group, as far as it can be seen (cgroup v2)."""
    try:
        for line in (host.read("proc/self/cgroup") or "").splitlines():
            if line.startswith("0::"):
                text = host.read(f"sys/fs/cgroup/{line[3:].strip('/')}/memory.max")
                return int(text) if text and text.strip().isdigit() else None
    except Unseen:
        return None
    return None


def log_room(host: Host, subject: Subject) -> Iterator[Finding]:
    """Whether the log file can be written, and there is room for it."""
    name = "log file"
    file = subject.settings.log.file if subject.settings else None
    if file is None:
        yield not_applicable(name, "standard error" if subject.settings else "no -c FILE")
        return
    folder = str(Path(file).parent)
    why = "an instance does not start if it cannot open its log"
    try:
        if host.stat(folder) is None:
            yield shortfall(name, f"no directory {folder}", "a directory", why, f"mkdir -p {folder}")
            return
        if not host.may_write(file if host.stat(file) else folder):
            yield _not_writable(host, subject, name, file, why)
            return
        free = host.free_bytes(folder)
    except Unseen as reason:
        yield unknown(name, str(reason))
        return
    found = f"{figures.memory(free)} free for {file}"
    if free < LOG_FREE_BYTES:
        why = "lines that find no room are lost; traffic goes on"
        yield shortfall(
            name, found, f"{figures.memory(LOG_FREE_BYTES)} free", why, f"du -ahx {folder} | sort -h | tail"
        )
    else:
        yield ok(name, found, f"{figures.memory(LOG_FREE_BYTES)} free")


def _not_writable(host: Host, subject: Subject, name: str, file: str, why: str) -> Finding:
    if not host.is_root and subject.settings is not None and subject.settings.user is not None:
        return unknown(name, f"{file}: not for this user to write, root opens it")
    return shortfall(name, f"{file} is not writable", "writable", why, f"touch {file}")
