"""`[[tunnel]]` tables -> the tunnels of `workers.settings`.

`forwarder.document` has checked every table by itself. Here defaults are filled in, and names and ports are compared
across tables: of all modes, since a stripe tunnel and a fake-TCP port may want the same one. Nothing is looked up in
the network. ConfigError for the first mistake.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from forwarder.document import shown
from forwarder.errors import ConfigError
from forwarder.schema import (
    ClientTunnel,
    ServerTunnel,
    SprayClientTable,
    SprayServerTable,
    SprayTable,
    StripeClientTable,
    StripeServerTable,
    Table,
)
from forwarder.units import address_family, parse_endpoint
from forwarder.values import Ports, Size, Stripes, Text, Time
from workers.settings import (
    Address,
    Kind,
    SprayClientTunnel,
    SprayServerTunnel,
    StripeClientTunnel,
    StripeServerTunnel,
    Tunnel,
)

AUTO_MAX = 256
"""The most stripes of a tunnel with somaxconn = "auto"."""

SETTING_NAMES = {
    "window_max": "window_max_bytes",
    "frame_max": "frame_max_bytes",
    "resume_timeout": "resume_timeout_s",
    "connect_timeout": "connect_timeout_s",
    "handshake_timeout": "handshake_timeout_s",
    "idle_timeout": "idle_timeout_s",
    "rotate_after": "rotate_after_s",
    "dial_rate": "dial_rate_per_s",
    "drain_timeout": "drain_timeout_s",
    "dev": "device",
    "duration": "duration_s",
    "keepalive": "keepalive_s",
    "capture_max": "capture_max_bytes",
}
"""File keys whose settings have another name, mostly one that carries the unit; all others are named alike."""


class Place(NamedTuple):
    """A port that a tunnel wants for itself, here or at the server; `key` is where to report that it is taken."""

    kind: Kind
    address: Address
    tunnel: Tunnel
    key: str


def client_tunnels(file: Path, tables: Sequence[ClientTunnel]) -> dict[str, Any]:
    """The tunnels as fields of Settings."""
    _check_names(file, tables)
    _check_captures(file, tables)
    tunnels = [
        _stripe_client(index, table) if isinstance(table, StripeClientTable) else _spray_client(file, index, table)
        for index, table in enumerate(tables)
    ]
    _check_listening(file, map(_local_place, tunnels, tables))
    _check_remote(file, (place for tunnel in tunnels for place in _remote_places(tunnel)))
    return {
        "client_tunnels": tuple(tunnel for tunnel in tunnels if isinstance(tunnel, StripeClientTunnel)),
        "spray_client_tunnels": tuple(tunnel for tunnel in tunnels if isinstance(tunnel, SprayClientTunnel)),
    }


def server_tunnels(file: Path, tables: Sequence[ServerTunnel]) -> dict[str, Any]:
    """The tunnels as fields of Settings."""
    _check_names(file, tables)
    _check_captures(file, tables)
    tunnels = [
        _stripe_server(index, table) if isinstance(table, StripeServerTable) else _spray_server(file, index, table)
        for index, table in enumerate(tables)
    ]
    _check_listening(file, (place for tunnel in tunnels for place in _listening_places(tunnel)))
    return {
        "server_tunnels": tuple(tunnel for tunnel in tunnels if isinstance(tunnel, StripeServerTunnel)),
        "spray_server_tunnels": tuple(tunnel for tunnel in tunnels if isinstance(tunnel, SprayServerTunnel)),
    }


def _stripe_client(index: int, table: StripeClientTable) -> StripeClientTunnel:
    first, *more = (Address(str(host), table.host_port) for host in table.host)
    stripes: dict[str, Any] = {}
    if table.somaxconn == Stripes.AUTO:
        stripes = {"auto": True, "somaxconn": AUTO_MAX}
    elif table.somaxconn is not None:
        stripes = {"somaxconn": int(table.somaxconn)}
    return StripeClientTunnel(
        index=index,
        local=_end(table.local_port, table.local),
        remote_end=first,
        more_ends=tuple(more),
        sources=_texts(table.source),
        **stripes,
        **given(table, leave_out=("host", "host_port", "local", "local_port", "somaxconn", "source")),
    )


def _stripe_server(index: int, table: StripeServerTable) -> StripeServerTunnel:
    return StripeServerTunnel(
        index=index,
        listen=Address(str(table.listen or "::"), table.host_port),
        target=_end(table.remote_port, table.remote),
        **given(table, leave_out=("listen", "host_port", "remote", "remote_port")),
    )


def _spray_client(file: Path, index: int, table: SprayClientTable) -> SprayClientTunnel:
    return SprayClientTunnel(
        index=index,
        local=_end(None, table.ludp),
        hosts=_texts(table.host),
        sources=_texts(table.source),
        capture=_capture(file, table),
        **given(table, leave_out=("host", "ludp", "source", "capture")),
    )


def _spray_server(file: Path, index: int, table: SprayServerTable) -> SprayServerTunnel:
    return SprayServerTunnel(
        index=index,
        listen=str(table.listen or "::"),
        target=_end(None, table.taddr),
        capture=_capture(file, table),
        **given(table, leave_out=("listen", "taddr", "capture")),
    )


def _capture(file: Path, table: SprayTable) -> str | None:
    """A relative path is relative to the file."""
    return None if table.capture is None else str(file.absolute().parent / table.capture)


def _end(port: int | None, endpoint: str | None) -> Address:
    """A port of this host, or what the other spelling names."""
    return Address("127.0.0.1", port) if port is not None else Address(*parse_endpoint(str(endpoint)))


def _texts(values: Iterable[str] | None) -> tuple[str, ...]:
    return tuple(str(value) for value in values or ())


def _check_names(file: Path, tables: Sequence[ClientTunnel | ServerTunnel]) -> None:
    first: dict[str, int] = {}
    for index, table in enumerate(tables):
        if first.setdefault(table.name, index) != index:
            taken = f"{shown(table.name)} as in tunnel[{first[table.name] + 1}]"
            raise ConfigError.mistake(file, f"{key_of_tunnel(index, table.name)}.name", "a name of its own", taken)


def _check_captures(file: Path, tables: Sequence[ClientTunnel | ServerTunnel]) -> None:
    first: dict[str, int] = {}
    for index, table in enumerate(tables):
        name = _capture(file, table) if isinstance(table, SprayTable) else None
        if name is not None and not Path(name).suffix:
            name += ".pcap"  # as the worker does
        if name is not None and first.setdefault(name, index) != index:
            taken = f"{shown(name)} as in tunnel[{first[name] + 1}]"
            raise ConfigError.mistake(file, f"{key_of_tunnel(index, table.name)}.capture", "a file of its own", taken)


def _local_place(tunnel: StripeClientTunnel | SprayClientTunnel, table: ClientTunnel) -> Place:
    """Where a client's applications come to."""
    if isinstance(table, SprayClientTable):
        return Place("udp", tunnel.local, tunnel, "ludp")
    return Place("tcp", tunnel.local, tunnel, "local" if table.local else "local_port")


