"""`forwarder convert`: the configuration file of one of two predecessors -> TOML that says the same, as far as it goes.

    mtcp    {"host": "server", "host_port": "8868", "remote_port": "7070", "local_port": "8123", "somaxconn": 10}
    rsock   {"param": {"taddr": "127.0.0.1:9999", "ports": "10000-10005", ...}, "daemon": 1, "log": "rsock.log"}

In order: the text becomes one JSON object; the program is told by its keys; each key becomes a line, or a note where
there is no equivalent. Values are strings or numbers, as both programs take them.
"""

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import toml

from forwarder.document import convert, parse, read_text, shown
from forwarder.errors import ConfigError
from forwarder.starter import KEY_ID, Role
from forwarder.units import PortMistake, format_ports, format_time, parse_endpoint, parse_host, parse_ports
from forwarder.values import Ports, Stripes

MTCP_KEYS = ("host", "host_port", "remote_port", "local_port", "somaxconn")
RSOCK_KEYS = ("param", "daemon", "verbose", "log")
RSOCK_PARAM_KEYS = (
    *("taddr", "ludp", "dev", "lcapIp", "ports", "duration", "keepalive", "type"),
    *("hash", "cap_timeout", "unPath"),
)
_BOTH = f"the keys of mtcp ({', '.join(MTCP_KEYS)}) or those of rsock (param)"


class Line(NamedTuple):
    """`key = value`, and the comment above it."""

    key: str
    value: Any
    comment: str = ""


@dataclass(slots=True)
class Conversion:
    """A converted file. notes: what has no equivalent or is not quite the same, one line each."""

    program: str
    role: Role
    log: list[Line] = field(default_factory=list)
    tunnel: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert_file(file: Path, role: Role | None, key_id: str = KEY_ID) -> tuple[str, list[str]]:
    """The TOML, and a line about each thing that is not the same there. Raises ConfigError with the first mistake.

    role: of whom; rsock's files say it themselves, mtcp's are the client's if nothing else is asked for.
    """
    given = _read(file)
    source = _Source(file, given)
    if "param" in given:
        done = _from_rsock(source, role)
    elif any(key in given for key in MTCP_KEYS):
        done = _from_mtcp(source, role)
    else:
        keys = ", ".join(shown(key) for key in list(given)[:5])
        raise ConfigError(f"{file}: expected {_BOTH}, found {keys or 'an empty object'}")
    _note_the_key(done, key_id)
    text = _toml(done, key_id)
    convert(file, parse(file, text))  # a value that passed so far and is none here, such as a device's name
    return text, done.notes


# The text -> one JSON object


def _read(file: Path) -> dict[str, Any]:
    text = read_text(file).removeprefix("\N{BOM}")
    try:
        document = json.loads(text, object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        raise ConfigError.syntax(file, error.lineno, f"expected JSON, found: {error.msg.lower()}") from error
    except _Twice as error:
        raise ConfigError(f"{file}: expected every key once, found {shown(str(error))} twice") from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{file}: expected {_BOTH}, found what no such file holds") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{file}: expected an object with {_BOTH}, found {_shown(document)}")
    return document


