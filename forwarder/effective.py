"""Settings -> the TOML document that says the same with every default filled in and every key hidden."""

from typing import Any

import msgspec
import toml

from forwarder.config import SETTING_NAMES
from forwarder.units import format_size, format_time
from workers.settings import Address, Key, Settings, StripeClientTunnel, StripeServerTunnel

HIDDEN = "hidden"

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
    sections += [("tunnel", [_tunnel_table(each)]) for each in settings.client_tunnels or settings.server_tunnels]
    return "\n".join(
        toml.dumps(part).strip() + "\n" for part in (general, *({name: table} for name, table in sections))
    )


def _key_table(key: Key) -> dict[str, Any]:
    table: dict[str, Any] = {"key_id": key.key_id, "key": HIDDEN}
    return table if key.tunnels is None else table | {"tunnels": sorted(key.tunnels)}


def _tunnel_table(tunnel: StripeClientTunnel | StripeServerTunnel) -> dict[str, Any]:
    table: dict[str, Any] = {"name": tunnel.name, "mode": "stripe"}
    if isinstance(tunnel, StripeClientTunnel):
        table |= _client_keys(tunnel)
    else:
        listen = str(Address(tunnel.listen.host, 0)).removesuffix(":0")
        table |= {"listen": listen, "host_port": tunnel.listen.port, "remote": str(tunnel.target)}
    told = {"name", "index", "remote_end", "more_ends", "local", "somaxconn", "auto", "sources", "listen", "target"}
    return table | _keys_of(tunnel, *(field for field in tunnel.__struct_fields__ if field not in told))


def _client_keys(tunnel: StripeClientTunnel) -> dict[str, Any]:
    hosts = [end.host for end in tunnel.remote_ends]
    table: dict[str, Any] = {"host": hosts if len(hosts) > 1 else hosts[0], "host_port": tunnel.remote_end.port}
    table |= {"local": str(tunnel.local), "somaxconn": "auto" if tunnel.auto else tunnel.somaxconn}
    if tunnel.sources:
        table["source"] = list(tunnel.sources) if len(tunnel.sources) > 1 else tunnel.sources[0]
    return table


def _keys_of(settings: msgspec.Struct, *fields: str) -> dict[str, Any]:
    """Settings under their file's keys, in their file's notation; those that are None have no key."""
    given = ((field, getattr(settings, field)) for field in fields)
    return {_FILE_KEYS.get(field, field): _notation(field, value) for field, value in given if value is not None}


def _notation(field: str, value: Any) -> Any:
    if field.endswith("_bytes"):
        return format_size(value)
    return format_time(value) if field.endswith("_timeout_s") or field == "rotate_after_s" else value
