"""`--fix`: the kernel settings that findings carry, set for now and, by a file in /etc/sysctl.d, at every boot.

No setting gets a lower value than it has, here or in the file. What cannot be set stays a shortfall.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from forwarder.doctor.finding import Finding, Setting
from forwarder.doctor.host import Host, Unseen

FILE = "etc/sysctl.d/60-forwarder.conf"
_HEAD = "# Set by `forwarder doctor --fix`. Take out what should not be set at boot.\n"


class Change(NamedTuple):
    """What became of one setting; `reason`: why it could not be set, else empty."""

    key: str
    before: str
    after: str
    reason: str = ""


class Mended(NamedTuple):
    """changes: what was set. refused: what could not be. notes: about the file, one line each."""

    changes: list[Change]
    refused: list[Change]
    notes: list[str]


def mend(host: Host, findings: Iterable[Finding]) -> Mended:
    """Sets what the findings ask for, in their order."""
    done = Mended([], [], [])
    kept: list[Setting] = []
    for setting in (finding.setting for finding in findings):
        if setting is None:
            continue
        change = _set(host, setting)
        (done.refused if change.reason else done.changes).append(change)
        if not change.reason:
            kept.append(setting)
    if kept:
        done.notes.extend(_keep(host, kept))
    return done


def _set(host: Host, setting: Setting) -> Change:
    path = host.path(setting.path)
    before = ""
    try:
        before = _read(path)
        wanted = _no_lower(before, setting.value)
        path.write_text(f"{wanted}\n")
        return Change(setting.key, before, _read(path))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return Change(setting.key, before, before, f"{reason} (in a container it is set on the container's host)")


def _read(path: Path) -> str:
    return " ".join(path.read_text().split())


def _no_lower(before: str, wanted: str) -> str:
    """Number by number the larger one: something else may have raised it meanwhile."""
    pairs = zip(before.split(), wanted.split(), strict=False)
    return " ".join(max(old, new, key=int) for old, new in pairs)


# The file


def _keep(host: Host, settings: Sequence[Setting]) -> list[str]:
    """Writes the file as a whole; notes what was written or why not."""
    file = host.path(FILE)
    try:
        old = (host.read(FILE) or "").splitlines(keepends=True)
        text = merged(old, settings)
        fresh = file.with_name(f".{file.name}.{os.getpid()}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_text(text)
            fresh.chmod(0o644)
            fresh.rename(file)
        finally:
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
    except (OSError, Unseen) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return [f"/{FILE}: {(reason or str(error)).lower()}: the changes last until the next boot"]
    return [f"/{FILE}: written, so that the changes outlive a boot", *_overruled(host, settings)]


def merged(old: Sequence[str], settings: Sequence[Setting]) -> str:
    """The file's lines with these settings in the place of theirs, or at the end; never a lower value than it had."""
    wanted = {setting.key: setting for setting in settings}
    lines: list[str] = []
    for line in old or [_HEAD]:
        key, value = _parse(line)
        if key in wanted:
            setting = wanted.pop(key)
            line = _line(setting, _no_lower(value, setting.value) if _is_numbers(value) else setting.value)  # noqa: PLW2901
        lines.append(line if line.endswith("\n") else line + "\n")
    return "".join(lines) + "".join(_line(setting, setting.value) for setting in wanted.values())


def _line(setting: Setting, value: str) -> str:
    return f"{'-' if setting.optional else ''}{setting.key} = {value}\n"


def _parse(line: str) -> tuple[str, str]:
    """(key, value) of a line in sysctl.d; empty for a comment."""
    key, equals, value = line.strip().lstrip("-").partition("=")
    if not equals or key.startswith(("#", ";")):
        return "", ""
    return key.strip().replace("/", "."), value.strip()


def _is_numbers(value: str) -> bool:
    return all(word.isdigit() for word in value.split())


def _overruled(host: Host, settings: Sequence[Setting]) -> list[str]:
    """Files that come after ours at boot and set the same to something else."""
    names = {file.name: f"etc/sysctl.d/{file.name}" for file in host.path("etc/sysctl.d").glob("*.conf")}
    later = [names[name] for name in sorted(names) if name > Path(FILE).name] + ["etc/sysctl.conf"]
    keys = {setting.key for setting in settings}
    found: dict[str, str] = {}
    for path in later:
        with contextlib.suppress(Unseen):
            for line in (host.read(path) or "").splitlines():
                key, value = _parse(line)
                if key in keys:
                    found.setdefault(f"{key} = {value}", path)
    return [f"/{path}: comes later at boot and sets {line}: take it out there" for line, path in found.items()]
