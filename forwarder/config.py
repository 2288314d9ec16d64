"""A configuration file -> `workers.settings.Settings`.

`forwarder.document` has checked every table by itself, and `forwarder.tunnels` makes tunnels of theirs. Here: keys are
read, names compared across tables, paths made absolute and defaults filled in. Nothing is looked up in the network.
"""

import grp
import os
import pwd
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from forwarder import keys
from forwarder.document import parse, read_file, read_text, shown
from forwarder.errors import ConfigError, Unreadable, one_line
from forwarder.schema import Auth, ClientFile, File, ServerFile
from forwarder.tunnels import client_tunnels, given, path_of, server_tunnels
from forwarder.units import parse_endpoint, parse_time
from workers.settings import Address, Key, LogSettings, Settings

SOCKET_PATH_BYTES_MAX = 107  # sun_path without its zero
PATH_SHOWN_MAX = 1024
WORKERS_MAX = 64


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and what its owner should know although it is no mistake: one line each."""

    settings: Settings
    warnings: tuple[str, ...]


def load(file: Path, *, secrets: bool = True) -> Loaded:
    """Reads and checks `file`. Raises ConfigError with the first mistake.

    secrets: without them no key file is read, and every key is zeros.
    """
    return _Loader(file, secrets).load()


@dataclass(frozen=True, slots=True)
class Instance:
    """How to reach the instance that a file names."""

    control_socket: Path
    drain_timeout_s: float


def find_instance(file: Path) -> Instance:
    """Reads no more of `file` than this takes: a mistake elsewhere must not keep anybody from stopping an instance.

    Raises ConfigError if the file cannot be read or is not TOML.
    """
    document = parse(file, read_text(file))
    control = document.get("control")
    named = control.get("socket") if isinstance(control, dict) else None
    try:
        drain_timeout_s = parse_time(document.get("drain_timeout"))
    except ValueError:
        drain_timeout_s = default_of(Settings, "drain_timeout_s")
    return Instance(_control_socket(file, named if isinstance(named, str) else None), drain_timeout_s)


def default_of(shape: type[msgspec.Struct], field: str) -> Any:
    """The default value of a setting."""
    return next(each.default for each in msgspec.structs.fields(shape) if each.name == field)


def usable_cores() -> int:
    """Cores that this process may run on, at most as many as there may be workers."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, WORKERS_MAX)


def _control_socket(file: Path, named: str | None) -> Path:
    """The socket's absolute path; by default from the stem of the file's name, in a directory of this user."""
    if named is not None:
        return _beside(file, named)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if os.geteuid() == 0:
        directory = Path("/run/forwarder")
    elif runtime:
        directory = Path(runtime) / "forwarder"
    else:
        directory = Path(tempfile.gettempdir()) / f"forwarder-{os.geteuid()}"
    return directory / f"{file.stem}.sock"


def _beside(file: Path, name: str) -> Path:
    """A path that a configuration file names: relative to that file."""
    return file.absolute().parent / name


