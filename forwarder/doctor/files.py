"""Checks of the files that an instance needs besides its log: keys and the place of its control socket."""

import stat
from collections.abc import Iterator
from pathlib import Path

from forwarder import keys
from forwarder.doctor.finding import Finding, not_applicable, ok, shortfall, unknown
from forwarder.doctor.host import Host, Unseen
from forwarder.doctor.subject import Subject


def key_files(host: Host, subject: Subject) -> Iterator[Finding]:
    """Each key: there, readable, one, and for its owner alone."""
    if subject.file is None:
        yield not_applicable("key files", "no -c FILE")
    for each in subject.key_files:
        yield _key_file(host, f"key of {each.owner}", each.path, each.inline)


def _key_file(host: Host, name: str, path: Path, inline: bool) -> Finding:
    why = "whoever reads it can use the tunnels as this client, and read what it sends"
    try:
        info = host.stat(str(path))
        if info is None:
            missing = "no instance starts without its keys"
            return shortfall(name, f"no file {path}", "32 bytes in base64", missing, _made(path))
        if info.st_mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
            mode = f"mode {stat.S_IMODE(info.st_mode):04o}"
            return shortfall(name, f"{path}, {mode}", "nobody else's to read or write", why, f"chmod o=,g-w {path}")
        text = host.read(str(path))
        if text is not None and not inline:
            keys.decode(text)
    except Unseen as reason:
        return unknown(name, str(reason))
    except keys.KeyMistake as mistake:
        return shortfall(name, f"{mistake} in {path}", "32 bytes in base64", "it is no key", _made(path))
    return ok(name, f"{path}, mode {stat.S_IMODE(info.st_mode):04o}")


def _made(path: Path) -> str:
    return f"(umask 077; forwarder genkey > {path})  # and the same file at the other end"


def control_socket(host: Host, subject: Subject) -> Iterator[Finding]:
    """Whether the control socket can be made, or is there."""
    name = "control socket"
    if subject.settings is None:
        yield not_applicable(name, "no -c FILE")
        return
    path = Path(subject.settings.control_socket)
    if subject.pids:
        yield ok(name, f"{path}, answered by pid {subject.pids[0]}")
        return
    try:
        place = next((each for each in path.parents if host.stat(str(each)) is not None), Path("/"))
    except Unseen as reason:
        yield unknown(name, str(reason))
        return
    if subject.unseen:
        yield unknown(name, subject.unseen)
    elif host.may_write(str(place)):
        yield ok(name, f"{path}, can be made")
    else:
        why = "an instance does not start where it cannot make its control socket"
        command = f'mkdir -p {path.parent} && chown "$USER" {path.parent}  # or another [control] socket'
        yield shortfall(name, f"{place} is not writable", f"a place for {path}", why, command)
