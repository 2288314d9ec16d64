"""Tables of spray tunnels become the settings that they describe, beside stripe tunnels or alone."""

import tomllib
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.config import load
from forwarder.effective import effective_toml
from tests.forwarder.examples import CLIENT, EXAMPLES, SPRAY_EXAMPLES, SPRAY_TUNNELS, second, write
from workers.settings import (
    Address,
    Settings,
    SprayClientTunnel,
    SprayServerTunnel,
    StripeClientTunnel,
)

PORTS = (80, 443, *range(10000, 10006))
BOTH_ENDS = """type = "all"
dev = "wlp3s0.100"
backend = "pcap"
duration = "10m"
keepalive = "4s"
copies = 2
mtu = 1400
capture = "seen/kcp.pcap"
capture_max = "2MiB"
"""


def settings_of(directory: Path, role: str, more: str = "") -> Settings:
    loaded = load(write(directory, role, SPRAY_EXAMPLES[role] + more))
    assert loaded.warnings == ()
    return loaded.settings


def test_client_example_becomes_settings_with_defaults(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "client")
    assert settings.spray_client_tunnels == (
        SprayClientTunnel(
            name="kcp",
            index=0,
            ports=PORTS,
            local=Address("127.0.0.1", 30000),
            hosts=("server.example.net",),
            type="tcp",
            device=None,
            backend="packet",
            duration_s=60,
            keepalive_s=10,
            copies=1,
            mtu=None,
            sources=(),
            dial_rate_per_s=100,
            rotate_after_s=None,
        ),
    )
    assert settings.client_tunnels == () and settings.tunnels == settings.spray_tunnels


def test_server_example_becomes_settings_with_defaults(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "server")
    assert settings.spray_server_tunnels == (
        SprayServerTunnel(
            name="kcp",
            index=0,
            ports=PORTS,
            listen="::",
            target=Address("127.0.0.1", 9999),
            max_sessions=1024,
            max_conversations=65536,
        ),
    )
    assert settings.server_tunnels == () and settings.tunnels == settings.spray_tunnels


def test_every_key_of_a_client_tunnel_arrives(tmp_path: Path) -> None:
    more = BOTH_ENDS + 'source = ["10.0.0.1", "10.0.0.2"]\ndial_rate = 5\nrotate_after = "1h"\n'
    (tunnel,) = settings_of(tmp_path, "client", more).spray_client_tunnels
    assert tunnel == SprayClientTunnel(
        name="kcp",
        index=0,
        ports=PORTS,
        local=Address("127.0.0.1", 30000),
        hosts=("server.example.net",),
        type="all",
        device="wlp3s0.100",
        backend="pcap",
        duration_s=600,
        keepalive_s=4,
        copies=2,
        mtu=1400,
        capture=str(tmp_path / "seen/kcp.pcap"),
        capture_max_bytes=2 << 20,
        sources=("10.0.0.1", "10.0.0.2"),
        dial_rate_per_s=5,
        rotate_after_s=3600,
    )
    plain = {int, float, str, tuple, Address}
    assert {type(getattr(tunnel, field)) for field in tunnel.__struct_fields__} <= plain


def test_every_key_of_a_server_tunnel_arrives(tmp_path: Path) -> None:
    more = BOTH_ENDS + 'listen = "[2001:db8::1]"\nmax_sessions = 1\nmax_conversations = 2\n'
    (tunnel,) = settings_of(tmp_path, "server", more).spray_server_tunnels
    assert tunnel == SprayServerTunnel(
        name="kcp",
        index=0,
        ports=PORTS,
        listen="2001:db8::1",
        target=Address("127.0.0.1", 9999),
        type="all",
        device="wlp3s0.100",
        backend="pcap",
        duration_s=600,
        keepalive_s=4,
        copies=2,
        mtu=1400,
        capture=str(tmp_path / "seen/kcp.pcap"),
        capture_max_bytes=2 << 20,
        max_sessions=1,
        max_conversations=2,
    )


def test_ports_ascend_however_they_are_written(tmp_path: Path) -> None:
    text = SPRAY_EXAMPLES["client"].replace("80,443,10000-10005", "10003-10005,443,10000-10002,80")
    assert load(write(tmp_path, "client", text)).settings.spray_client_tunnels[0].ports == PORTS


