"""What the predecessors' files become: TOML that passes `check`, and a note about everything that is not the same."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forwarder.cli import commands
from forwarder.config import load
from forwarder.convert import MTCP_KEYS, RSOCK_KEYS, RSOCK_PARAM_KEYS, convert_file
from forwarder.errors import ConfigError
from tests.forwarder.examples import KEY_TEXT
from workers.settings import Address, SprayClientTunnel, SprayServerTunnel, StripeClientTunnel, StripeServerTunnel

MTCP = {"host": "server", "host_port": "8868", "remote_port": "7070", "local_port": "8123", "somaxconn": 10}
RSOCK_CLIENT = {"param": {"taddr": "10.0.0.1", "ludp": "127.0.0.1:30000"}, "daemon": 0}
RSOCK_SERVER = {"param": {"taddr": "127.0.0.1:9999", "ports": "80,443,10000-10005"}, "daemon": 0}
PORTS = 'expected ports such as "80,443,10000-10005": from 1 to 65535, each once, ranges upwards, at most 4096, found'
PORT = "expected a port from 1 to 65535, found"
KEYS = "the keys of mtcp (host, host_port, remote_port, local_port, somaxconn) or those of rsock (param), found"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def convert(document: Any, *options: str) -> Result:
    text = document if isinstance(document, str) else json.dumps(document)
    Path("old.json").write_text(text)
    return CliRunner().invoke(commands, ["convert", "old.json", *options])


def loaded(result: Result, key: str = "laptop.key") -> Any:
    """The settings that the output stands for; it passes `check` once the key file is there."""
    assert result.exit_code == 0, result.stderr
    Path("new.toml").write_text(result.stdout)
    Path(key).touch(0o600)
    Path(key).write_text(KEY_TEXT)
    checked = CliRunner().invoke(commands, ["check", "-c", "new.toml"])
    assert (checked.exit_code, checked.stderr) == (0, "")
    return load(Path("new.toml")).settings


def with_param(document: dict[str, Any], **param: Any) -> dict[str, Any]:
    return document | {"param": document["param"] | param}


def test_mtcp_becomes_a_client() -> None:
    result = convert(MTCP)
    (tunnel,) = loaded(result).tunnels
    assert isinstance(tunnel, StripeClientTunnel)
    assert (tunnel.remote_end, tunnel.local, tunnel.somaxconn) == (Address("server", 8868), Address("::", 8123), 10)
    notes = result.stderr.splitlines()
    assert all(line.startswith("note: ") for line in notes)
    assert [line.split(": ")[1] for line in notes] == ["role", "local_port", "somaxconn", "remote_port", "key"]


def test_mtcp_becomes_a_server() -> None:
    result = convert(MTCP | {"somaxconn": "10", "host_port": 8868}, "--role", "server")
    (tunnel,) = loaded(result).tunnels
    assert isinstance(tunnel, StripeServerTunnel)
    assert (tunnel.listen, tunnel.target) == (Address("::", 8868), Address("127.0.0.1", 7070))
    assert "forwarder genkey > laptop.key" in result.stderr


def test_both_ends_of_mtcp_name_the_tunnel_alike() -> None:
    names = {loaded(convert(MTCP, "--role", role)).tunnels[0].name for role in ("client", "server")}
    assert len(names) == 1


def test_mtcp_with_more_sockets_than_there_may_be_gets_the_most() -> None:
    result = convert(MTCP | {"host": "[2001:db8::1]", "somaxconn": 100_000})
    assert loaded(result).tunnels[0].somaxconn == 4096
    assert "somaxconn: 100000 is more than there may be, 4096 are shared by all" in result.stderr


def test_rsock_with_ludp_becomes_a_client_with_its_defaults() -> None:
    result = convert(RSOCK_CLIENT)
    (tunnel,) = loaded(result).tunnels
    assert isinstance(tunnel, SprayClientTunnel)
    assert (tunnel.hosts, tunnel.local) == (("10.0.0.1",), Address("127.0.0.1", 30000))
    assert (tunnel.ports, tunnel.type) == (tuple(range(10001, 10011)), "tcp")
    assert (tunnel.duration_s, tunnel.keepalive_s, tunnel.device) == (600.0, 4.0, None)
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == ["key"]


def test_rsock_without_ludp_becomes_a_server() -> None:
    param = {"type": "all", "dev": "eth1", "lcapIp": "10.0.0.2", "duration": "120", "keepalive": 5}
    converted = loaded(convert(with_param(RSOCK_SERVER, **param) | {"verbose": True, "log": "rsock.log"}))
    (tunnel,) = converted.tunnels
    assert isinstance(tunnel, SprayServerTunnel)
    assert (tunnel.listen, tunnel.target) == ("10.0.0.2", Address("127.0.0.1", 9999))
    assert (tunnel.ports, tunnel.type, tunnel.device) == ((80, 443, *range(10000, 10006)), "all", "eth1")
    assert (tunnel.duration_s, tunnel.keepalive_s) == (120.0, 5.0)
    assert (converted.log.level, converted.log.file) == ("debug", str(Path("rsock.log").absolute()))


def test_rsock_client_that_captures_on_an_address_sends_from_it() -> None:
    assert loaded(convert(with_param(RSOCK_CLIENT, lcapIp="10.0.0.2"))).tunnels[0].sources == ("10.0.0.2",)


def test_what_rsock_had_and_is_gone_is_said_there_and_in_the_file() -> None:
    document = with_param(RSOCK_CLIENT, hash="secret", cap_timeout=10, unPath="/tmp/x", colour="blue")
    result = convert(document | {"daemon": 1, "shape": 1})
    converted = loaded(result)
    keys = [line.split(": ")[1] for line in result.stderr.splitlines()]
    gone = ["param.hash", "param.cap_timeout", "param.unPath"]
    assert keys == ["daemon", *gone, "shape", "param.colour", "key"]
    assert all(f"# - {key}: " in result.stdout for key in keys)
    assert converted.log.file == "/var/log/rsock/rsock.log" and "secret" not in result.stdout + result.stderr


def test_key_has_the_name_that_was_asked_for() -> None:
    converted = loaded(convert(RSOCK_SERVER, "--key-id", "home"), key="home.key")
    assert converted.keys[0].key_id == "home"


def test_lines_of_the_output_fit_a_screen_and_are_toml() -> None:
    output = convert(with_param(RSOCK_CLIENT, hash="x", cap_timeout=1, unPath="x") | {"daemon": 1}).stdout
    assert max(map(len, output.splitlines())) <= 120
    assert set(tomllib.loads(output)) == {"role", "auth", "log", "tunnel"}


@pytest.mark.parametrize(
    ("document", "line"),
    [
        ("", ":1: expected JSON, found: expecting value"),
        ('{\n"host": server}', ":2: expected JSON, found: expecting value"),
        ("[1]", f": expected an object with {KEYS} an array"),
        ("null", f": expected an object with {KEYS} null"),
        ({}, f": expected {KEYS} an empty object"),
        ({"role": "client", "tunnel": []}, f': expected {KEYS} "role", "tunnel"'),
        ("[" * 5000, f": expected {KEYS} what no such file holds"),
        ('{"host": "a", "host": "b"}', ': expected every key once, found "host" twice'),
        ({"host": "a"}, f": host_port: {PORT} nothing"),
        (MTCP | {"host": ""}, ': host: expected a host name, an IPv4 or an IPv6 address, found ""'),
        (MTCP | {"host": None}, ": host: expected a host name, an IPv4 or an IPv6 address, found null"),
        (MTCP | {"host": {}}, ": host: expected a host name, an IPv4 or an IPv6 address, found an object"),
        (MTCP | {"host_port": "70000"}, f': host_port: {PORT} "70000"'),
        (MTCP | {"local_port": 0}, f": local_port: {PORT} 0"),
        (MTCP | {"remote_port": True}, f": remote_port: {PORT} true"),
        (MTCP | {"remote_port": "٣"}, f': remote_port: {PORT} "٣"'),
        (MTCP | {"somaxconn": 1.5}, ": somaxconn: expected a number from 1, found 1.5"),
        ({"param": 1}, ": param: expected an object, found 1"),
        (
            {"param": {}},
            ': param.taddr: expected an address and a port, such as "127.0.0.1:9999" '
            "(without param.ludp: a server's file), found nothing",
        ),
        (
            with_param(RSOCK_CLIENT, taddr="10.0.0.1:1"),
            ": param.taddr: expected the server's address, without a port (param.ludp: a client's file), "
            'found "10.0.0.1:1"',
        ),
        (
            with_param(RSOCK_CLIENT, ludp="30000"),
            ': param.ludp: expected an address and a port, such as "127.0.0.1:9999", found "30000"',
        ),
        (with_param(RSOCK_SERVER, ports="80,80"), f": param.ports: {PORTS} 80 twice"),
        (with_param(RSOCK_SERVER, ports="http"), f': param.ports: {PORTS} "http"'),
        (with_param(RSOCK_SERVER, type="sctp"), ': param.type: expected "tcp", "udp" or "all", found "sctp"'),
        (
            with_param(RSOCK_SERVER, duration=6001),
            ": param.duration: expected a number of seconds from 10 to 6000, found 6001",
        ),
        (RSOCK_SERVER | {"verbose": "yes"}, ': verbose: expected true, false, 0 or 1, found "yes"'),
        (
            with_param(RSOCK_SERVER, dev="eth 0"),
            ': tunnel[1] "rsock".dev: expected the name of a network device: 1 to 15 characters, without spaces, '
            'slashes and colons, found "eth 0"',
        ),
    ],
)
def test_mistake_is_one_line_and_78(document: Any, line: str) -> None:
    result = convert(document)
    assert (result.stderr, result.exit_code, result.stdout) == (f"old.json{line}\n", 78, "")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["1", "80,443", "10-20", "127.0.0.1", "::1", "127.0.0.1:9999", "[::1]:80", "tcp", "all", "eth0"]),
    st.lists(st.integers(), max_size=2),
)
PARAM = st.dictionaries(st.sampled_from(RSOCK_PARAM_KEYS), VALUES)
DOCUMENTS = st.one_of(
    VALUES,
    st.dictionaries(st.sampled_from(MTCP_KEYS), VALUES),
    st.builds(lambda param, more: more | {"param": param}, PARAM, st.dictionaries(st.sampled_from(RSOCK_KEYS), VALUES)),
)


@given(st.one_of(DOCUMENTS.map(json.dumps), st.text(max_size=30)), st.sampled_from([None, "client", "server"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_any_file_is_converted_or_one_mistake(text: str, role: Any) -> None:
    file = Path("old.json")
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        output, notes = convert_file(file, role)
    except ConfigError as error:
        assert str(error).startswith("old.json:") and len(str(error)) < 1000
    else:
        assert tomllib.loads(output)["role"] in ("client", "server") and notes


def test_role_that_rsock_s_file_does_not_have_is_a_mistake() -> None:
    result = convert(RSOCK_CLIENT, "--role", "server")
    assert (result.exit_code, result.stdout) == (78, "")
    assert result.stderr == "old.json: param.ludp: expected a server's file, found a client's (with param.ludp)\n"


def test_file_that_is_not_there_is_one_line() -> None:
    result = CliRunner().invoke(commands, ["convert", "nosuch.json"])
    assert (result.exit_code, result.stderr.count("\n")) == (78, 1)
