"""A valid file becomes the settings that it describes; what it does not say has its default."""

import os
import tempfile
import tomllib
from pathlib import Path

import pytest

from forwarder import config
from forwarder.config import find_instance, load
from forwarder.effective import effective_toml
from forwarder.errors import ConfigError
from forwarder.tunnels import AUTO_MAX, overlap
from tests.forwarder.examples import CLIENT, EXAMPLES, KEY, KEY_TEXT, SERVER, second, write
from workers.settings import Address, Key, LogSettings, Settings, StripeClientTunnel, StripeServerTunnel


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(config, "usable_cores", lambda: 3)


def test_client_example_becomes_settings_with_defaults(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, "client"))
    assert loaded.warnings == ()
    assert loaded.settings == Settings(
        role="client",
        workers=3,
        keys=(Key("laptop", KEY),),
        control_socket="/run/forwarder/client.sock",
        client_tunnels=(
            StripeClientTunnel(
                name="web", index=0, local=Address("127.0.0.1", 8080), remote_end=Address("server.example.net", 9000)
            ),
        ),
    )


def test_server_example_becomes_settings_with_defaults(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, "server"))
    assert loaded.warnings == ()
    assert loaded.settings == Settings(
        role="server",
        workers=3,
        keys=(Key("laptop", KEY),),
        control_socket="/run/forwarder/server.sock",
        server_tunnels=(
            StripeServerTunnel(name="web", index=0, listen=Address("::", 9000), target=Address("127.0.0.1", 80)),
        ),
    )


CLIENT_WITH_EVERYTHING = f"""
role = "client"
workers = 5
suite = "chacha20poly1305"
drain_timeout = "0s"
user = "root"
group = "0"
pin = true
auth = {{ key_id = "laptop", key = "{KEY_TEXT}" }}
control.socket = "run/own.sock"
log = {{ level = "debug", format = "json", file = "own.log" }}
[[tunnel]]
name = "web"
mode = "stripe"
host = "[2001:db8::1]"
host_port = 1
local = "[::]:65535"
somaxconn = 4096
source = "2001:DB8::2"
window_max = 16384
frame_max = "4KiB"
resume_timeout = "1h"
connect_timeout = "250ms"
idle_timeout = "5m"
dial_rate = 2
rotate_after = "10s"
congestion = "bbr"
"""


def test_every_key_of_a_client_arrives(tmp_path: Path) -> None:
    file = write(tmp_path, "client", CLIENT_WITH_EVERYTHING)
    file.chmod(0o600)
    loaded = load(file)
    assert loaded.warnings == ()
    assert loaded.settings == Settings(
        role="client",
        workers=5,
        suite="chacha20poly1305",
        drain_timeout_s=0,
        user="root",
        group="0",
        pin=True,
        keys=(Key("laptop", KEY),),
        control_socket=str(tmp_path / "run/own.sock"),
        log=LogSettings("debug", "json", str(tmp_path / "own.log")),
        client_tunnels=(
            StripeClientTunnel(
                name="web",
                index=0,
                local=Address("::", 65535),
                remote_end=Address("2001:db8::1", 1),
                somaxconn=4096,
                sources=("2001:db8::2",),
                window_max_bytes=16384,
                frame_max_bytes=4096,
                resume_timeout_s=3600,
                connect_timeout_s=0.25,
                idle_timeout_s=300,
                dial_rate_per_s=2,
                rotate_after_s=10,
                congestion="bbr",
            ),
        ),
    )


def test_several_hosts_and_sources_and_automatic_stripes_arrive(tmp_path: Path) -> None:
    text = (
        CLIENT_WITH_EVERYTHING.replace('"[2001:db8::1]"', '["2001:db8::1", "server.example.net"]')
        .replace('"2001:DB8::2"', '["2001:DB8::2", "2001:db8::3"]')
        .replace("4096\n", '"auto"\n')
    )
    file = write(tmp_path, "client", text)
    file.chmod(0o600)
    (tunnel,) = load(file).settings.client_tunnels
    assert tunnel.remote_ends == (Address("2001:db8::1", 1), Address("server.example.net", 1))
    assert tunnel.sources == ("2001:db8::2", "2001:db8::3")
    assert tunnel.auto and tunnel.somaxconn == AUTO_MAX
    shown = tomllib.loads(effective_toml(load(file).settings))["tunnel"][0]
    assert shown["host"] == ["2001:db8::1", "server.example.net"]
    assert (shown["source"], shown["somaxconn"]) == (["2001:db8::2", "2001:db8::3"], "auto")


