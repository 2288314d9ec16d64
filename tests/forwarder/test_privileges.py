"""Becoming another user: what is dropped, what is kept, and who may."""

import errno
import grp
import json
import os
import pwd
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from forwarder.errors import BootError
from forwarder.privileges import (
    CAP_NET_ADMIN,
    CAP_NET_RAW,
    Identity,
    capabilities_wanted,
    descriptors_wanted,
    identity_wanted,
    raise_descriptor_limit,
)
from workers.settings import Address, Settings, SprayServerTunnel, StripeClientTunnel

NOBODY = pwd.getpwnam("nobody")
SOMEBODY = pwd.getpwuid(os.geteuid())
ROOT = Path(__file__).parents[2]
NETWORK = 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW

BECOMING = """
import json, os, socket, sys
from forwarder.privileges import Identity, become
from workers.core.bpf import DROP_PAYLOAD
from workers.io.socket_filter import attach_filter

def refusal(attempt):
    try:
        attempt()
    except OSError as error:
        return error.errno

def sets(pid):
    lines = (line.split(":") for line in open(f"/proc/{pid}/status") if line.startswith("Cap"))
    return {name: int(value, 16) for name, value in lines}

def program():
    reading, writing = os.pipe()
    if not os.fork():
        os.dup2(writing, 1)
        os.execvp("cat", ["cat", "/proc/self/status"])
    os.close(writing)
    os.wait()
    return [line for line in os.read(reading, 65536).decode().splitlines() if line.startswith("CapEff")]

before = sets("self")
uid, keep = json.loads(sys.argv[1])
become(Identity(uid, uid, (uid,)), keep)
print(json.dumps({
    "before": before,
    "now": sets("self"),
    "packet": refusal(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)),
    "filter": refusal(lambda: attach_filter(socket.socket(), DROP_PAYLOAD)),
    "root": refusal(lambda: os.setuid(0)),
    "program": program(),
}))
"""


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def refused(kept: int, capability: int) -> int | None:
    """What the kernel answers to who has these capabilities."""
    return None if kept >> capability & 1 else errno.EPERM


def as_user(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)


def test_nothing_asked_for_is_nothing_to_do() -> None:
    assert identity_wanted(None, None) is None


def test_what_one_is_already_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getegid", lambda: SOMEBODY.pw_gid)
    assert identity_wanted(SOMEBODY.pw_name, None) is None


def test_root_becomes_a_user_with_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    as_user(monkeypatch, 0)
    identity = identity_wanted("nobody", None)
    assert identity is not None
    assert (identity.uid, identity.gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert set(identity.groups) == set(os.getgrouplist("nobody", NOBODY.pw_gid))
    assert identity_wanted(str(NOBODY.pw_uid), None) == identity


def test_group_replaces_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    as_user(monkeypatch, 0)
    other = next(entry for entry in grp.getgrall() if entry.gr_gid not in (0, NOBODY.pw_gid, os.getegid()))
    identity = identity_wanted("nobody", other.gr_name)
    assert identity is not None and identity.gid == other.gr_gid and NOBODY.pw_gid not in identity.groups
    assert identity_wanted(None, other.gr_name) == Identity(0, other.gr_gid, (other.gr_gid,))


@pytest.mark.parametrize(("user", "group"), [("no-such-user", None), ("999999", None), (None, "no-such-group")])
def test_unknown_user_or_group_is_a_configuration_error(user: str | None, group: str | None) -> None:
    with pytest.raises(BootError, match="on this host") as refused:
        identity_wanted(user, group)
    assert refused.value.code == 78


def test_anybody_but_root_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    as_user(monkeypatch, NOBODY.pw_uid + 1)
    with pytest.raises(BootError) as refused:
        identity_wanted("nobody", None)
    assert refused.value.code == 77


def spray(type_: Literal["tcp", "udp", "all"]) -> Settings:
    address = Address("127.0.0.1", 1)
    tunnel = SprayServerTunnel(name="t", index=0, ports=(80,), type=type_, listen="::", target=address)
    return Settings(role="server", workers=1, keys=(), spray_server_tunnels=(tunnel,))


def test_capabilities_are_for_fake_tcp_alone() -> None:
    assert capabilities_wanted(Settings(role="server", workers=1, keys=())) == frozenset()
    assert capabilities_wanted(spray("udp")) == frozenset()
    for type_ in ("tcp", "all"):
        assert capabilities_wanted(spray(type_)) == {CAP_NET_ADMIN, CAP_NET_RAW}


def become_in_a_process_of_its_own(uid: int, keep: list[int]) -> dict[str, Any]:
    """What it was left with, from a process that had all rights."""
    command = [sys.executable, "-c", BECOMING, json.dumps([uid, keep])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@as_root
def test_what_is_kept_is_two_capabilities_that_no_program_inherits() -> None:
    found = become_in_a_process_of_its_own(NOBODY.pw_uid, [CAP_NET_ADMIN, CAP_NET_RAW])
    kept = found["before"]["CapPrm"] & NETWORK
    assert found["now"] == {**found["before"], "CapPrm": kept, "CapEff": kept, "CapInh": 0, "CapAmb": 0}
    assert (found["packet"], found["filter"]) == (refused(kept, CAP_NET_RAW), refused(kept, CAP_NET_ADMIN))
    assert found["root"] == errno.EPERM
    assert found["program"] == ["CapEff:\t" + "0" * 16]


@as_root
def test_nothing_is_kept_unasked() -> None:
    found = become_in_a_process_of_its_own(NOBODY.pw_uid, [])
    assert found["now"]["CapPrm"] == found["now"]["CapEff"] == found["now"]["CapAmb"] == 0
    assert (found["packet"], found["filter"], found["root"]) == (errno.EPERM,) * 3


@as_root
def test_root_that_changes_its_group_stays_root() -> None:
    found = become_in_a_process_of_its_own(0, [CAP_NET_ADMIN, CAP_NET_RAW])
    assert (found["now"], found["root"]) == (found["before"], None)


def test_soft_limit_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        assert raise_descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_stripes_want_more_descriptors() -> None:
    def wanted(somaxconn: int) -> int:
        address = Address("127.0.0.1", 1)
        tunnel = StripeClientTunnel(name="t", index=0, local=address, remote_end=address, somaxconn=somaxconn)
        return descriptors_wanted(Settings(role="client", workers=2, keys=(), client_tunnels=(tunnel,)))

    assert wanted(1000) >= wanted(10) + 990


def test_more_ports_want_more_descriptors() -> None:
    def wanted(ports: int) -> int:
        address, numbers = Address("127.0.0.1", 1), tuple(range(1, ports + 1))
        tunnel = SprayServerTunnel(name="t", index=0, ports=numbers, type="all", listen="::", target=address)
        return descriptors_wanted(Settings(role="server", workers=2, keys=(), spray_server_tunnels=(tunnel,)))

    assert wanted(1000) >= wanted(10) + 2 * 990
