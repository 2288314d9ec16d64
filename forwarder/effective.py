"""Settings -> the TOML document that says the same with every default filled in and every key hidden."""

from collections.abc import Sequence
from typing import Any

import msgspec
import toml

from forwarder.tunnels import SETTING_NAMES
from forwarder.units import format_ports, format_size, format_time
from workers.settings import (
    Key,
    Settings,
    SprayClientTunnel,
    SprayServerTunnel,
    StripeClientTunnel,
    StripeServerTunnel,
    Tunnel,
)

HIDDEN = "hidden"

_TOLD = frozenset(
    {"name", "index", "ports", "remote_end", "more_ends", "hosts", "sources"}
    | {"local", "listen", "target", "somaxconn", "auto"}
)
"""Fields that have keys of another shape; `tunnel_table` writes them."""

_FILE_KEYS = {setting: key for key, setting in SETTING_NAMES.items()}


def effective_toml(settings: Settings) -> str:
    """What `forwarder check` prints."""
    general = _keys_of(settings, "role", "workers", "suite", "drain_timeout_s", "user", "group", "pin")
    sections: list[tuple[str, Any]] = []
    if settings.role == "client":
        sections.append(("auth", _key_table(settings.keys[0])))
    sections.append(("control", {"socket": settings.control_socket}))
    if settings.metrics_listen is not None:
        sections.append(("metrics", {"listen": str(settings.metrics_listen)}))
    sections.append(("log", _keys_of(settings.log, *settings.log.__struct_fields__)))
    if settings.role == "server":
        sections += [("client", [_key_table(key)]) for key in settings.keys]
    sections += [("tunnel", [tunnel_table(each)]) for each in settings.tunnels]
    return "\n".join(
        toml.dumps(part).strip() + "\n" for part in (general, *({name: table} for name, table in sections))
    )


def _key_table(key: Key) -> dict[str, Any]:
    table: dict[str, Any] = {"key_id": key.key_id, "key": HIDDEN}
    return table if key.tunnels is None else table | {"tunnels": sorted(key.tunnels)}


def tunnel_table(tunnel: Tunnel) -> dict[str, Any]:
    """First what stands at the start of every such table, then the rest in the settings' order."""
    table: dict[str, Any] = {"name": tunnel.name, "mode": tunnel.mode}
    match tunnel:
        case StripeClientTunnel():
            stripes = "auto" if tunnel.auto else tunnel.somaxconn
            hosts = [end.host for end in tunnel.remote_ends]
            table |= {"host": _one_or_several(hosts), "host_port": tunnel.remote_end.port}
            table |= {"local": str(tunnel.local), "somaxconn": stripes}
        case StripeServerTunnel():
            table |= {"listen": _bracketed(tunnel.listen.host), "host_port": tunnel.listen.port}
            table |= {"remote": str(tunnel.target)}
        case SprayClientTunnel():
            table |= {"host": _one_or_several(tunnel.hosts), "ports": format_ports(tunnel.ports)}
            table |= {"ludp": str(tunnel.local)}
        case SprayServerTunnel():
            table |= {"listen": _bracketed(tunnel.listen), "ports": format_ports(tunnel.ports)}
            table |= {"taddr": str(tunnel.target)}
    if isinstance(tunnel, StripeClientTunnel | SprayClientTunnel) and tunnel.sources:
        table["source"] = _one_or_several(tunnel.sources)
    return table | _keys_of(tunnel, *(field for field in tunnel.__struct_fields__ if field not in _TOLD))


def _one_or_several(values: Sequence[str]) -> str | list[str]:
    return list(values) if len(values) > 1 else values[0]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _keys_of(settings: msgspec.Struct, *fields: str) -> dict[str, Any]:
    """Settings under their file's keys, in their file's notation; those that are None have no key."""
    given = ((field, getattr(settings, field)) for field in fields)
    return {_FILE_KEYS.get(field, field): _notation(field, value) for field, value in given if value is not None}


def _notation(field: str, value: Any) -> Any:
    if field.endswith("_bytes"):
        return format_size(value)
    return format_time(value) if field.endswith("_s") and not field.endswith("_per_s") else value