def test_tunnels_of_both_modes_keep_their_places(tmp_path: Path) -> None:
    text = CLIENT + SPRAY_TUNNELS["client"] + second("client")
    settings = load(write(tmp_path, "client", text)).settings
    assert [(tunnel.index, tunnel.name) for tunnel in settings.client_tunnels] == [(0, "web"), (2, "ssh")]
    assert [(tunnel.index, tunnel.name) for tunnel in settings.spray_client_tunnels] == [(1, "kcp")]
    assert [(tunnel.index, tunnel.mode) for tunnel in settings.tunnels] == [(0, "stripe"), (1, "spray"), (2, "stripe")]


@pytest.mark.parametrize(
    ("role", "old", "new"),
    [
        ("client", "80,443", "9001,443"),
        ("server", "80,443", "9001,443"),
        ("client", "30000", "8080"),  # ludp is UDP, local TCP
    ],
)
def test_tunnels_that_are_not_in_the_way_pass(tmp_path: Path, role: str, old: str, new: str) -> None:
    load(write(tmp_path, role, EXAMPLES[role] + SPRAY_TUNNELS[role].replace(old, new)))


def test_port_of_both_kinds_may_be_two_tunnels(tmp_path: Path) -> None:
    other = SPRAY_TUNNELS["server"].replace('"kcp"', '"dns"') + 'type = "udp"\n'
    assert len(load(write(tmp_path, "server", SPRAY_EXAMPLES["server"] + other)).settings.spray_tunnels) == 2


@pytest.mark.parametrize(
    ("role", "more"),
    [
        ("client", ""),
        ("server", ""),
        ("client", BOTH_ENDS + 'source = "10.0.0.1"\nrotate_after = "90s"\n'),
        ("server", BOTH_ENDS + 'listen = "10.0.0.1"\n'),
    ],
)
def test_what_is_in_effect_reads_back(tmp_path: Path, role: str, more: str) -> None:
    settings = settings_of(tmp_path, role, more)
    shown = effective_toml(settings)
    assert tomllib.loads(shown)["tunnel"][0]["ports"] == "80,443,10000-10005"
    key = msgspec.to_builtins(settings.keys[0])["secret"]
    again = load(write(tmp_path, role, shown.replace('"hidden"', f'"{key}"'))).settings
    assert again.tunnels == settings.tunnels


def tunnel_with(type_: Literal["tcp", "udp", "all"], *ports: int) -> SprayClientTunnel:
    local = Address("127.0.0.1", 1)
    return SprayClientTunnel(name="t", index=0, ports=ports, type=type_, local=local, hosts=("a", "b"))


def test_carriers_are_each_port_in_each_kind() -> None:
    assert tunnel_with("udp", 80, 443).carriers == (("udp", 80), ("udp", 443))
    assert tunnel_with("all", 80, 443).carriers == (("tcp", 80), ("udp", 80), ("tcp", 443), ("udp", 443))


def test_carrier_may_be_dialled_at_each_host() -> None:
    tunnel = tunnel_with("all", 80, 443)
    assert [tunnel.remote_ends(carrier)[0].port for carrier in range(4)] == [80, 80, 443, 443]
    assert tunnel.remote_ends(3) == (Address("a", 443), Address("b", 443))


@given(st.sampled_from(["tcp", "udp", "all"]), st.integers(1, 20), st.integers(1, 8))
def test_workers_share_carriers_of_each_kind_evenly(
    type_: Literal["tcp", "udp", "all"], ports: int, workers: int
) -> None:
    tunnel = tunnel_with(type_, *range(1, ports + 1))
    for kind in tunnel.kinds:
        owners = [tunnel.owner_of(i, workers) for i, carrier in enumerate(tunnel.carriers) if carrier[0] == kind]
        counts = [owners.count(slot) for slot in range(workers)]
        assert max(counts) - min(counts) <= 1
    owners = [tunnel.owner_of(carrier, workers) for carrier in range(len(tunnel.carriers))]
    assert all(owners.count(slot) for slot in range(min(workers, ports)))


def test_settings_with_stripes_alone_have_no_spray_tunnel() -> None:
    stripe = StripeClientTunnel(name="web", index=0, local=Address("h", 1), remote_end=Address("h", 2))
    settings = Settings(role="client", workers=1, keys=(), client_tunnels=(stripe,))
    assert settings.spray_tunnels == () and settings.tunnels == (stripe,)