class _Twice(Exception):
    """A key that an object has twice."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Twice(key)
        result[key] = value
    return result


class _Source:
    """The file's values, checked one by one; every mistake names file and key."""

    def __init__(self, file: Path, table: Mapping[str, Any], prefix: str = "") -> None:
        self._file, self._table, self._prefix = file, table, prefix

    def __contains__(self, key: str) -> bool:
        return self._table.get(key) not in (None, "")

    def below(self, key: str) -> "_Source":
        """The object that `key` holds."""
        if not isinstance(self._table[key], dict):
            raise self.mistake(key, "an object")
        return _Source(self._file, self._table[key], f"{self._prefix}{key}.")

    def mistake(self, key: str, expected: str, found: str | None = None) -> ConfigError:
        """The error about a key's value."""
        found = found or (_shown(self._table[key]) if key in self._table else "nothing")
        return ConfigError.mistake(self._file, self._prefix + key, expected, found)

    def text(self, key: str, expected: str) -> str:
        """A string or a number, as a string."""
        value = self._table.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
            raise self.mistake(key, expected)
        return str(value).strip()

    def number(self, key: str, expected: str, low: int, high: int | None = None) -> int:
        """A whole number, also as a string of digits."""
        text = self.text(key, expected)
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise self.mistake(key, expected)
        number = int(text)
        if number < low or (high is not None and number > high):
            raise self.mistake(key, expected)
        return number

    def port(self, key: str) -> int:
        return self.number(key, "a port from 1 to 65535", 1, 65535)

    def parsed(self, key: str, expected: str, parse: Callable[[str], Any]) -> Any:
        """What `parse` makes of it, which raises ValueError for what it does not take."""
        try:
            return parse(self.text(key, expected))
        except PortMistake as mistake:
            raise self.mistake(key, expected, str(mistake)) from mistake
        except ValueError:
            raise self.mistake(key, expected) from None

    def switch(self, key: str) -> bool:
        """True, false or a number; absent is false."""
        value = self._table.get(key, False)
        if not isinstance(value, bool | int) and value not in ("0", "1"):
            raise self.mistake(key, "true, false, 0 or 1")
        return bool(int(value))

    def one_of(self, key: str, *choices: str) -> str:
        expected = " or ".join(", ".join(f'"{choice}"' for choice in choices).rsplit(", ", 1))
        text = self.text(key, expected)
        if text not in choices:
            raise self.mistake(key, expected)
        return text

    def unknown(self, known: tuple[str, ...]) -> list[str]:
        return [self._prefix + key for key in self._table if key not in known]


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return "an object" if isinstance(value, dict) else shown(value)


# mtcp


def _from_mtcp(source: _Source, role: Role | None) -> Conversion:
    """Every key is required there, so it is here: for either role the whole file is checked."""
    done = Conversion("mtcp", role or "client")
    host = source.parsed("host", "a host name, an IPv4 or an IPv6 address", parse_host)
    host_port, remote_port, local_port = (source.port(key) for key in ("host_port", "remote_port", "local_port"))
    somaxconn = source.number("somaxconn", "a number from 1", 1)
    if role is None:
        done.notes.append("role: both ends of mtcp read this file; this is the client, --role server makes the other")
    done.tunnel += [Line("name", "mtcp", "The same name at both ends."), Line("mode", "stripe")]
    if done.role == "client":
        done.tunnel += [Line("host", host), Line("host_port", host_port)]
        everywhere = "As mtcp had it, for every host that reaches this one. For this host alone: local_port ="
        done.tunnel.append(Line("local", f"[::]:{local_port}", f"{everywhere} {local_port}"))
        stripes = min(somaxconn, Stripes.MAX)
        shared = "TCP connections to the server, which all connections share; mtcp opened as many for each of them."
        done.tunnel.append(Line("somaxconn", stripes, shared))
        done.notes += [
            f"local_port: on all addresses, as mtcp had it; local_port = {local_port} would be 127.0.0.1 alone",
            "somaxconn: was for each connection, is shared by all connections now",
        ]
        if stripes < somaxconn:
            done.notes.append(f"somaxconn: {somaxconn} is more than there may be, {stripes} are shared by all")
        done.notes.append("remote_port: stands in the server's file alone")
    else:
        done.tunnel.append(Line("host_port", host_port))
        done.tunnel.append(Line("remote_port", remote_port, "On 127.0.0.1, as with mtcp."))
        done.notes.append("host, local_port, somaxconn: stand in the client's file alone")
    done.notes += [f"{key}: not known, left out" for key in source.unknown(MTCP_KEYS)]
    return done


# rsock