class _Loader:
    """One file on its way to Settings; stops at the first mistake."""

    def __init__(self, file: Path, secrets: bool) -> None:
        self.file = file
        self.secrets = secrets
        self.warnings: list[str] = []

    def load(self) -> Loaded:
        """The checks in an order near the document's."""
        tables = read_file(self.file)
        ends: dict[str, Any]
        if isinstance(tables, ClientFile):
            ends = {"keys": (self._key("auth", tables.auth),)} | client_tunnels(self.file, tables.tunnel)
        else:
            ends = {"keys": self._server_keys(tables)} | server_tunnels(self.file, tables.tunnel)
        settings = Settings(
            metrics_listen=Address(*parse_endpoint(tables.metrics.listen)) if tables.metrics else None,
            **self._general(tables),
            **ends,
        )
        return Loaded(settings, tuple(self.warnings))

    def _mistake(self, key: str, expected: str, found: str) -> ConfigError:
        return ConfigError.mistake(self.file, key, expected, found)

    def _general(self, tables: File) -> dict[str, Any]:
        """What is neither a key nor a tunnel."""
        socket = _control_socket(self.file, tables.control.socket)
        if len(os.fsencode(socket)) > SOCKET_PATH_BYTES_MAX:
            raise self._mistake(
                "control.socket",
                f"a path of at most {SOCKET_PATH_BYTES_MAX} bytes",
                shown(str(socket), limit=PATH_SHOWN_MAX),
            )
        self._check_account("user", tables.user, pwd.getpwnam, pwd.getpwuid)
        self._check_account("group", tables.group, grp.getgrnam, grp.getgrgid)
        log = given(tables.log)
        if tables.log.file is not None:
            log["file"] = str(_beside(self.file, tables.log.file))
        general = given(tables, leave_out=("auth", "client", "tunnel", "control", "metrics", "log", "workers"))
        workers = tables.workers or usable_cores()
        return general | {"workers": workers, "control_socket": str(socket), "log": LogSettings(**log)}

    def _check_account(
        self, key: str, name: str | None, by_name: Callable[[str], Any], by_id: Callable[[int], Any]
    ) -> None:
        try:
            if name is not None:
                _ = by_id(int(name)) if name.isdecimal() else by_name(name)
        except (KeyError, ValueError, OverflowError):  # ValueError: a null byte, or thousands of digits
            raise self._mistake(key, f"a {key} of this host", shown(name)) from None

    def _key(self, where: str, auth: Auth, tunnels: frozenset[str] | None = None) -> Key:
        """The key that a table holds or points to."""
        if auth.key is not None:
            return self._inline_key(where, auth, tunnels)
        if not self.secrets:
            return Key(auth.key_id, bytes(keys.KEY_BYTES), tunnels)
        key, file = f"{where}.key_file", _beside(self.file, str(auth.key_file))
        name = shown(auth.key_file, limit=PATH_SHOWN_MAX)
        try:
            secret, exposed = keys.read_key_file(file)
        except OSError as error:
            kind = Unreadable if isinstance(error, PermissionError) else ConfigError
            raise kind.mistake(self.file, key, "a readable file", f"{name}: {error.strerror}") from error
        except keys.KeyMistake as error:
            raise self._mistake(key, "32 bytes in base64", f"{error} in {name}") from error
        if exposed:
            self.warnings.append(f"{key}: every user of this host may read {one_line(str(file))}")
        return Key(auth.key_id, secret, tunnels)

    def _inline_key(self, where: str, auth: Auth, tunnels: frozenset[str] | None) -> Key:
        try:
            secret = keys.decode(str(auth.key))
        except keys.KeyMistake as error:
            raise self._mistake(f"{where}.key", "32 bytes in base64", str(error)) from error
        if keys.is_exposed(self.file):
            self.warnings.append(f"{where}.key: every user of this host may read {one_line(str(self.file))}")
        return Key(auth.key_id, secret, tunnels)

    def _server_keys(self, tables: ServerFile) -> tuple[Key, ...]:
        """One key per [[client]], each under a name of its own."""
        names = {tunnel.name for tunnel in tables.tunnel}
        result: list[Key] = []
        for index, client in enumerate(tables.client):
            where = path_of("client", index, client.key_id)
            for earlier, other in enumerate(tables.client[:index]):
                if other.key_id == client.key_id:
                    taken = f"{shown(client.key_id)} as in client[{earlier + 1}]"
                    raise self._mistake(f"{where}.key_id", "a key_id of its own", taken)
            for number, name in enumerate(client.tunnels or ()):
                if name not in names:
                    known = ", ".join(shown(name) for name in sorted(names))
                    raise self._mistake(
                        f"{where}.tunnels[{number + 1}]", f"the name of a tunnel ({known})", shown(name)
                    )
            tunnels = None if client.tunnels is None else frozenset(client.tunnels)
            result.append(self._key(where, client, tunnels))
        return tuple(result)
