"""A configuration file and the key file beside it: Settings, or one ConfigError of one line."""

import base64
import io
from pathlib import Path
from typing import Any
from unittest import mock

from forwarder import config, keys
from forwarder.errors import ConfigError
from tests.fuzz.source import Source

KEY_TEXT = base64.b64encode(bytes(range(32)))
LINE_MAX = 4096


class File(type(Path())):  # type: ignore[misc]
    """A path whose files are in memory: the configuration itself, and any other is the key file."""

    contents: tuple[bytes, bytes] = (b"", b"")

    def open(self, *_arguments: Any, **_options: Any) -> Any:
        """What `document` and `keys` read."""
        return io.BytesIO(self.contents[self.name != "instance.toml"])


def run(data: bytes) -> None:
    """First byte: flags and the length of the key file; then key file and TOML."""
    source = Source(data)
    exposed = source.flag()
    key_file = source.block() if source.flag() else KEY_TEXT + b"\n"
    file = File("/etc/forwarder/instance.toml")
    File.contents = (source.rest(), key_file)
    with mock.patch.object(keys, "is_exposed", lambda _file: exposed):
        loaded = _load(file)
        _find(file, loaded)


def _load(file: Path) -> config.Loaded | None:
    try:
        loaded = config.load(file)
    except ConfigError as error:
        _check_line(str(error))
        return None
    settings = loaded.settings
    assert settings.keys and all(len(key.secret) == keys.KEY_BYTES for key in settings.keys)
    assert settings.workers >= 1 and settings.tunnels
    for warning in loaded.warnings:
        _check_line(warning)
    return loaded


def _check_line(text: str) -> None:
    assert "\n" not in text and len(text) <= LINE_MAX, "not one short line"
    assert KEY_TEXT.decode() not in text, "a key in a message"


def _find(file: Path, loaded: config.Loaded | None) -> None:
    """What `stop` needs is found in every file that loads, and the same is found."""
    try:
        instance = config.find_instance(file)
    except ConfigError as error:
        assert loaded is None
        _check_line(str(error))
        return
    if loaded is not None:
        assert str(instance.control_socket) == loaded.settings.control_socket
        assert instance.drain_timeout_s == loaded.settings.drain_timeout_s


CLIENT = b"""role = "client"
workers = 2
drain_timeout = "10s"
[auth]
key_id = "laptop"
key_file = "laptop.key"
[control]
socket = "c.sock"
[metrics]
listen = "127.0.0.1:9464"
[log]
level = "info"
[[tunnel]]
name = "web"
mode = "stripe"
host = "server.example.net"
host_port = 9000
local_port = 8080
somaxconn = 10
window_max = "8MiB"
[[tunnel]]
name = "ssh"
mode = "stripe"
host = "2001:db8::1"
host_port = 9001
local = "[::1]:8081"
source = "2001:db8::2"
dial_rate = 0.5
"""
SERVER = b"""role = "server"
user = "0"
[[client]]
key_id = "laptop"
key = "%s"
tunnels = ["web"]
[[client]]
key_id = "phone"
key_file = "phone.key"
[[tunnel]]
name = "web"
mode = "stripe"
listen = "0.0.0.0"
host_port = 9000
remote = "10.0.0.5:80"
max_sessions = 5
"""
INLINE = SERVER % KEY_TEXT
SPRAY_CLIENT = (
    CLIENT
    + b"""[[tunnel]]
name = "kcp"
mode = "spray"
host = "server.example.net"
ports = "80,443,10000-10005"
type = "all"
ludp = "127.0.0.1:30000"
dev = "eth0"
"""
)
SPRAY_SERVER = (
    INLINE
    + b"""[[tunnel]]
name = "kcp"
mode = "spray"
ports = "80,443,10000-10005"
taddr = "127.0.0.1:9999"
backend = "pcap"
duration = "5m"
"""
)
SEEDS = {
    "client": b"\0\0" + CLIENT,
    "server": b"\1\0" + INLINE,
    "key-file-short": b"\0\1\4abcd" + CLIENT,
    "key-file-empty": b"\0\1\0" + CLIENT,
    "unknown-key": b"\0\0" + CLIENT.replace(b"somaxconn", b"somaxcon"),
    "other-roles-key": b"\0\0" + CLIENT.replace(b"local_port", b"remote_port"),
    "missing-key": b"\0\0" + CLIENT.replace(b"host_port = 9000\n", b""),
    "wrong-type": b"\0\0" + CLIENT.replace(b"9000", b"{x = [1979-05-27]}"),
    "two-tunnels-one-port": b"\0\0" + CLIENT.replace(b"[::1]:8081", b"127.0.0.1:8080"),
    "two-tunnels-one-name": b"\0\0" + CLIENT.replace(b'"ssh"', b'"web"'),
    "both-spellings": b"\0\0" + CLIENT.replace(b"local_port = 8080", b'local_port = 8080\nlocal = "a:1"'),
    "other-mode": b"\0\0" + CLIENT.replace(b'"stripe"', b'"spray"'),
    "spray-client": b"\0\0" + SPRAY_CLIENT,
    "spray-server": b"\1\0" + SPRAY_SERVER,
    "spray-port-twice": b"\0\0" + SPRAY_CLIENT.replace(b"80,443", b"80,443,443"),
    "spray-ports-in-the-way": b"\0\0" + SPRAY_SERVER.replace(b"80,443", b"8999-9001"),
    "two-clients-one-key-id": b"\0\0" + INLINE.replace(b'"phone"', b'"laptop"'),
    "unknown-tunnel": b"\0\0" + INLINE.replace(b'["web"]', b'["web", "other"]'),
    "key-within-a-value": b"\0\0" + INLINE.replace(b"10.0.0.5", b"10.0.0.5" + KEY_TEXT),
    "strange-key": b"\0\0" + b'"a\\nb" = 1\n' + CLIENT,
    "key-for-a-key": b'\0\0"' + KEY_TEXT + b'" = 1\n' + CLIENT,
    "syntax": b"\0\0" + CLIENT.replace(b"[auth]", b"[auth"),
    "deep": b"\0\0x = " + b"[" * 1500,
    "long-number": b"\0\0x = " + b"1" * 3000,
    "not-utf8": b"\0\0" + CLIENT.replace(b"laptop", b"lap\xfftop"),
}
