"""Checked settings, as workers see them: plain values, no file and no unit left to parse.

`forwarder.config` builds these from a TOML file. Times are seconds, sizes bytes, ports 1..65535 (0 where a test wants
the kernel to pick one).
"""

from typing import ClassVar, Literal

import msgspec


class Address(msgspec.Struct, frozen=True):
    """A host (name, IPv4 or IPv6 without brackets) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class StripeTunnel(msgspec.Struct, frozen=True, kw_only=True):
    """What both ends of a stripe tunnel have. `index` is its place in the file, among tunnels of every mode."""

    mode: ClassVar[Literal["stripe"]] = "stripe"
    name: str
    index: int
    window_max_bytes: int = 32 << 20
    frame_max_bytes: int = 256 << 10
    resume_timeout_s: float = 30.0
    congestion: str | None = None


class StripeClientTunnel(StripeTunnel, frozen=True, kw_only=True):
    """A stripe tunnel at the client: applications connect to `local`, stripes go to the `remote_ends` in turn.

    `somaxconn` stripes, or with `auto` at most so many; `sources`: the addresses to connect from, in turn.
    """

    local: Address
    remote_end: Address
    more_ends: tuple[Address, ...] = ()
    somaxconn: int = 10
    auto: bool = False
    sources: tuple[str, ...] = ()
    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 600.0
    dial_rate_per_s: float = 100.0
    rotate_after_s: float | None = None

    @property
    def remote_ends(self) -> tuple[Address, ...]:
        """All addresses of the server."""
        return (self.remote_end, *self.more_ends)


class StripeServerTunnel(StripeTunnel, frozen=True, kw_only=True):
    """A stripe tunnel at the server: stripes arrive at `listen`, streams go to `target`."""

    listen: Address
    target: Address
    handshake_timeout_s: float = 10.0
    connect_timeout_s: float = 10.0
    max_sessions: int = 1024
    max_streams: int = 65536


Kind = Literal["tcp", "udp"]
"""What a port looks like on the wire: fake TCP or UDP."""


class SprayTunnel(msgspec.Struct, frozen=True, kw_only=True):
    """What both ends of a spray tunnel have. `index` is its place in the file, among tunnels of every mode.

    `ports` ascend, so both ends count them alike; with type "all" each port is there both ways. `device` None: the one
    of the route. `backend` and `device` are about fake TCP only. `mtu`: bytes of the largest IP packet; None: what the
    path turns out to carry. `capture`: the file that each worker writes what passes the ports to, its number inserted,
    anew after `capture_max_bytes`; None: nothing is recorded.
    """

    mode: ClassVar[Literal["spray"]] = "spray"
    name: str
    index: int
    ports: tuple[int, ...]
    type: Literal["tcp", "udp", "all"] = "tcp"
    device: str | None = None
    backend: Literal["packet", "pcap"] = "packet"
    duration_s: float = 60.0
    keepalive_s: float = 10.0
    copies: int = 1
    mtu: int | None = None
    capture: str | None = None
    capture_max_bytes: int = 64 << 20

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that every port has."""
        return ("tcp", "udp") if self.type == "all" else (self.type,)

    @property
    def carriers(self) -> tuple[tuple[Kind, int], ...]:
        """Kind and port of each carrier by its index: first all of the first port, fake TCP before UDP."""
        return tuple((kind, port) for port in self.ports for kind in self.kinds)

    def owner_of(self, carrier: int, workers: int) -> int:
        """The worker's seat. Counted by ports, moved on by one for the second kind: with the carrier index alone one of
        two workers would get all fake TCP and the other all UDP."""
        port, kind = divmod(carrier, len(self.kinds))
        return (port + kind) % workers


class SprayClientTunnel(SprayTunnel, frozen=True, kw_only=True):
    """A spray tunnel at the client: applications send to `local`, ports of `hosts` are dialled, from the `sources` in
    turn."""

    local: Address
    hosts: tuple[str, ...]
    sources: tuple[str, ...] = ()
    dial_rate_per_s: float = 100.0
    rotate_after_s: float | None = None

    def remote_ends(self, carrier: int) -> tuple[Address, ...]:
        """Where the carrier of that index may be dialled: its port at each host, in the file's order."""
        port = self.ports[carrier // len(self.kinds)]
        return tuple(Address(host, port) for host in self.hosts)


class SprayServerTunnel(SprayTunnel, frozen=True, kw_only=True):
    """A spray tunnel at the server: ports of the host `listen` (`::` is all addresses of both families), datagrams go
    to `target`."""

    listen: str
    target: Address
    max_sessions: int = 1024
    max_conversations: int = 65536


Tunnel = StripeClientTunnel | StripeServerTunnel | SprayClientTunnel | SprayServerTunnel


class Key(msgspec.Struct, frozen=True):
    """A client's 32-byte pre-shared key. At the server, `tunnels` limits what it may use (None: all); a `revoked` one
    only keeps its place, for the sessions that it began."""

    key_id: str
    secret: bytes
    tunnels: frozenset[str] | None = None
    revoked: bool = False

    def __repr__(self) -> str:
        return f"Key(key_id={self.key_id!r}, secret=hidden, tunnels={self.tunnels!r})"


class LogSettings(msgspec.Struct, frozen=True):
    """`file` None: standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    file: str | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A whole configuration. At a client `keys` has exactly one entry. `workers` is resolved: at least 1."""

    role: Literal["client", "server"]
    workers: int
    keys: tuple[Key, ...]
    client_tunnels: tuple[StripeClientTunnel, ...] = ()
    server_tunnels: tuple[StripeServerTunnel, ...] = ()
    spray_client_tunnels: tuple[SprayClientTunnel, ...] = ()
    spray_server_tunnels: tuple[SprayServerTunnel, ...] = ()
    suite: Literal["aes256gcm", "chacha20poly1305"] = "aes256gcm"
    log: LogSettings = LogSettings()
    control_socket: str = ""
    metrics_listen: Address | None = None
    drain_timeout_s: float = 30.0
    user: str | None = None
    group: str | None = None
    pin: bool = False

    @property
    def spray_tunnels(self) -> tuple[SprayClientTunnel, ...] | tuple[SprayServerTunnel, ...]:
        """The spray tunnels of this role."""
        return self.spray_client_tunnels or self.spray_server_tunnels

    @property
    def tunnels(self) -> tuple[Tunnel, ...]:
        """Every tunnel, in the file's order."""
        found: tuple[Tunnel, ...] = (*self.client_tunnels, *self.server_tunnels, *self.spray_tunnels)
        return tuple(sorted(found, key=lambda tunnel: tunnel.index))
