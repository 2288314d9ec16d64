"""The file read again, against what runs: who keeps an index, who gets a fresh one, and what is said of it."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from forwarder.errors import ConfigError, Unavailable
from forwarder.reload import INDEX_MAX, Plan, Running, begin, plan
from workers.settings import (
    Address,
    Key,
    LogSettings,
    Settings,
    SprayClientTunnel,
    SprayServerTunnel,
    StripeClientTunnel,
    StripeServerTunnel,
    Tunnel,
)

FILE = Path("/etc/forwarder/it.toml")
HERE, THERE = Address("127.0.0.1", 8080), Address("server", 9000)
WEB = StripeClientTunnel(name="web", index=0, local=HERE, remote_end=THERE)
SSH = StripeClientTunnel(name="ssh", index=0, local=Address("127.0.0.1", 22), remote_end=THERE)
KCP = SprayClientTunnel(name="kcp", index=0, ports=(80,), local=HERE, hosts=("server",))
SERVED = StripeServerTunnel(name="web", index=0, listen=Address("::", 9000), target=HERE)
SPRAYED = SprayServerTunnel(name="kcp", index=0, ports=(80,), listen="::", target=HERE)


def settings(*tunnels: Tunnel, **changes: Any) -> Settings:
    """As a file has them: indices are places in it."""
    placed = [replace(tunnel, index=index) for index, tunnel in enumerate(tunnels)]
    kinds = {
        "client_tunnels": StripeClientTunnel,
        "server_tunnels": StripeServerTunnel,
        "spray_client_tunnels": SprayClientTunnel,
        "spray_server_tunnels": SprayServerTunnel,
    }
    fields: dict[str, Any] = {
        field: tuple(each for each in placed if isinstance(each, kind)) for field, kind in kinds.items()
    }
    client = not any(isinstance(each, StripeServerTunnel | SprayServerTunnel) for each in placed)
    made = Settings(role="client" if client else "server", workers=2, keys=(Key("a", bytes(32)),), **fields)
    return replace(made, **changes)


def started(*tunnels: Tunnel, **changes: Any) -> Running:
    return begin(settings(*tunnels, **changes), itertools.count(100).__next__)


def again(running: Running, *tunnels: Tunnel, **changes: Any) -> Plan:
    found = settings(*tunnels, **changes)
    return plan(FILE, running, found, itertools.count(200).__next__, lambda: b"r" * 32)


def indices(running: Running) -> dict[str, int]:
    return {tunnel.name: tunnel.index for tunnel in running.settings.tunnels}


def test_same_file_changes_nothing() -> None:
    running = started(WEB, KCP)
    assert again(running, WEB, KCP) == Plan(running, ())


def test_order_follows_the_file_and_indices_do_not() -> None:
    running, changes = again(started(WEB, SSH), SSH, WEB)
    assert indices(running) == {"web": 0, "ssh": 1}
    assert (running.order, changes) == (("ssh", "web"), ())


def test_indices_are_never_used_twice() -> None:
    running = started(WEB, SSH)
    running, changes = again(running, WEB)
    assert changes == ("tunnel 'ssh': removed",) and indices(running) == {"web": 0}
    running, changes = again(running, SSH, WEB)
    assert changes == ("tunnel 'ssh': added",) and indices(running) == {"web": 0, "ssh": 2}
    assert running.session_ids == {0: 100, 2: 200} and running.next_index == 3


def test_index_beyond_16_bits_is_refused() -> None:
    running = replace(started(WEB), next_index=INDEX_MAX)
    last, _ = again(running, WEB, SSH)
    assert indices(last)["ssh"] == INDEX_MAX
    with pytest.raises(Unavailable, match="restart"):
        again(last, WEB, replace(SSH, remote_end=HERE))


@pytest.mark.parametrize(
    ("before", "changes", "fresh", "keys"),
    [
        (WEB, {"somaxconn": 20}, False, "somaxconn"),
        (WEB, {"local": Address("127.0.0.1", 8081)}, False, "local"),
        (WEB, {"window_max_bytes": 1 << 20, "congestion": "bbr"}, False, "window_max, congestion"),
        (WEB, {"remote_end": Address("other", 9000)}, True, "host"),
        (WEB, {"more_ends": (Address("other", 9000),)}, True, "host"),
        (WEB, {"sources": ("127.0.0.2",)}, True, "source"),
        (KCP, {"duration_s": 5.0}, True, "duration"),
        (KCP, {"ports": (80, 81)}, True, "ports"),
        (SERVED, {"target": THERE}, False, "remote"),
        (SERVED, {"listen": Address("::", 9001)}, False, "host_port"),
        (SPRAYED, {"copies": 2}, True, "copies"),
    ],
)
def test_changed_tunnel_keeps_its_index_or_starts_anew(
    before: Tunnel, changes: dict[str, Any], fresh: bool, keys: str
) -> None:
    running, lines = again(started(before), replace(before, **changes))
    assert running.settings.tunnels == (replace(before, index=1 if fresh else 0, **changes),)
    assert lines == (f"tunnel {before.name!r}: changed ({keys})",)


def test_other_mode_is_another_tunnel() -> None:
    running, changes = again(started(WEB), replace(KCP, name="web"))
    assert indices(running) == {"web": 1} and changes == ("tunnel 'web': changed (mode)",)
    assert running.session_ids == {1: 200}


def test_other_key_id_starts_every_tunnel_of_a_client_anew() -> None:
    running, changes = again(started(WEB, KCP), WEB, KCP, keys=(Key("b", bytes(32)),))
    assert indices(running) == {"web": 2, "kcp": 3} and running.settings.keys == (Key("b", bytes(32)),)
    assert changes == ("key 'a': removed", "key 'b': added")


def test_other_secret_starts_nothing_anew() -> None:
    running, changes = again(started(WEB), WEB, keys=(Key("a", b"1" * 32),))
    assert indices(running) == {"web": 0} and changes == ("key 'a': changed (secret)",)


def test_servers_keys_keep_their_places() -> None:
    a, b, c = (Key(name, name.encode() * 32) for name in "abc")
    gone = replace(a, secret=b"r" * 32, revoked=True)
    running, _ = again(started(SERVED, keys=(a, b)), SERVED, keys=(c, b))
    assert running.settings.keys == (gone, b, c)
    again_ = again(running, SERVED, keys=(c, b))
    assert again_ == Plan(running, ())
    back = Key("a", b"2" * 32, frozenset({"web"}))
    running, changes = again(running, SERVED, keys=(b, back))
    assert [key.key_id for key in running.settings.keys] == ["a", "b", "c"] and running.settings.keys[0] == back
    assert [key.revoked for key in running.settings.keys] == [False, False, True]
    assert changes == ("key 'c': removed", "key 'a': added")


def test_general_settings_are_told_with_both_values() -> None:
    log = LogSettings(level="debug")
    changes = again(
        started(WEB), WEB, workers=3, drain_timeout_s=60.0, log=log, metrics_listen=Address("::1", 9464)
    ).changes
    assert changes == (
        "workers: 2 -> 3",
        "drain_timeout: 30s -> 60s",
        "metrics.listen: none -> [::1]:9464",
        "log.level: info -> debug",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"role": "server"}, "role cannot change while it runs: expected client, found server"),
        ({"suite": "chacha20poly1305"}, "suite cannot change while it runs: expected aes256gcm, found chacha"),
        ({"control_socket": "/x"}, "control.socket cannot change while it runs: expected , found /x"),
        ({"user": "nobody"}, "user cannot change while it runs: expected none, found nobody"),
        ({"group": "nogroup"}, "group cannot change while it runs: expected none, found nogroup"),
        ({"pin": True}, "pin cannot change while it runs: expected false, found true"),
    ],
)
def test_what_cannot_change_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=r"^/etc/forwarder/it\.toml: ") as refused:
        again(started(WEB), WEB, **changes)
    assert words in str(refused.value)
