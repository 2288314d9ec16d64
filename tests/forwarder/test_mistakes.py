"""Every mistake in a configuration file is exit code 78 and one line on standard error."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from forwarder.cli import commands
from tests.forwarder.examples import (
    CLIENT,
    EXAMPLES,
    KEY_TEXT,
    SERVER,
    SPRAY_EXAMPLES,
    SPRAY_TUNNELS,
    second,
    write,
)

TIME = 'expected a time from "1ms" to "168h", such as "250ms", "10s" or "5m"'
GRACE = 'expected a time from "0s" to "168h", such as "250ms", "10s" or "5m"'
PORT = "expected a port from 1 to 65535"
ENDPOINT = 'expected a host and a port, such as "127.0.0.1:8080", "[::]:8080" or "name:8080"'
HOST = "expected a host name, an IPv4 or an IPv6 address"
HOSTS = f"{HOST}, or an array of such"
SOURCES = "expected an IPv4 or IPv6 address of this host, or an array of such"
STRIPES = 'expected a number from 1 to 4096, or "auto", found'
NAME = "expected 1 to 64 letters, digits, dots, dashes and underscores that start with a letter or digit"
KEY = "expected 32 bytes in base64"
TAKEN = "expected a port that no other tunnel listens on, found"
TAKEN_THERE = "expected a port that no other tunnel has at this host, found"
CLIENT_ONLY = "expected a key that a server has, found one that only a client has"
SERVER_ONLY = "expected a key that a client has, found one that only a server has"
STRIPE_ONLY = 'expected a key of mode "spray", found one of mode "stripe"'
SPRAY_ONLY = 'expected a key of mode "stripe", found one of mode "spray"'
BOTH = "expected only one of"
COUNT = "expected a number from 1 to 1048576, found"
WORKERS = "workers: expected a number from 0 to 64 (0: one per usable core), found"
CLIENTS = "client: expected at least one [[client]] with its key (no server runs without), found"
AUTH = "auth: expected a table [auth] with key_id and key_file, found"
UNKNOWN = "found an unknown one"
RATE = "expected a number of dials a second from 0.1 to 100000, found"
WEB = 'tunnel[1] "web"'
KCP = 'tunnel[1] "kcp"'
PORTS = 'expected ports such as "80,443,10000-10005": from 1 to 65535, each once, ranges upwards, at most 4096, found'
DEVICE = "expected the name of a network device: 1 to 15 characters, without spaces, slashes and colons, found"
AUTH_FILE = 'key_file = "laptop.key"'
CLIENT_TABLE = SERVER[SERVER.index("[[client]]") : SERVER.index("[[tunnel]]")]

# (role, what stands in the example, what stands there instead, the line after "ROLE.toml: ")
REPLACED = [
    # The document as a whole
    ("client", 'role = "client"\n', "", 'role: expected "client" or "server", found nothing'),
    ("client", '"client"', '"relay"', 'role: expected "client" or "server", found "relay"'),
    ("client", '"client"', "1", 'role: expected "client" or "server", found 1'),
    ("client", '"client"', "[]", 'role: expected "client" or "server", found an empty array'),
    ("client", '"client"', '"server"', f"auth: {CLIENT_ONLY}"),
    ("server", '"server"', '"client"', f"client: {SERVER_ONLY}"),
    ("client", "[auth]", "wrokers = 2\n[auth]", f'wrokers: expected a known key, such as "workers", {UNKNOWN}'),
    ("client", "[auth]", "zzz = 2\n[auth]", f"zzz: expected a known key, {UNKNOWN}"),
    ("client", "[auth]", '"a\\nb" = 2\n[auth]', f'"a\\nb": expected a known key, {UNKNOWN}'),
    # General keys
    *(
        ("client", "[auth]", f"{line}\n[auth]", message)
        for line, message in [
            ("workers = -1", f"{WORKERS} -1"),
            ("workers = 65", f"{WORKERS} 65"),
            ('workers = "2"', f'{WORKERS} "2"'),
            ("workers = true", f"{WORKERS} true"),
            ("workers = 1.5", f"{WORKERS} 1.5"),
            ('suite = "none"', 'suite: expected "aes256gcm" or "chacha20poly1305", found "none"'),
            ("drain_timeout = 30", f"drain_timeout: {GRACE}, found 30"),
            ('drain_timeout = "30"', f'drain_timeout: {GRACE}, found "30"'),
            ('drain_timeout = "-1s"', f'drain_timeout: {GRACE}, found "-1s"'),
            ('drain_timeout = "169h"', f'drain_timeout: {GRACE}, found "169h"'),
            ("drain_timeout = 2020-01-01", f"drain_timeout: {GRACE}, found a date"),
            ('pin = "no"', 'pin: expected true or false, found "no"'),
            ('user = ""', 'user: expected a name, found ""'),
            ('user = "no such user"', 'user: expected a user of this host, found "no such user"'),
            (r'user = "\u0000"', r'user: expected a user of this host, found "\u0000"'),
            ('group = "no such group"', 'group: expected a group of this host, found "no such group"'),
            ('user = "99999999999999999999"', 'user: expected a user of this host, found "99999999999999999999"'),
            ("control = 1", "control: expected a table [control], found 1"),
            ("[control]\nsocket = 1", "control.socket: expected a path, found 1"),
            (
                f'[control]\nsocket = "/{"x" * 30}/{"y" * 80}"',
                f'control.socket: expected a path of at most 107 bytes, found "/{"x" * 30}/{"y" * 80}"',
            ),
            ("[metrics]", "metrics.listen: " + ENDPOINT + ", found nothing"),
            ("[metrics]\nlisten = 9464", "metrics.listen: " + ENDPOINT + ", found 9464"),
            ('[log]\nlevel = "loud"', 'log.level: expected "debug", "info", "warning" or "error", found "loud"'),
            ('[log]\nformat = "xml"', 'log.format: expected "text" or "json", found "xml"'),
            ("[log]\nfile = true", "log.file: expected a path, found true"),
            ('[log]\nfiel = ""', f'log.fiel: expected a known key, such as "file", {UNKNOWN}'),
        ]
    ),
    # Keys
    ("client", f'[auth]\nkey_id = "laptop"\n{AUTH_FILE}\n', "", f"{AUTH} nothing"),
    ("client", f'[auth]\nkey_id = "laptop"\n{AUTH_FILE}\n', "auth = 1\n", f"{AUTH} 1"),
    ("client", 'key_id = "laptop"\n', "", f"auth.key_id: {NAME}, found nothing"),
    ("client", '"laptop"', '""', f'auth.key_id: {NAME}, found ""'),
    ("client", '"laptop"', '"lap top"', f'auth.key_id: {NAME}, found "lap top"'),
    ("client", '"laptop"', '"laptop\\n"', f'auth.key_id: {NAME}, found "laptop\\n"'),
    ("client", '"laptop"', f'"{KEY_TEXT}"', f"auth.key_id: {NAME}, found 44 characters that are not shown"),
    ("client", AUTH_FILE, "", "auth.key_file: expected key_file or key, found neither"),
    ("client", AUTH_FILE, f'{AUTH_FILE}\nkey = "{KEY_TEXT}"', f"auth.key: {BOTH} key_file and key, found both"),
    ("client", AUTH_FILE, "key_file = 1", "auth.key_file: expected a path, found 1"),
    ("client", AUTH_FILE, "key = 1234", f"auth.key: {KEY}, found a number that is not shown"),
    ("client", AUTH_FILE, 'key = "c2hvcnQ="', f"auth.key: {KEY}, found 5 bytes"),
    ("client", AUTH_FILE, f'key = "{KEY_TEXT[:-1]}"', f"auth.key: {KEY}, found 43 characters that are not base64"),
    ("client", AUTH_FILE, 'key = "äöü"', f"auth.key: {KEY}, found 3 characters that are not base64"),
    ("client", AUTH_FILE, f'kye = "{KEY_TEXT}"', f'auth.kye: expected a known key, such as "key", {UNKNOWN}'),
    ("server", CLIENT_TABLE, "", f"{CLIENTS} nothing"),
    ("server", CLIENT_TABLE, "client = []\n", f"{CLIENTS} an empty array"),
    ("server", "[[client]]", "[client]", f"{CLIENTS} a table"),
    ("server", AUTH_FILE, "", 'client[1] "laptop".key_file: expected key_file or key, found neither'),
    (
        "server",
        "[[tunnel]]",
        f'[[client]]\nkey_id = "laptop"\nkey = "{KEY_TEXT}"\n[[tunnel]]',
        'client[2] "laptop".key_id: expected a key_id of its own, found "laptop" as in client[1]',
    ),
    (
        "server",
        AUTH_FILE,
        f'{AUTH_FILE}\ntunnels = ["web", "wbe"]',
        'client[1] "laptop".tunnels[2]: expected the name of a tunnel ("web"), found "wbe"',
    ),
    ("server", AUTH_FILE, f"{AUTH_FILE}\ntunnels = [1]", f'client[1] "laptop".tunnels[1]: {NAME}, found 1'),
    (
        "server",
        AUTH_FILE,
        f"{AUTH_FILE}\ntunnels = []",
        'client[1] "laptop".tunnels: expected names of tunnels (without this key: all of them), found an empty array',
    ),
    # Tunnels, both ends
    ("client", CLIENT[CLIENT.index("[[tunnel]]") :], "", "tunnel: expected at least one [[tunnel]], found nothing"),
    ("server", SERVER[SERVER.index("[[tunnel]]") :], "", "tunnel: expected at least one [[tunnel]], found nothing"),
    ("client", "[[tunnel]]", "[tunnel]", "tunnel: expected at least one [[tunnel]], found a table"),
    ("client", 'name = "web"\n', "", f"tunnel[1].name: {NAME}, found nothing"),
    ("client", '"web"', '"two words"', f'tunnel[1] "two words".name: {NAME}, found "two words"'),
    ("client", '"web"', f'"{"x" * 65}"', f'tunnel[1] "{"x" * 57}...".name: {NAME}, found "{"x" * 57}..."'),
    ("client", 'mode = "stripe"\n', "", f'{WEB}.mode: expected "stripe" or "spray", found nothing'),
    ("client", '"stripe"', '"strip"', f'{WEB}.mode: expected "stripe" or "spray", found "strip"'),
    ("client", '"stripe"', '["stripe"]', f'{WEB}.mode: expected "stripe" or "spray", found an array'),
    ("client", '"stripe"', '"spray"', f"{WEB}.host_port: {STRIPE_ONLY}"),
    ("server", '"stripe"', '"spray"', f"{WEB}.host_port: {STRIPE_ONLY}"),
    ("client", "host_port", 'ports = "80"\nhost_port', f"{WEB}.ports: {SPRAY_ONLY}"),
    ("client", "host_port", 'taddr = "a:1"\nhost_port', f"{WEB}.taddr: {SPRAY_ONLY}"),
    ("client", CLIENT[CLIENT.index("[auth]") :], "tunnel = [1]\n", "tunnel[1]: expected a table, found 1"),
    ("client", "host_port = 9000\n", "", f"{WEB}.host_port: {PORT}, found nothing"),
    ("client", "9000", "0", f"{WEB}.host_port: {PORT}, found 0"),
    ("client", "9000", "65536", f"{WEB}.host_port: {PORT}, found 65536"),
    ("client", "9000", "-1", f"{WEB}.host_port: {PORT}, found -1"),
    ("client", "9000", '"9000"', f'{WEB}.host_port: {PORT}, found "9000"'),
    ("client", "9000", "9" * 30, f"{WEB}.host_port: {PORT}, found {'9' * 30}"),
    ("server", "9000", "70000", f"{WEB}.host_port: {PORT}, found 70000"),
    *(
        (role, "host_port", f"{line}\nhost_port", f"{WEB}.{message}")
        for role in ("client", "server")
        for line, message in [
            ('window_max = "1KiB"', 'window_max: expected a size from "16KiB" to "1GiB", found "1KiB"'),
            ('window_max = "8MB"', 'window_max: expected a size from "16KiB" to "1GiB", found "8MB"'),
            ("window_max = 1.5", 'window_max: expected a size from "16KiB" to "1GiB", found 1.5'),
            ("frame_max = 262145", 'frame_max: expected a size from "4KiB" to "256KiB", found 262145'),
            ('resume_timeout = "soon"', f'resume_timeout: {GRACE}, found "soon"'),
            ('connect_timeout = "0s"', f'connect_timeout: {TIME}, found "0s"'),
            (
                'congestion = ""',
                'congestion: expected the name of a congestion control, such as "bbr" or "cubic", found ""',
            ),
        ]
    ),
    # Tunnels of a client
    ("client", 'host = "server.example.net"\n', "", f"{WEB}.host: {HOSTS}, found nothing"),
    *(
        ("client", '"server.example.net"', value, f"{WEB}.host: {HOSTS}, found {value}")
        for value in ('""', '"10.0.0.256"', '"server:9000"', '"[10.0.0.1]"', '"http://server/"', '"a..b"', "1")
    ),
    ("client", "local_port = 8080\n", "", f"{WEB}.local_port: expected local_port or local, found neither"),
    ("client", "8080", '8080\nlocal = "[::]:8080"', f"{WEB}.local: {BOTH} local_port and local, found both"),
    *(
        ("client", "local_port = 8080", f"local = {value}", f"{WEB}.local: {ENDPOINT}, found {value}")
        for value in (
            '"8080"',
            '":8080"',
            '"::1:8080"',
            '"[::]"',
            '"localhost:0"',
            '"localhost:65536"',
            '"a b:80"',
            "8080",
        )
    ),
    ("client", "8080", "8080\nsomaxconn = 0", f"{WEB}.somaxconn: {STRIPES} 0"),
    ("client", "8080", "8080\nsomaxconn = 4097", f"{WEB}.somaxconn: {STRIPES} 4097"),
    (
        "client",
        "8080",
        '8080\nsource = "eth0"',
        f'{WEB}.source: {SOURCES}, found "eth0"',
    ),
    (
        "client",
        'server.example.net"',
        '10.0.0.1"\nsource = "::1"',
        f'{WEB}.source: expected an IPv4 address, as host is one, found "::1"',
    ),
    (
        "client",
        '"server.example.net"',
        '["10.0.0.1", "10.0.0.2", "10.0.0.3"]\nsource = ["10.1.0.1", "::1"]',
        f'{WEB}.source: expected an IPv4 address, as host is one, found "::1"',
    ),
    ("client", "8080", "8080\nsource = []", f"{WEB}.source: {SOURCES}, found an empty array"),
    ("client", "8080", '8080\nsource = ["10.0.0.1", 4]', f"{WEB}.source: {SOURCES}, found an array"),
    ("client", "8080", '8080\nsomaxconn = "Auto"', f'{WEB}.somaxconn: {STRIPES} "Auto"'),
    ("client", "8080", "8080\nsomaxconn = true", f"{WEB}.somaxconn: {STRIPES} true"),
    ("client", "8080", '8080\nidle_timeout = ""', f'{WEB}.idle_timeout: {TIME}, found ""'),
    ("client", "8080", "8080\ndial_rate = 0", f"{WEB}.dial_rate: {RATE} 0"),
    ("client", "8080", "8080\ndial_rate = nan", f"{WEB}.dial_rate: {RATE} nan"),
    ("client", "8080", "8080\nrotate_after = 3600", f"{WEB}.rotate_after: {TIME}, found 3600"),
    ("client", "8080", "8080\nremote_port = 80", f"{WEB}.remote_port: {SERVER_ONLY}"),
    # Tunnels of a server
    ("server", "remote_port = 80\n", "", f"{WEB}.remote_port: expected remote_port or remote, found neither"),
    ("server", "= 80\n", '= 80\nremote = "10.0.0.5:80"', f"{WEB}.remote: {BOTH} remote_port and remote, found both"),
    ("server", "remote_port = 80", 'remote = "10.0.0.5"', f'{WEB}.remote: {ENDPOINT}, found "10.0.0.5"'),
    ("server", "host_port", 'listen = "[::]:9000"\nhost_port', f'{WEB}.listen: {HOST}, found "[::]:9000"'),
    ("server", "host_port", "somaxconn = 10\nhost_port", f"{WEB}.somaxconn: {CLIENT_ONLY}"),
    ("server", "host_port", "max_sessions = 0\nhost_port", f"{WEB}.max_sessions: {COUNT} 0"),
    ("server", "host_port", 'max_streams = "1"\nhost_port', f'{WEB}.max_streams: {COUNT} "1"'),
    ("server", "host_port", 'handshake_timeout = "1"\nhost_port', f'{WEB}.handshake_timeout: {TIME}, found "1"'),
]

# As REPLACED, in the examples with a spray tunnel
REPLACED_SPRAY = [
    *(
        (role, '"80,443,10000-10005"', value, f"{KCP}.ports: {PORTS} {found}")
        for role in ("client", "server")
        for value, found in [
            ('""', '""'),
            ("443", "443"),
            ("[80, 443]", "an array"),
            ('"80,"', '"80,"'),
            ('"80, 443"', '"80, 443"'),
            ('"80-"', '"80-"'),
            ('"80-90-100"', '"80-90-100"'),
            ('"http"', '"http"'),
            ('"٣"', '"٣"'),
            ('"0"', '"0"'),
            ('"1,65536"', '"65536"'),
            ('"65000-99999"', '"65000-99999"'),
            ('"80,10005-10000"', '"10005-10000"'),
            ('"80,443,80"', "80 twice"),
            ('"10-20,15-30"', "15 twice"),
            ('"1-4097"', "more than 4096"),
            ('"1-4096,5000"', "more than 4096"),
        ]
    ),
    *(
        (role, "ports", f"{line}\nports", f"{KCP}.{message}")
        for role in ("client", "server")
        for line, message in [
            ('type = "icmp"', 'type: expected "tcp", "udp" or "all", found "icmp"'),
            ('capture = "/"', 'capture: expected the path of a file, found "/"'),
            ('capture = "a/.."', 'capture: expected the path of a file, found "a/.."'),
            ('dev = ""', f'dev: {DEVICE} ""'),
            ('dev = "a/b"', f'dev: {DEVICE} "a/b"'),
            ('dev = "eth0 "', f'dev: {DEVICE} "eth0 "'),
            ('dev = ".."', f'dev: {DEVICE} ".."'),
            ('dev = "abcdefghijklmnop"', f'dev: {DEVICE} "abcdefghijklmnop"'),
            ('backend = "raw"', 'backend: expected "packet" or "pcap", found "raw"'),
            (
                'duration = "999ms"',
                'duration: expected a time from "1s" to "168h", such as "250ms", "10s" or "5m", found "999ms"',
            ),
            (
                'keepalive = "0s"',
                'keepalive: expected a time from "100ms" to "168h", such as "250ms", "10s" or "5m", found "0s"',
            ),
            ("copies = 3", "copies: expected 1 or 2, found 3"),
            ("mtu = 575", "mtu: expected the bytes of a packet, from 576 to 65535, found 575"),
            ('mtu = "1400"', 'mtu: expected the bytes of a packet, from 576 to 65535, found "1400"'),
            ("host_port = 80", f"host_port: {STRIPE_ONLY}"),
            ("somaxconn = 10", f"somaxconn: {STRIPE_ONLY}"),
            ("remote_port = 80", f"remote_port: {STRIPE_ONLY}"),
            ("portz = 80", f'portz: expected a known key, such as "ports", {UNKNOWN}'),
            ('hash = "x"', f"hash: expected a known key, {UNKNOWN}"),
        ]
    ),
    ("client", 'ports = "80,443,10000-10005"\n', "", f"{KCP}.ports: {PORTS} nothing"),
    ("client", 'ludp = "127.0.0.1:30000"\n', "", f"{KCP}.ludp: {ENDPOINT}, found nothing"),
    ("client", '"127.0.0.1:30000"', "30000", f"{KCP}.ludp: {ENDPOINT}, found 30000"),
    ("client", "ludp", 'taddr = "a:1"\nludp', f"{KCP}.taddr: {SERVER_ONLY}"),
    (
        "client",
        '"server.example.net"',
        '"10.0.0.1"\nsource = "::1"',
        f'{KCP}.source: expected an IPv4 address, as host is one, found "::1"',
    ),
    ("client", "ludp", "dial_rate = 0\nludp", f"{KCP}.dial_rate: {RATE} 0"),
    ("server", 'taddr = "127.0.0.1:9999"\n', "", f"{KCP}.taddr: {ENDPOINT}, found nothing"),
    ("server", "taddr", 'ludp = "a:1"\ntaddr', f"{KCP}.ludp: {CLIENT_ONLY}"),
    ("server", "taddr", 'listen = "[::]:80"\ntaddr', f'{KCP}.listen: {HOST}, found "[::]:80"'),
    ("server", "taddr", "max_conversations = 0\ntaddr", f"{KCP}.max_conversations: {COUNT} 0"),
]

# (role, what follows the example, the line after "ROLE.toml: ")
APPENDED = [
    (
        "client",
        second("client", name="web"),
        'tunnel[2] "web".name: expected a name of its own, found "web" as in tunnel[1]',
    ),
    (
        "server",
        second("server", name="web"),
        'tunnel[2] "web".name: expected a name of its own, found "web" as in tunnel[1]',
    ),
    (
        "client",
        second("client", here="local_port = 8080"),
        f'tunnel[2] "ssh".local_port: {TAKEN} 127.0.0.1:8080 beside 127.0.0.1:8080 of {WEB}',
    ),
    (
        "client",
        second("client", here='local = "[::]:8080"'),
        f'tunnel[2] "ssh".local: {TAKEN} [::]:8080 beside 127.0.0.1:8080 of {WEB}',
    ),
    (
        "client",
        second("client", port=9000),
        f'tunnel[2] "ssh".host_port: {TAKEN_THERE} server.example.net:9000 as in {WEB}',
    ),
    ("server", second("server", port=9000), f'tunnel[2] "ssh".host_port: {TAKEN} [::]:9000 beside [::]:9000 of {WEB}'),
    (
        "server",
        second("server", port=9000, listen='"10.0.0.1"'),
        f'tunnel[2] "ssh".host_port: {TAKEN} 10.0.0.1:9000 beside [::]:9000 of {WEB}',
    ),
    ("server", second("server", port=0), f'tunnel[2] "ssh".host_port: {PORT}, found 0'),
    (
        "client",
        SPRAY_TUNNELS["client"].replace('"kcp"', '"web"'),
        'tunnel[2] "web".name: expected a name of its own, found "web" as in tunnel[1]',
    ),
    (
        "client",
        SPRAY_TUNNELS["client"].replace("80,443", "8990-9010"),
        f'tunnel[2] "kcp".ports: {TAKEN_THERE} server.example.net:9000 as in {WEB}',
    ),
    (
        "client",
        SPRAY_TUNNELS["client"] + SPRAY_TUNNELS["client"].replace('"kcp"', '"dns"').replace("server.", "other."),
        f'tunnel[3] "dns".ludp: {TAKEN} 127.0.0.1:30000 beside 127.0.0.1:30000 of tunnel[2] "kcp"',
    ),
    (
        "client",
        SPRAY_TUNNELS["client"] + SPRAY_TUNNELS["client"].replace('"kcp"', '"dns"').replace("30000", "30001"),
        f'tunnel[3] "dns".ports: {TAKEN_THERE} server.example.net:80 as in tunnel[2] "kcp"',
    ),
    (
        "server",
        SPRAY_TUNNELS["server"].replace("80,443", "9000"),
        f'tunnel[2] "kcp".ports: {TAKEN} [::]:9000 beside [::]:9000 of {WEB}',
    ),
    (
        "server",
        SPRAY_TUNNELS["server"] + second("server", port=10003),
        f'tunnel[3] "ssh".host_port: {TAKEN} [::]:10003 beside [::]:10003 of tunnel[2] "kcp"',
    ),
]

# (text, the line after "client.toml:")
NOT_TOML = [
    ("", ' role: expected "client" or "server", found nothing'),
    ("a = [1,2\n\n", "1: unclosed array"),
    ('role = "client"\na = 1 b = 2\n', "2: expected newline or end of document after a statement"),
    ("a =\n", "1: invalid value"),
    ("\n\na = 1\na = 2\n", "4: cannot overwrite a value"),
    ("[a]\n[a]\n", "2: cannot declare ('a',) twice"),
    ("a = 1\n\nb.c = 1\nb = 2", "4: cannot overwrite a value"),
    ("a = 1\nb = 2024-13-40\n", "2: expected newline or end of document after a statement"),
    ('a = "\x07"\n', "1: illegal character '\\x07'"),
    ("a = 1\nb = " + "[" * 5000, "2: nested too deeply"),
    ("a = 1\n\nb = " + "1" * 5000 + "\nc = 2\n", "3: a number too long"),
]


def check(file: Path) -> Result:
    return CliRunner().invoke(commands, ["check", "-c", str(file)])


def assert_refused(result: Result, line: str) -> None:
    assert (result.stderr, result.exit_code, result.stdout) == (line + "\n", 78, "")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("role", EXAMPLES)
def test_example_without_a_mistake_passes(role: str) -> None:
    result = check(write(Path(), role))
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize(("role", "old", "new", "line"), REPLACED)
def test_mistake_gives_its_line(role: str, old: str, new: str, line: str) -> None:
    assert EXAMPLES[role].count(old) >= 1
    assert_refused(check(write(Path(), role, EXAMPLES[role].replace(old, new, 1))), f"{role}.toml: {line}")


@pytest.mark.parametrize("role", SPRAY_EXAMPLES)
def test_spray_example_without_a_mistake_passes(role: str) -> None:
    result = check(write(Path(), role, SPRAY_EXAMPLES[role]))
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize(("role", "old", "new", "line"), REPLACED_SPRAY)
def test_mistake_in_a_spray_tunnel_gives_its_line(role: str, old: str, new: str, line: str) -> None:
    assert SPRAY_EXAMPLES[role].count(old) >= 1
    assert_refused(check(write(Path(), role, SPRAY_EXAMPLES[role].replace(old, new, 1))), f"{role}.toml: {line}")


@pytest.mark.parametrize(("role", "tunnel", "line"), APPENDED)
def test_second_tunnel_in_the_way_gives_its_line(role: str, tunnel: str, line: str) -> None:
    assert_refused(check(write(Path(), role, EXAMPLES[role] + tunnel)), f"{role}.toml: {line}")


@pytest.mark.parametrize(("text", "line"), NOT_TOML)
def test_syntax_error_names_the_line(text: str, line: str) -> None:
    assert_refused(check(write(Path(), "client", text)), f"client.toml:{line}")


def test_several_mistakes_give_the_first_of_the_document() -> None:
    text = CLIENT.replace("8080", "0").replace("9000", "70000").replace('"client"', '"client"\nworkers = -1')
    lines = [f"{WORKERS} -1", f"{WEB}.host_port: {PORT}, found 70000", f"{WEB}.local_port: {PORT}, found 0"]
    for line, mended in zip(lines, [("workers = -1", ""), ("70000", "9000"), ("= 0", "= 8080")], strict=True):
        assert_refused(check(write(Path(), "client", text)), f"client.toml: {line}")
        text = text.replace(*mended)


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_bytes(b'role = "client"\n# caf\xe9\n')
    assert_refused(check(file), f"{file}:2: not UTF-8")


def test_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    assert_refused(check(Path("none.toml")), "none.toml: expected a readable file, found: No such file or directory")
    assert_refused(check(tmp_path), f"{tmp_path}: expected a readable file, found: Is a directory")


def test_endless_file_is_given_up() -> None:
    assert_refused(check(Path("/dev/zero")), "/dev/zero: expected at most 1048576 bytes, found more")


def test_file_name_with_a_line_feed_stays_one_line() -> None:
    assert_refused(check(Path("a\nb.toml")), "a\\nb.toml: expected a readable file, found: No such file or directory")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "0 bytes"),
        (b"AAAA\n", "3 bytes"),
        (KEY_TEXT.encode() + b"!", "45 characters that are not base64"),
        (KEY_TEXT.encode() * 2, "88 characters that are not base64"),
        (bytes(range(256)), "256 characters that are not base64"),
        (b"A" * 5000, "more than 4096 bytes"),
    ],
)
def test_key_file_with_something_else_says_what(tmp_path: Path, content: bytes, found: str) -> None:
    file = write(Path(), "client")
    key_file = tmp_path / "laptop.key"
    key_file.write_bytes(content)
    assert_refused(check(file), f'client.toml: auth.key_file: {KEY}, found {found} in "laptop.key"')


def test_key_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    file = write(tmp_path, "server")
    key_file = tmp_path / "laptop.key"
    key_file.unlink()
    where = 'server.toml: client[1] "laptop".key_file: expected a readable file, found "laptop.key"'
    assert_refused(check(Path(file.name)), f"{where}: No such file or directory")
    key_file.mkdir()
    assert_refused(check(Path(file.name)), f"{where}: Is a directory")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "forwarder", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env={"PYTHONPATH": str(root)}
    )


@pytest.mark.parametrize("command", ["check", "start"])
def test_real_process_prints_one_line_and_exits_78(command: str) -> None:
    write(Path(), "client", CLIENT.replace("9000", "70000"))
    result = run(command, "-c", "client.toml")
    line = f"client.toml: {WEB}.host_port: {PORT}, found 70000\n"
    assert (result.returncode, result.stderr, result.stdout) == (78, line, "")


def test_real_process_with_bad_toml_prints_one_line_and_exits_78() -> None:
    write(Path(), "server", 'role = "server\n')
    for command in ("check", "start", "stop", "status"):
        result = run(command, "-c", "server.toml")
        assert (result.returncode, result.stderr) == (78, "server.toml:1: illegal character '\\n'\n")