def _from_rsock(source: _Source, role: Role | None) -> Conversion:
    param = source.below("param")
    found: Role = "client" if "ludp" in param else "server"
    if role not in (None, found):
        why = "with param.ludp" if found == "client" else "without param.ludp"
        raise param.mistake("ludp", f"a {role}'s file", f"a {found}'s ({why})")
    done = Conversion("rsock", found)
    done.tunnel += [Line("name", "rsock", "The same name at both ends."), Line("mode", "spray")]
    ports = param.parsed("ports", Ports.expected, parse_ports) if "ports" in param else tuple(range(10001, 10011))
    endpoint = 'an address and a port, such as "127.0.0.1:9999"'
    if done.role == "client":
        host = param.parsed("taddr", "the server's address, without a port (param.ludp: a client's file)", parse_host)
        ludp = param.parsed("ludp", endpoint, parse_endpoint)
        done.tunnel += [Line("host", host), Line("ports", format_ports(ports)), Line("ludp", _joined(*ludp))]
    else:
        taddr = param.parsed("taddr", f"{endpoint} (without param.ludp: a server's file)", parse_endpoint)
        done.tunnel += [Line("ports", format_ports(ports)), Line("taddr", _joined(*taddr))]
    _convert_ways(param, done)
    _convert_running(source, done)
    _note_what_is_gone(param, done)
    done.notes += [
        f"{key}: not known, left out" for key in source.unknown(RSOCK_KEYS) + param.unknown(RSOCK_PARAM_KEYS)
    ]
    return done


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _convert_ways(param: _Source, done: Conversion) -> None:
    """How ports look and where they are; rsock's defaults are written out where ours are others."""
    done.tunnel.append(Line("type", param.one_of("type", "tcp", "udp", "all") if "type" in param else "tcp"))
    if "dev" in param:
        done.tunnel.append(Line("dev", param.text("dev", "the name of a network device")))
    if "lcapIp" in param:
        address = param.parsed("lcapIp", "an IPv4 or IPv6 address of this host", parse_host)
        key = "source" if done.role == "client" else "listen"
        done.tunnel.append(Line(key, address, "Was lcapIp."))
    seconds = "a number of seconds from 10 to 6000"
    duration = param.number("duration", seconds, 10, 6000) if "duration" in param else 600
    keepalive = param.number("keepalive", "a number of seconds from 1", 1, 604800) if "keepalive" in param else 4
    done.tunnel += [Line("duration", format_time(duration)), Line("keepalive", format_time(keepalive))]


def _convert_running(source: _Source, done: Conversion) -> None:
    """How the program runs: in the background unless told otherwise, with a log file then."""
    if source.switch("verbose"):
        done.log.append(Line("level", "debug", "Was verbose."))
    if "log" in source:
        done.log.append(Line("file", source.text("log", "a path")))
    if "daemon" not in source or source.switch("daemon"):
        done.notes.append("daemon: is an option of the command now, forwarder start --daemon -c FILE, or systemd's")
        if "log" not in source:
            done.log.append(Line("file", "/var/log/rsock/rsock.log", "rsock's default; --daemon needs one."))


def _note_what_is_gone(param: _Source, done: Conversion) -> None:
    gone = {
        "hash": "authenticated nobody, and its default was everybody's; a key takes its place",
        "cap_timeout": "nothing waits for a capture any more",
        "unPath": "no equivalent; [control] socket is where status and stop reach an instance",
    }
    done.notes += [f"param.{key}: {why}" for key, why in gone.items() if key in param]


# What both had not: a key. And then the text.


def _note_the_key(done: Conversion, key_id: str) -> None:
    made = f"(umask 077; forwarder genkey > {key_id}.key)"
    done.notes.append(
        f"key: {done.program} had none, and none starts without: put the same key into {key_id}.key beside the file "
        f"at both ends, made once with {made}"
    )


def _toml(done: Conversion, key_id: str) -> str:
    head = [f"# forwarder, {done.role}: converted from a file of {done.program}.", "#", "# Not the same as there:"]
    for note in done.notes:
        head += textwrap.wrap(note, 116, initial_indent="# - ", subsequent_indent="#   ", break_on_hyphens=False)
    parts = [_block(head), _block([], [Line("role", done.role)])]
    table = "[auth]" if done.role == "client" else "[[client]]"
    parts.append(_block([table], [Line("key_id", key_id), Line("key_file", f"{key_id}.key")]))
    if done.log:
        parts.append(_block(["[log]"], done.log))
    parts.append(_block(["[[tunnel]]"], done.tunnel))
    return "\n".join(parts)


def _block(head: list[str], lines: list[Line] | None = None) -> str:
    text = "".join(f"{line}\n" for line in head)
    for line in lines or ():
        comment = f"# {line.comment}\n" if line.comment else ""
        text += comment + toml.dumps({line.key: line.value})
    return text
