"""The shape of a configuration file: its tables and keys, and for every key the words that say what it may hold.

A key's `Meta.description` (or its class's `expected`) completes the sentence "expected ..., found ...". Defaults that
workers need live in `workers.settings`; None here means that the key is absent. A `[[tunnel]]` is told by its `mode`,
which is no field of its table but the table's tag.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from forwarder.units import address_family
from forwarder.values import (
    CaptureSize,
    Duration,
    Endpoint,
    FrameSize,
    Grace,
    Host,
    Hosts,
    Interval,
    Mistake,
    Ports,
    SourceAddresses,
    Stripes,
    Timeout,
    WindowSize,
)

Name = Annotated[
    str,
    Meta(
        pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z",
        description="1 to 64 letters, digits, dots, dashes and underscores that start with a letter or digit",
    ),
]
Path = Annotated[str, Meta(pattern=r"\A[^\0]+\Z", description="a path")]
CaptureFile = Annotated[str, Meta(pattern=r"\A(?!(?s:.*/)?\.{0,2}\Z)[^\0]+\Z", description="the path of a file")]
Port = Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")]
Workers = Annotated[int, Meta(ge=0, le=64, description="a number from 0 to 64 (0: one per usable core)")]
DialRate = Annotated[float, Meta(ge=0.1, le=100000, description="a number of dials a second from 0.1 to 100000")]
Count = Annotated[int, Meta(ge=1, le=1 << 20, description="a number from 1 to 1048576")]
Congestion = Annotated[
    str, Meta(pattern=r"\A[a-z0-9_-]{1,15}\Z", description='the name of a congestion control, such as "bbr" or "cubic"')
]
Mode = Annotated[Literal["stripe", "spray"], Meta(description='"stripe" or "spray"')]
PortType = Annotated[Literal["tcp", "udp", "all"], Meta(description='"tcp", "udp" or "all"')]
Backend = Annotated[Literal["packet", "pcap"], Meta(description='"packet" or "pcap"')]
Device = Annotated[
    str,
    Meta(
        pattern=r"\A(?!\.{1,2}\Z)[!-.0-9;-~]{1,15}\Z",
        description="the name of a network device: 1 to 15 characters, without spaces, slashes and colons",
    ),
]
Copies = Annotated[int, Meta(ge=1, le=2, description="1 or 2")]
Mtu = Annotated[int, Meta(ge=576, le=65535, description="the bytes of a packet, from 576 to 65535")]
Suite = Annotated[Literal["aes256gcm", "chacha20poly1305"], Meta(description='"aes256gcm" or "chacha20poly1305"')]
Role = Annotated[Literal["client", "server"], Meta(description='"client" or "server"')]
Flag = Annotated[bool, Meta(description="true or false")]
Account = Annotated[str, Meta(min_length=1, description="a name")]
Secret = Annotated[str, Meta(description="32 bytes in base64")]


class Table(Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A table: a key that it does not list is a mistake."""

    def only_one_of(self, first: str, second: str) -> None:
        """Two spellings of one thing: Mistake if both are there, or neither."""
        given = [key for key in (first, second) if getattr(self, key) is not None]
        if len(given) == 2:
            raise Mistake(second, f"only one of {first} and {second}", "both")
        if not given:
            raise Mistake(first, f"{first} or {second}", "neither")


class Auth(Table, frozen=True, kw_only=True):
    """`[auth]`, and the part of `[[client]]` that is the same: a key and its name."""

    key_id: Name
    key_file: Path | None = None
    key: Secret | None = None

    def __post_init__(self) -> None:
        self.only_one_of("key_file", "key")


class ClientKey(Auth, frozen=True, kw_only=True):
    """`[[client]]` at a server."""

    tunnels: (
        Annotated[list[Name], Meta(min_length=1, description="names of tunnels (without this key: all of them)")] | None
    ) = None


class Control(Table, frozen=True, kw_only=True):
    """`[control]`."""

    socket: Path | None = None


class Metrics(Table, frozen=True, kw_only=True):
    """`[metrics]`."""

    listen: Endpoint


class Log(Table, frozen=True, kw_only=True):
    """`[log]`."""

    level: (
        Annotated[
            Literal["debug", "info", "warning", "error"], Meta(description='"debug", "info", "warning" or "error"')
        ]
        | None
    ) = None
    format: Annotated[Literal["text", "json"], Meta(description='"text" or "json"')] | None = None
    file: Path | None = None


