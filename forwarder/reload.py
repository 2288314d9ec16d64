"""What a configuration file that was read again changes, compared with what runs.

In the file a tunnel is told by its name and mode, between the processes by an index that is never used twice. So a
tunnel that nothing happened to keeps its index. So does a stripe tunnel that changes, as long as its client goes the
same way to the same server with the same key: it takes new settings for what comes from now on. Any other that changes
is a new tunnel under the old name, which starts while the old one drains. A key keeps its place; one that is gone from
the file keeps it too, revoked.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from forwarder.effective import tunnel_table
from forwarder.errors import ConfigError, Unavailable
from workers.settings import Key, Settings, StripeClientTunnel, StripeServerTunnel, Tunnel

INDEX_MAX = 65535
"""Tunnel indices are 16 bits wide where workers name them to each other."""

FIXED = {
    "role": "role",
    "suite": "suite",
    "control_socket": "control.socket",
    "user": "user",
    "group": "group",
    "pin": "pin",
}
"""Settings that a running instance cannot change -> their keys in the file."""

GENERAL = {"workers": "workers", "drain_timeout_s": "drain_timeout", "metrics_listen": "metrics.listen"}


class Running(msgspec.Struct, frozen=True):
    """What is in effect. `settings` has this run's indices and places of keys, and the file's number of workers.

    order: the tunnels' names as the file has them. next_index: the first that no tunnel has had. session_ids: client
    only: tunnel index -> 64-bit session id.
    """

    settings: Settings
    order: tuple[str, ...]
    next_index: int
    session_ids: dict[int, int]


class Plan(NamedTuple):
    """What is to be in effect, and one line for each thing that changes."""

    running: Running
    changes: tuple[str, ...]


def begin(settings: Settings, new_session_id: Callable[[], int]) -> Running:
    """The settings of a start: indices are places in the file."""
    tunnels = settings.tunnels
    return Running(
        settings,
        tuple(tunnel.name for tunnel in tunnels),
        max((tunnel.index for tunnel in tunnels), default=-1) + 1,
        {tunnel.index: new_session_id() for tunnel in tunnels if settings.role == "client"},
    )


def plan(
    file: Path,
    running: Running,
    found: Settings,
    new_session_id: Callable[[], int],
    new_secret: Callable[[], bytes],
) -> Plan:
    """Compares. Raises ConfigError for what cannot change, Unavailable when no index is left."""
    old = running.settings
    _check_fixed(file, old, found)
    rekeyed = found.role == "client" and old.keys[0].key_id != found.keys[0].key_id
    tunnels, next_index = _indexed(running, found, rekeyed)
    placed = {tunnel.name: tunnel for tunnel in tunnels}
    kept = running.session_ids
    session_ids = {
        tunnel.index: kept.get(tunnel.index) or new_session_id() for tunnel in tunnels if found.role == "client"
    }
    settings = replace(
        found,
        keys=found.keys if found.role == "client" else _placed(old.keys, found.keys, new_secret),
        client_tunnels=tuple(placed[tunnel.name] for tunnel in found.client_tunnels),
        server_tunnels=tuple(placed[tunnel.name] for tunnel in found.server_tunnels),
        spray_client_tunnels=tuple(placed[tunnel.name] for tunnel in found.spray_client_tunnels),
        spray_server_tunnels=tuple(placed[tunnel.name] for tunnel in found.spray_server_tunnels),
    )
    order = tuple(tunnel.name for tunnel in found.tunnels)
    changes = (*_tunnel_lines(running, found), *_key_lines(old.keys, settings.keys), *_general_lines(old, found))
    return Plan(Running(settings, order, next_index, session_ids), changes)


def _check_fixed(file: Path, old: Settings, found: Settings) -> None:
    for field, key in FIXED.items():
        before, now = getattr(old, field), getattr(found, field)
        if before != now:
            what = f"{key} cannot change while it runs"
            raise ConfigError.mistake(file, what, _shown(before), _shown(now))


def _indexed(running: Running, found: Settings, rekeyed: bool) -> tuple[list[Tunnel], int]:
    """The tunnels of the file with this run's indices, and the next one."""
    known = {(tunnel.name, tunnel.mode): tunnel for tunnel in running.settings.tunnels}
    next_index = running.next_index
    tunnels: list[Tunnel] = []
    for tunnel in found.tunnels:
        before = known.get((tunnel.name, tunnel.mode))
        if before is not None and not rekeyed and _goes_on(before, tunnel):
            tunnels.append(replace(tunnel, index=before.index))
            continue
        if next_index > INDEX_MAX:
            raise Unavailable(
                f"tunnel {tunnel.name!r}: {INDEX_MAX + 1} tunnels have come and gone since the start, and one instance "
                "can tell no more apart: restart it"
            )
        tunnels.append(replace(tunnel, index=next_index))
        next_index += 1
    return tunnels, next_index


