"""Becoming another user: what is dropped, and who may."""

import grp
import os
import pwd
import resource

import pytest

from forwarder.errors import BootError
from forwarder.privileges import Identity, descriptors_wanted, identity_wanted, raise_descriptor_limit
from workers.settings import Address, Settings, StripeClientTunnel

NOBODY = pwd.getpwnam("nobody")
SOMEBODY = pwd.getpwuid(os.geteuid())


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