def _remote_places(tunnel: StripeClientTunnel | SprayClientTunnel) -> Iterator[Place]:
    """Where a client's carriers go to."""
    if isinstance(tunnel, StripeClientTunnel):
        yield from (Place("tcp", end, tunnel, "host_port") for end in tunnel.remote_ends)
    else:
        for host in tunnel.hosts:
            yield from (Place(kind, Address(host, port), tunnel, "ports") for kind, port in tunnel.carriers)


def _listening_places(tunnel: StripeServerTunnel | SprayServerTunnel) -> Iterator[Place]:
    """Where a server's carriers arrive."""
    if isinstance(tunnel, StripeServerTunnel):
        yield Place("tcp", tunnel.listen, tunnel, "host_port")
    else:
        yield from (Place(kind, Address(tunnel.listen, port), tunnel, "ports") for kind, port in tunnel.carriers)


def _check_listening(file: Path, places: Iterable[Place]) -> None:
    """No two tunnels may listen on one port of one address."""
    known: dict[tuple[Kind, int], list[Place]] = {}
    for place in places:
        beside = known.setdefault((place.kind, place.address.port), [])
        for other in beside:
            if overlap(place.address, other.address):
                found = f"{place.address} beside {other.address} of {key_of_tunnel(*_label(other))}"
                key = f"{key_of_tunnel(*_label(place))}.{place.key}"
                raise ConfigError.mistake(file, key, "a port that no other tunnel listens on", found)
        beside.append(place)


def _check_remote(file: Path, places: Iterable[Place]) -> None:
    """No two tunnels may have one port of one host; that two names mean one host is not seen here."""
    known: dict[tuple[Kind, Address], Place] = {}
    for place in places:
        other = known.setdefault((place.kind, place.address), place)
        if other.tunnel is not place.tunnel:
            found = f"{place.address} as in {key_of_tunnel(*_label(other))}"
            key = f"{key_of_tunnel(*_label(place))}.{place.key}"
            raise ConfigError.mistake(file, key, "a port that no other tunnel has at this host", found)


def _label(place: Place) -> tuple[int, str]:
    return place.tunnel.index, place.tunnel.name


def overlap(one: Address, other: Address) -> bool:
    """Whether no two sockets can listen on both. `::` is all addresses of both families; names are not looked up."""
    if one.port != other.port:
        return False
    hosts = {one.host, other.host}
    if len(hosts) == 1 or "::" in hosts:
        return True
    return "0.0.0.0" in hosts and all(address_family(host) == 4 for host in hosts)


def key_of_tunnel(index: int, name: str) -> str:
    """The path of a tunnel's keys, as in messages."""
    return path_of("tunnel", index, name)


def path_of(table: str, index: int, name: str) -> str:
    """The path of the keys of one of several tables, as in messages."""
    return f"{table}[{index + 1}] {shown(name)}"


def given(table: Table, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The keys that a table has, under their settings' names, as plain values."""
    keys = ((key, getattr(table, key)) for key in table.__struct_fields__ if key not in leave_out)
    return {SETTING_NAMES.get(key, key): _plain(value) for key, value in keys if value is not None}


def _plain(value: Any) -> Any:
    """A value of the schema's own classes -> the built-in type that it extends."""
    match value:
        case Size():
            return int(value)
        case Time():
            return float(value)
        case Text():
            return str(value)
        case Ports():
            return tuple(value)
    return value
