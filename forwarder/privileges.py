"""Rights and limits of the processes: who a worker becomes and what it keeps then, that it dies with the supervisor,
how much it may open."""

import ctypes
import grp
import os
import pwd
import resource
import signal
import sys
from collections.abc import Collection
from dataclasses import dataclass

from forwarder.errors import BootError
from workers.settings import Settings

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_KEEPCAPS = 8

CAP_NET_ADMIN, CAP_NET_RAW = 12, 13  # linux/capability.h
_CAPABILITY_VERSION_3 = 0x20080522
_CapabilityHeader = ctypes.c_uint32 * 2  # version, process: 0 is the calling one
_CapabilitySets = ctypes.c_uint32 * 6  # effective, permitted and inheritable ones of 0 to 31, then of 32 to 63
_EFFECTIVE, _PERMITTED = 0, 1
# Some hosts have a hard limit of a thousand million, and the kernel sizes tables after the limit in use.
DESCRIPTORS_MAX = 1 << 20
DESCRIPTORS_SPARE = 512


@dataclass(frozen=True, slots=True)
class Identity:
    """User and groups to become."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def identity_wanted(user: str | None, group: str | None) -> Identity | None:
    """What `user` and `group` ask for; None if that is what this process is. Raises BootError.

    Without `group` the user's own groups; without `user` only the group changes.
    """
    if user is None and group is None:
        return None
    uid, gid = os.geteuid(), os.getegid()
    if user is not None:
        try:
            entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
        except KeyError:
            raise BootError(78, f"user: no user {user!r} on this host") from None
        uid, gid, user = entry.pw_uid, entry.pw_gid, entry.pw_name
    if group is not None:
        try:
            gid = (grp.getgrgid(int(group)) if group.isdecimal() else grp.getgrnam(group)).gr_gid
        except KeyError:
            raise BootError(78, f"group: no group {group!r} on this host") from None
    if (uid, gid) == (os.geteuid(), os.getegid()):
        return None
    if os.geteuid() != 0:
        raise BootError(77, "user, group: only root may become another user or group")
    groups = tuple(os.getgrouplist(user, gid)) if user is not None else (gid,)
    return Identity(uid, gid, groups)


def capabilities_wanted(settings: Settings) -> frozenset[int]:
    """What a worker needs beyond a plain user's rights: none but for ports of fake TCP.

    CAP_NET_RAW opens packet sockets; CAP_NET_ADMIN keeps payload from the kernel's TCP and makes buffers large.
    """
    faking = any("tcp" in tunnel.kinds for tunnel in settings.spray_tunnels)
    return frozenset((CAP_NET_ADMIN, CAP_NET_RAW)) if faking and sys.platform == "linux" else frozenset()


def become(identity: Identity, keep: Collection[int] = ()) -> None:
    """Gives up this process's rights for good, but for those capabilities of `keep` that it has.

    No program that it starts inherits them. A root process stays one when only its group changes. Raises OSError.
    """
    if keep:
        _control(PR_SET_KEEPCAPS, 1)
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    assert os.getresuid() == (identity.uid,) * 3
    if keep:
        _control(PR_SET_KEEPCAPS, 0)
        if identity.uid != 0:
            _reduce_capabilities(keep)


def give_up_capabilities() -> None:
    """Gives up all that this process may do beyond a plain user's rights, though it may be root's. Raises OSError."""
    if sys.platform == "linux":
        _reduce_capabilities(())


def _reduce_capabilities(keep: Collection[int]) -> None:
    """Reduces what is permitted to `keep` and makes that effective, and nothing inheritable."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, held, wanted = _CapabilityHeader(_CAPABILITY_VERSION_3, 0), _CapabilitySets(), _CapabilitySets()
    if libc.capget(header, held) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for number in keep:
        row, bit = number // 32 * 3, 1 << number % 32
        wanted[row + _PERMITTED] |= held[row + _PERMITTED] & bit
        wanted[row + _EFFECTIVE] |= held[row + _PERMITTED] & bit
    if libc.capset(header, wanted) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def die_with_parent(parent: int) -> bool:
    """From now on SIGKILL reaches this process when `parent` ends; False if it already has.

    Call it after `become`: setuid clears the setting.
    """
    if sys.platform == "linux":
        _control(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    return os.getppid() == parent


def _control(option: int, value: int) -> None:
    """prctl. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def raise_descriptor_limit() -> int:
    """Raises this process's soft limit of open files to the hard one; the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return DESCRIPTORS_MAX if soft == resource.RLIM_INFINITY else soft


def descriptors_wanted(settings: Settings) -> int:
    """What the busiest process opens when every stripe and port is up, with some spare for what they carry."""
    workers = 2 * settings.workers  # while one generation follows another
    mesh = 3 * workers * (workers - 1) + 8 * workers
    stripes = sum(tunnel.somaxconn for tunnel in settings.client_tunnels)
    ports = sum(len(tunnel.carriers) for tunnel in settings.spray_tunnels)
    return mesh + 2 * stripes + 2 * ports + DESCRIPTORS_SPARE
