"""What a check says: one finding for each thing that it looked at."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """SHORTFALL and nothing else makes the exit code 1. HINT: it works, and would work better, or is worth knowing."""

    OK = "ok"
    SHORTFALL = "shortfall"
    HINT = "hint"
    UNKNOWN = "unknown"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Setting:
    """A kernel setting as sysctl names it, and its whole value that would do. `optional`: there once a module is
    loaded, so that it may be missing at boot."""

    key: str
    value: str
    optional: bool = False

    @property
    def path(self) -> str:
        return "proc/sys/" + self.key.replace(".", "/")

    @property
    def command(self) -> str:
        value = f"'{self.value}'" if " " in self.value else self.value
        return f"sysctl -w {self.key}={value}"


@dataclass(frozen=True, slots=True)
class Finding:
    """command: what mends it, as root, on a line of its own. setting: what `--fix` may set; None: it cannot mend it."""

    name: str
    status: Status
    found: str
    wanted: str = ""
    why: str = ""
    command: str = ""
    setting: Setting | None = None


def ok(name: str, found: str, wanted: str = "") -> Finding:
    return Finding(name, Status.OK, found, wanted)


def unknown(name: str, reason: str) -> Finding:
    return Finding(name, Status.UNKNOWN, reason)


def not_applicable(name: str, reason: str) -> Finding:
    return Finding(name, Status.NOT_APPLICABLE, reason)


def shortfall(name: str, found: str, wanted: str, why: str, command: str, setting: Setting | None = None) -> Finding:
    return Finding(name, Status.SHORTFALL, found, wanted, why, command, setting)


def hint(name: str, found: str, wanted: str, why: str, command: str = "") -> Finding:
    return Finding(name, Status.HINT, found, wanted, why, command)