def _goes_on(before: Tunnel, tunnel: Tunnel) -> bool:
    match tunnel:
        case StripeServerTunnel():
            return True
        case StripeClientTunnel():
            routes = ("remote_end", "more_ends", "sources")
            return all(getattr(before, field) == getattr(tunnel, field) for field in routes)
        case _:
            return replace(tunnel, index=before.index) == before


def _placed(old: tuple[Key, ...], found: tuple[Key, ...], new_secret: Callable[[], bytes]) -> tuple[Key, ...]:
    """The server's keys, each at the place that it has had."""
    left = {key.key_id: key for key in found}
    placed = [left.pop(key.key_id) if key.key_id in left else _revoked(key, new_secret) for key in old]
    return (*placed, *left.values())


def _revoked(key: Key, new_secret: Callable[[], bytes]) -> Key:
    return key if key.revoked else replace(key, secret=new_secret(), revoked=True)


# What is told of it


def _tunnel_lines(running: Running, found: Settings) -> Iterator[str]:
    old = {tunnel.name: tunnel for tunnel in running.settings.tunnels}
    for name in running.order:
        if name not in {tunnel.name for tunnel in found.tunnels}:
            yield f"tunnel {name!r}: removed"
    for tunnel in found.tunnels:
        before = old.get(tunnel.name)
        if before is None:
            yield f"tunnel {tunnel.name!r}: added"
        elif replace(tunnel, index=before.index) != before:
            yield f"tunnel {tunnel.name!r}: changed ({', '.join(_keys_that_differ(before, tunnel))})"


def _keys_that_differ(before: Tunnel, tunnel: Tunnel) -> list[str]:
    one, other = tunnel_table(before), tunnel_table(tunnel)
    if before.mode != tunnel.mode:
        return ["mode"]
    return [key for key in one | other if one.get(key) != other.get(key)]


def _key_lines(old: tuple[Key, ...], new: tuple[Key, ...]) -> Iterator[str]:
    before = {key.key_id: key for key in old if not key.revoked}
    now = {key.key_id: key for key in new if not key.revoked}
    yield from (f"key {key_id!r}: removed" for key_id in before if key_id not in now)
    for key_id, key in now.items():
        if key_id not in before:
            yield f"key {key_id!r}: added"
        elif before[key_id] != key:
            what = [field for field in ("secret", "tunnels") if getattr(before[key_id], field) != getattr(key, field)]
            yield f"key {key_id!r}: changed ({', '.join(what)})"


def _general_lines(old: Settings, found: Settings) -> Iterator[str]:
    pairs = [(key, getattr(old, field), getattr(found, field)) for field, key in GENERAL.items()]
    pairs += [(f"log.{field}", getattr(old.log, field), getattr(found.log, field)) for field in ("level", "format")]
    pairs += [("log.file", old.log.file, found.log.file)]
    for key, before, now in pairs:
        if before != now:
            yield f"{key}: {_shown(before)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}s"
    return "none" if value is None else str(value)
