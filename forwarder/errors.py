"""What ends a command: one line for standard error and an exit code (of sysexits.h where it has a fitting one)."""

import contextlib
import os
import sys
from pathlib import Path


def complain(line: str) -> None:
    """Write a line to standard error. Where that fails, the exit code has to do: what was not written is dropped, since
    Python would try again at the end, and exit with a code of its own."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)


def one_line(text: str) -> str:
    """Text from files and file names, safe to print as one line."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )


class ForwarderError(Exception):
    """Failed while running."""

    code = 1


class WrongUsage(ForwarderError):
    """What was asked for cannot be asked for here."""

    code = 2


class ConfigError(ForwarderError):
    """A mistake in a configuration file, or in a file that it names."""

    code = 78

    @classmethod
    def syntax(cls, file: Path, line: int, problem: str) -> "ConfigError":
        """The text is not TOML; `line` counts from 1."""
        return cls(f"{file}:{line}: {problem}")

    @classmethod
    def mistake(cls, file: Path, key: str, expected: str, found: str) -> "ConfigError":
        """`key` is the full path of the key, such as `tunnel[1] "web".host_port`; `found` never shows a secret."""
        return cls(f"{file}: {key}: expected {expected}, found {found}")


class Unreadable(ConfigError):
    """A configuration file, or a file that it names, that this user may not read."""

    code = 77


class Unavailable(ForwarderError):
    """A needed resource is missing or taken: a port, a device."""

    code = 69


class NotPermitted(ForwarderError):
    """The rights for it are missing."""

    code = 77


class BootError(ForwarderError):
    """The instance cannot start, and another try would not help: `code` is the exit code, `message` one line."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