class StripeTable(Table, frozen=True, kw_only=True, tag_field="mode", tag="stripe"):
    """What both ends of a stripe tunnel may say."""

    name: Name
    host_port: Port
    window_max: WindowSize | None = None
    frame_max: FrameSize | None = None
    resume_timeout: Grace | None = None
    connect_timeout: Timeout | None = None
    congestion: Congestion | None = None


class StripeClientTable(StripeTable, frozen=True, kw_only=True):
    """`[[tunnel]]` of mode stripe at a client."""

    host: Hosts
    local_port: Port | None = None
    local: Endpoint | None = None
    somaxconn: Stripes | None = None
    source: SourceAddresses | None = None
    idle_timeout: Timeout | None = None
    dial_rate: DialRate | None = None
    rotate_after: Timeout | None = None

    def __post_init__(self) -> None:
        self.only_one_of("local_port", "local")
        check_sources(self.host, self.source or ())


class StripeServerTable(StripeTable, frozen=True, kw_only=True):
    """`[[tunnel]]` of mode stripe at a server."""

    listen: Host | None = None
    remote_port: Port | None = None
    remote: Endpoint | None = None
    handshake_timeout: Timeout | None = None
    max_sessions: Count | None = None
    max_streams: Count | None = None

    def __post_init__(self) -> None:
        self.only_one_of("remote_port", "remote")


class SprayTable(Table, frozen=True, kw_only=True, tag_field="mode", tag="spray"):
    """What both ends of a spray tunnel may say."""

    name: Name
    ports: Ports
    type: PortType | None = None
    dev: Device | None = None
    backend: Backend | None = None
    duration: Duration | None = None
    keepalive: Interval | None = None
    copies: Copies | None = None
    mtu: Mtu | None = None
    capture: CaptureFile | None = None
    capture_max: CaptureSize | None = None


class SprayClientTable(SprayTable, frozen=True, kw_only=True):
    """`[[tunnel]]` of mode spray at a client."""

    host: Hosts
    ludp: Endpoint
    source: SourceAddresses | None = None
    dial_rate: DialRate | None = None
    rotate_after: Timeout | None = None

    def __post_init__(self) -> None:
        check_sources(self.host, self.source or ())


class SprayServerTable(SprayTable, frozen=True, kw_only=True):
    """`[[tunnel]]` of mode spray at a server."""

    listen: Host | None = None
    taddr: Endpoint
    max_sessions: Count | None = None
    max_conversations: Count | None = None


ClientTunnel = StripeClientTable | SprayClientTable
ServerTunnel = StripeServerTable | SprayServerTable


def check_sources(hosts: Sequence[str], sources: Sequence[str]) -> None:
    """Both are gone through in turn: Mistake if an address would have to be reached from one of the other family."""
    for number in range(math.lcm(len(hosts), len(sources)) if sources else 0):
        family = address_family(hosts[number % len(hosts)])
        source = sources[number % len(sources)]
        if family and address_family(source) != family:
            raise Mistake("source", f"an IPv{family} address, as host is one", f'"{source}"')


class File(Table, frozen=True, kw_only=True):
    """The keys and tables of both roles."""

    role: Role
    workers: Workers = 0
    suite: Suite | None = None
    drain_timeout: Grace | None = None
    user: Account | None = None
    group: Account | None = None
    pin: Flag | None = None
    control: Annotated[Control, Meta(description="a table [control]")] = Control()
    metrics: Annotated[Metrics, Meta(description="a table [metrics]")] | None = None
    log: Annotated[Log, Meta(description="a table [log]")] = Log()


class ClientFile(File, frozen=True, kw_only=True):
    """A client's file."""

    auth: Annotated[Auth, Meta(description="a table [auth] with key_id and key_file")]
    tunnel: Annotated[list[ClientTunnel], Meta(min_length=1, description="at least one [[tunnel]]")]


class ServerFile(File, frozen=True, kw_only=True):
    """A server's file."""

    client: Annotated[
        list[ClientKey],
        Meta(min_length=1, description="at least one [[client]] with its key (no server runs without)"),
    ]
    tunnel: Annotated[list[ServerTunnel], Meta(min_length=1, description="at least one [[tunnel]]")]
