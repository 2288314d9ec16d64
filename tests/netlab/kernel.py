"""System calls that Python 3.11 does not offer: unshare, setns, and the features of a network interface."""

import ctypes
import fcntl
import os
import socket
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
CLONE_NEWUSER = 0x10000000

# linux/ethtool.h
_SIOCETHTOOL = 0x8946
_GSTRINGS, _GSSET_INFO, _SFEATURES = 0x1B, 0x37, 0x3B
_SS_FEATURES = 4
_STRING_BYTES = 32

_MS_REC, _MS_PRIVATE = 0x4000, 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(descriptor: int) -> None:
    _check(_libc.setns(descriptor, 0), "setns")


def mount_own_sysfs() -> None:
    """Show the present network namespace under /sys. The caller is in a mount namespace of its own."""
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount")
    _check(_libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None), "mount")


def _check(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def map_root(uid: int, gid: int) -> None:
    """Make this process root of the user namespace that it has just made."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def set_features(interface: str, wanted: dict[str, bool]) -> None:
    """Turn offloads of `interface` on or off by their kernel names; names that this kernel lacks are passed over."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        info = _ethtool(control, interface, struct.pack("=IIQI", _GSSET_INFO, 0, 1 << _SS_FEATURES, 0))
        count = struct.unpack_from("=I", info, 16)[0]
        head = struct.pack("=III", _GSTRINGS, _SS_FEATURES, count)
        names = _ethtool(control, interface, head + bytes(count * _STRING_BYTES))[len(head) :]
        words = -(-count // 32)
        valid, value = [0] * words, [0] * words
        for bit in range(count):
            name = names[bit * _STRING_BYTES : (bit + 1) * _STRING_BYTES].split(b"\0")[0].decode()
            if name in wanted:
                valid[bit // 32] |= 1 << bit % 32
                value[bit // 32] |= wanted[name] << bit % 32
        pairs = b"".join(struct.pack("=II", *pair) for pair in zip(valid, value, strict=True))
        _ethtool(control, interface, struct.pack("=II", _SFEATURES, words) + pairs)


def _ethtool(control: socket.socket, interface: str, command: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(command, len(command))
    request = struct.pack("16sP16x", interface.encode(), ctypes.addressof(buffer))
    fcntl.ioctl(control, _SIOCETHTOOL, request)
    return buffer.raw
