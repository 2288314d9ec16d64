"""The notations of a configuration file as the types of its keys.

Each has `parse`, which msgspec calls by way of `forwarder.document`, and `expected`, which completes the sentence
"expected ..., found ...".
"""

from typing import ClassVar, Self

from forwarder.units import (
    PORTS_MAX,
    PortMistake,
    address_family,
    format_size,
    format_time,
    parse_endpoint,
    parse_host,
    parse_ports,
    parse_size,
    parse_time,
)


class Mistake(ValueError):
    """A mistake that a type alone does not tell; `key` is the key in the table at hand, None: the value itself."""

    def __init__(self, key: str | None, expected: str, found: str) -> None:
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


class Ports(tuple[int, ...]):
    """Ports, ascending."""

    expected: ClassVar[str] = (
        f'ports such as "80,443,10000-10005": from 1 to 65535, each once, ranges upwards, at most {PORTS_MAX}'
    )

    @classmethod
    def parse(cls, raw: object) -> Self:
        """The ports of a list; ValueError if it is not one, Mistake if it breaks a rule."""
        if not isinstance(raw, str):
            raise ValueError("not a string")
        try:
            return cls(parse_ports(raw))
        except PortMistake as mistake:
            raise Mistake(None, cls.expected, str(mistake)) from mistake


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


class CaptureSize(Size):
    """A capture file's largest size: one record of a run has to fit in."""

    low, high = 1 << 20, 1 << 40


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


class Duration(Time):
    """How long nothing may come before it is over: less than a second would be a flood of new conversations."""

    low = 1.0


class Interval(Time):
    """How often something is sent unasked."""

    low = 0.1
