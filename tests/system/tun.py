"""A device without link headers in each namespace of a lab, joined by a thread of this process."""

import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from tests.netlab import Lab

ADDRESSES = {"client": ("10.9.0.1", "fd09::1"), "server": ("10.9.0.2", "fd09::2")}
_NETWORKS = ("10.9.0.0/24", "fd09::/64")

# TUNSETIFF, IFF_TUN | IFF_NO_PI
_OPEN = """
import fcntl, os, socket, struct, sys
tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"tun0", 0x1001))
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"tun"], [tun])
"""


@contextmanager
def joined_tun(lab: Lab) -> Iterator[None]:
    """tun0 in both namespaces while the block runs. Skips the test where TUN devices are not permitted (needs root)."""
    with ExitStack() as stack:
        ends = [_open(lab, namespace) for namespace in ADDRESSES]
        for end in ends:
            stack.callback(os.close, end)
        stop, stopped = os.pipe()
        stack.callback(os.close, stop)
        pump = threading.Thread(target=_pump, args=(ends, stop), daemon=True)
        pump.start()
        stack.callback(pump.join)
        stack.callback(os.close, stopped)
        for namespace, addresses in ADDRESSES.items():
            lines = ["link set tun0 up", *(f"addr add {address} dev tun0" for address in addresses)]
            lines += [f"route add {network} dev tun0" for network in _NETWORKS]
            lab.run(namespace, ["ip", "-batch", "-"], input="\n".join(lines))
        yield


def _open(lab: Lab, namespace: str) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            argv = [sys.executable, "-c", _OPEN, str(theirs.fileno())]
            done = lab.run(namespace, argv, pass_fds=[theirs.fileno()], check=False, timeout=30)
        if done.returncode:
            pytest.skip(f"no TUN device here: {done.stderr.splitlines()[-1]}")
        return socket.recv_fds(ours, 16, 1)[1][0]


def _pump(ends: list[int], stop: int) -> None:
    """Pass packets both ways until `stop` ends."""
    other = dict(zip(ends, reversed(ends), strict=True))
    while True:
        ready = select.select([*ends, stop], [], [])[0]
        if stop in ready:
            return
        for end in ready:
            packet = os.read(end, 65_536)
            with suppress(OSError):  # the other is not up yet
                os.write(other[end], packet)