def test_every_key_of_a_server_tunnel_arrives(tmp_path: Path) -> None:
    more = {
        "listen": '"0.0.0.0"',
        "window_max": '"1GiB"',
        "frame_max": '"64KiB"',
        "resume_timeout": '"0s"',
        "connect_timeout": '"3s"',
        "handshake_timeout": '"4s"',
        "max_sessions": "1",
        "max_streams": "2",
        "congestion": '"cubic"',
    }
    text = SERVER.replace('laptop.key"', 'laptop.key"\ntunnels = ["ssh"]') + second("server", **more)
    settings = load(write(tmp_path, "server", text)).settings
    assert settings.keys == (Key("laptop", KEY, frozenset({"ssh"})),)
    assert settings.server_tunnels[1] == StripeServerTunnel(
        name="ssh",
        index=1,
        listen=Address("0.0.0.0", 9001),
        target=Address("127.0.0.1", 22),
        window_max_bytes=1 << 30,
        frame_max_bytes=65536,
        resume_timeout_s=0,
        connect_timeout_s=3,
        handshake_timeout_s=4,
        max_sessions=1,
        max_streams=2,
        congestion="cubic",
    )


def test_settings_are_plain_values(tmp_path: Path) -> None:
    tunnel = load(write(tmp_path, "client", CLIENT_WITH_EVERYTHING)).settings.client_tunnels[0]
    plain = {bool, int, float, str, tuple, Address}
    assert {type(getattr(tunnel, field)) for field in tunnel.__struct_fields__} <= plain
    assert {type(tunnel.local.host), type(tunnel.remote_end.host)} == {str}


def test_key_does_not_show_its_secret(tmp_path: Path) -> None:
    assert KEY_TEXT not in repr(load(write(tmp_path, "client"))) and repr(KEY) not in repr(
        load(write(tmp_path, "client"))
    )


def test_key_file_is_relative_to_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "client")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(Path("../client.toml")).settings.keys[0].secret == KEY


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_key_file_for_all_eyes_is_a_warning(tmp_path: Path, mode: int, warned: bool) -> None:
    file = write(tmp_path, "client")
    key_file = tmp_path / "laptop.key"
    key_file.chmod(mode)
    expected = (f"auth.key_file: every user of this host may read {key_file}",)
    assert load(file).warnings == (expected if warned else ())


def test_warning_about_a_strange_file_name_is_one_line(tmp_path: Path) -> None:
    file = write(tmp_path, "client", CLIENT.replace("laptop.key", "lap\\ntop.key"))
    (tmp_path / "laptop.key").rename(key_file := tmp_path / "lap\ntop.key")
    key_file.chmod(0o644)
    (warning,) = load(file).warnings
    assert warning == f"auth.key_file: every user of this host may read {tmp_path}/lap\\ntop.key"


def test_key_in_a_configuration_for_all_eyes_is_a_warning(tmp_path: Path) -> None:
    file = write(tmp_path, "server", SERVER.replace('key_file = "laptop.key"', f'key = "{KEY_TEXT}"'))
    file.chmod(0o644)
    assert load(file).warnings == (f'client[1] "laptop".key: every user of this host may read {file}',)


@pytest.mark.parametrize("role", EXAMPLES)
def test_metrics_listen_is_an_address(tmp_path: Path, role: str) -> None:
    loaded = load(write(tmp_path, role, EXAMPLES[role] + '[metrics]\nlisten = "127.0.0.1:9464"\n'))
    assert loaded.settings.metrics_listen == Address("127.0.0.1", 9464)
    assert loaded.warnings == ()


def test_default_control_socket_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "client")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1234")
    assert load(file).settings.control_socket == "/run/user/1234/forwarder/client.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/temporary")
    assert load(file).settings.control_socket == "/temporary/forwarder-1234/client.sock"


def test_instance_is_found_in_a_file_with_mistakes(tmp_path: Path) -> None:
    file = write(tmp_path, "client", 'bogus = 1\ndrain_timeout = "5m"\ncontrol.socket = "own.sock"')
    assert find_instance(file) == config.Instance(tmp_path / "own.sock", 300.0)
    file.write_text('drain_timeout = 1\ncontrol = "x"')
    assert find_instance(file) == config.Instance(Path("/run/forwarder/client.sock"), 30.0)
    file.write_text("bogus")
    with pytest.raises(ConfigError):
        find_instance(file)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "0.0.0.0", True),
        ("127.0.0.1", "::", True),
        ("::1", "::", True),
        ("::1", "0.0.0.0", False),
        ("0.0.0.0", "::", True),
        ("name", "name", True),
        ("name", "::", True),
        ("name", "127.0.0.1", False),
    ],
)
def test_addresses_overlap_as_sockets_do(one: str, other: str, both: bool) -> None:
    assert overlap(Address(one, 80), Address(other, 80)) is both
    assert overlap(Address(other, 80), Address(one, 80)) is both
    assert not overlap(Address(one, 80), Address(other, 81))


def test_tunnels_of_one_port_at_different_addresses_pass(tmp_path: Path) -> None:
    text = CLIENT + second("client", here='local = "127.0.0.2:8080"')
    assert len(load(write(tmp_path, "client", text)).settings.client_tunnels) == 2
    text = SERVER.replace("host_port", 'listen = "10.0.0.2"\nhost_port')
    text += second("server", port=9000, listen='"10.0.0.1"')
    assert len(load(write(tmp_path, "server", text)).settings.server_tunnels) == 2


def test_usable_cores_are_those_of_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    assert config.usable_cores() == 7
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(200)))
    assert config.usable_cores() == 64
