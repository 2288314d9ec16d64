"""Rights and limits of the processes: who a worker becomes, that it dies with the supervisor, how much it may open."""

import ctypes
import grp
import os
import pwd
import resource
import signal
import sys
from dataclasses import dataclass

from forwarder.errors import BootError
from workers.settings import Settings

PR_SET_PDEATHSIG = 1  # linux/prctl.h
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


def become(identity: Identity) -> None:
    """Gives up this process's rights for good."""
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    assert os.getresuid() == (identity.uid,) * 3


def die_with_parent(parent: int) -> bool:
    """From now on SIGKILL reaches this process when `parent` ends; False if it already has.

    Call it after `become`: setuid clears the setting.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent


def raise_descriptor_limit() -> int:
    """Raises this process's soft limit of open files to the hard one; the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return DESCRIPTORS_MAX if soft == resource.RLIM_INFINITY else soft


def descriptors_wanted(settings: Settings) -> int:
    """What the busiest process opens when every stripe is up, with some spare for streams."""
    workers = settings.workers
    mesh = 3 * workers * (workers - 1) + 8 * workers
    stripes = sum(tunnel.somaxconn for tunnel in settings.client_tunnels)
    return mesh + 2 * stripes + DESCRIPTORS_SPARE
