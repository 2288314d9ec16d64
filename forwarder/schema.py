"""The shape of a configuration file: its tables and keys, and for every key the words that say what it may hold.

A key's `Meta.description` (or its class's `expected`) completes the sentence "expected ..., found ...". Defaults that
workers need live in `workers.settings`; None here means that the key is absent.
"""

import math
from typing import Annotated, ClassVar, Literal, Self

from msgspec import Meta, Struct

from forwarder.units import (
    address_family,
    format_size,
    format_time,
    parse_endpoint,
    parse_host,
    parse_size,
    parse_time,
)


class Mistake(ValueError):
    """A mistake that concerns a table as a whole; `key` is the key in that table which it is reported at."""

    def __init__(self, key: str, expected: str, found: str) -> None:
        super().__init__(key, expected, found)
        self.key, self.expected, self.found = key, expected, found


class Text(str):
    """A string with a notation of its own."""

    expected: ClassVar[str]

    @classmethod
    def parse(cls, raw: object) -> Self:
        """The value as it will be used; ValueError if it is not one."""
        if not isinstance(raw, str):
            raise ValueError("not a string")
        return cls(cls.normal(raw))

    @staticmethod
    def normal(raw: str) -> str:
        """The notation's usual form."""
        raise NotImplementedError


class Host(Text):
    """A host name or an address, without brackets."""

    expected = "a host name, an IPv4 or an IPv6 address"

    @staticmethod
    def normal(raw: str) -> str:
        """The name or the address in its usual form."""
        return parse_host(raw)


class SourceAddress(Text):
    """An address of this host."""

    expected = "an IPv4 or IPv6 address of this host"

    @staticmethod
    def normal(raw: str) -> str:
        """The address in its usual form."""
        if not address_family(raw):
            raise ValueError("not an address")
        return parse_host(raw)


class Several(tuple[Text, ...]):
    """One value, or an array of different ones."""

    kind: ClassVar[type[Text]]
    expected: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.expected = f"{cls.kind.expected}, or an array of such"

    @classmethod
    def parse(cls, raw: object) -> Self:
        """The values as they will be used; ValueError if one is none, or there twice."""
        values = cls(cls.kind.parse(each) for each in (raw if isinstance(raw, list) else [raw]))
        if not values or len(set(values)) < len(values):
            raise ValueError("nothing, or twice the same")
        return values


class Hosts(Several):
    """The server's addresses."""

    kind = Host


class SourceAddresses(Several):
    """Addresses of this host."""

    kind = SourceAddress


class Stripes(int):
    """How many stripes; AUTO: as many as make the tunnel faster."""

    AUTO: ClassVar[int] = 0
    MAX: ClassVar[int] = 4096
    expected: ClassVar[str] = f'a number from 1 to {MAX}, or "auto"'

    @classmethod
    def parse(cls, raw: object) -> Self:
        """The number; ValueError if it is not one or out of range."""
        if raw == "auto":
            return cls(cls.AUTO)
        if isinstance(raw, bool) or not isinstance(raw, int) or not 1 <= raw <= cls.MAX:
            raise ValueError("not a number of stripes")
        return cls(raw)


class Endpoint(Text):
    """A host and a port; always reads back through `parse_endpoint`."""

    expected = 'a host and a port, such as "127.0.0.1:8080", "[::]:8080" or "name:8080"'

    @staticmethod
    def normal(raw: str) -> str:
        """The notation as it stands, once it is known to be one."""
        parse_endpoint(raw)
        return raw


class Size(int):
    """Bytes, within `low` and `high`."""

    low: ClassVar[int]
    high: ClassVar[int]
    expected: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.expected = f'a size from "{format_size(cls.low)}" to "{format_size(cls.high)}"'

    @classmethod
    def parse(cls, raw: object) -> Self:
        """Bytes of a notation; ValueError if it is not one or out of range."""
        size_bytes = parse_size(raw)
        if not cls.low <= size_bytes <= cls.high:
            raise ValueError("out of range")
        return cls(size_bytes)


class WindowSize(Size):
    """A stream's largest window. Credit starts at 16 KiB, so less makes no sense."""

    low, high = 16 << 10, 1 << 30


class FrameSize(Size):
    """A frame's largest payload."""

    low, high = 4 << 10, 256 << 10


class Time(float):
    """Seconds, within `low` and `high`."""

    low: ClassVar[float] = 0.001
    high: ClassVar[float] = 7 * 86400.0
    expected: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.expected = (
            f'a time from "{format_time(cls.low)}" to "{format_time(cls.high)}", such as "250ms", "10s" or "5m"'
        )

    @classmethod
    def parse(cls, raw: object) -> Self:
        """Seconds of a notation; ValueError if it is not one or out of range."""
        time_s = parse_time(raw)
        if not cls.low <= time_s <= cls.high:
            raise ValueError("out of range")
        return cls(time_s)


class Timeout(Time):
    """A time that has to pass."""


class Grace(Time):
    """A time that may be none at all."""

    low = 0.0


Name = Annotated[
    str,
    Meta(
        pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z",
        description="1 to 64 letters, digits, dots, dashes and underscores that start with a letter or digit",
    ),
]
Path = Annotated[str, Meta(pattern=r"\A[^\0]+\Z", description="a path")]
Port = Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")]
Workers = Annotated[int, Meta(ge=0, le=64, description="a number from 0 to 64 (0: one per usable core)")]
DialRate = Annotated[float, Meta(ge=0.1, le=100000, description="a number of dials a second from 0.1 to 100000")]
Count = Annotated[int, Meta(ge=1, le=1 << 20, description="a number from 1 to 1048576")]
Congestion = Annotated[
    str, Meta(pattern=r"\A[a-z0-9_-]{1,15}\Z", description='the name of a congestion control, such as "bbr" or "cubic"')
]
Mode = Annotated[Literal["stripe"], Meta(description='"stripe"')]
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


class Tunnel(Table, frozen=True, kw_only=True):
    """What both ends of a stripe tunnel may say."""

    name: Name
    mode: Mode
    host_port: Port
    window_max: WindowSize | None = None
    frame_max: FrameSize | None = None
    resume_timeout: Grace | None = None
    connect_timeout: Timeout | None = None
    congestion: Congestion | None = None


class ClientTunnel(Tunnel, frozen=True, kw_only=True):
    """`[[tunnel]]` at a client."""

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
        sources = self.source or ()
        for number in range(math.lcm(len(self.host), len(sources) or 1)):
            family = address_family(self.host[number % len(self.host)])
            source = sources[number % len(sources)] if sources else None
            if family and source is not None and address_family(source) != family:
                raise Mistake("source", f"an IPv{family} address, as host is one", f'"{source}"')


class ServerTunnel(Tunnel, frozen=True, kw_only=True):
    """`[[tunnel]]` at a server."""

    listen: Host | None = None
    remote_port: Port | None = None
    remote: Endpoint | None = None
    handshake_timeout: Timeout | None = None
    max_sessions: Count | None = None
    max_streams: Count | None = None

    def __post_init__(self) -> None:
        self.only_one_of("remote_port", "remote")


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
