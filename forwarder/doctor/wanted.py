"""The kernel settings that an instance wants, each with its reason.

deploy/sysctl/60-forwarder.conf holds the same values, for those who set them without `--fix`.
"""

from typing import NamedTuple

from forwarder.listeners import BACKLOG, DATAGRAM_BUFFER_BYTES
from workers.io.packet import RECEIVE_BUFFER_BYTES

TCP_BUFFER_BYTES = 16 << 20
"""One stripe at 500 Mbit/s and 100 ms has 6 MiB under way; the kernel lets half of a receive buffer be window, and
counts a send buffer with what it needs around the bytes. So it may have to carry all when the others are gone."""

CONNTRACK_ENTRIES = 131_072
"""A tunnel at a server may have 65,536 connections (max_streams, max_conversations), each with one to the target."""
CONNTRACK_PER_BUCKET = 4
"""More entries in a bucket are searched one by one for every packet; Linux had this ratio until 5.14, and 1 since."""

NOFILE = 16_384
"""Without a configuration: 4096 stripes at one end, twice while they are rotated, and as many connections."""

LOCAL_PORTS = 28_232
"""Linux's own range, 32768 to 60999: so many connections go to one target at once, and TIME_WAIT counts."""

MTU = 1280
"""The least that IPv6 asks of a link."""

LOG_FREE_BYTES = 64 << 20
"""Half a million lines: room until somebody looks."""

WORKER_BYTES = 64 << 20
"""A worker with nothing under way is 42 to 54 MB resident."""


class Wanted(NamedTuple):
    """A kernel setting of at least `value`; `place`: which of its numbers, if there are several.

    spray, stripe: matters to tunnels of that mode alone. optional: there only while conntrack is.
    """

    key: str
    value: int
    why: str
    before: tuple[int, ...] = ()
    spray: bool = False
    stripe: bool = False
    optional: bool = False

    @property
    def place(self) -> int:
        return len(self.before)

    @property
    def line(self) -> str:
        """The line of a file in sysctl.d; a setting that may be missing at boot is no error there."""
        return f"{'-' if self.optional else ''}{self.key} = {' '.join(map(str, (*self.before, self.value)))}"


SOMAXCONN = Wanted(
    "net.core.somaxconn",
    BACKLOG,
    "it caps how many new connections may wait to be accepted; those beyond are dropped and tried again a second later",
)
SYN_BACKLOG = Wanted(
    "net.ipv4.tcp_max_syn_backlog",
    BACKLOG,
    "so many handshakes may be under way when all stripes are dialled at once; those beyond are dropped and tried "
    "again a second later. Only while net.ipv4.tcp_syncookies is 0 is it in force",
)
RECEIVE_MAX = Wanted(
    "net.core.rmem_max",
    RECEIVE_BUFFER_BYTES,
    "a packet socket that may hold 8 MiB keeps some 270 runs of 60 KB while its worker is busy, the default 7; only "
    "with CAP_NET_ADMIN does a process pass this limit",
    spray=True,
)
SEND_MAX = Wanted(
    "net.core.wmem_max",
    DATAGRAM_BUFFER_BYTES,
    "UDP sockets ask for 4 MiB, so that a run of datagrams waits for the device and is not refused; only with "
    "CAP_NET_ADMIN does a process pass this limit",
    spray=True,
)
TCP_RECEIVE = Wanted(
    "net.ipv4.tcp_rmem",
    TCP_BUFFER_BYTES,
    "half of it is the largest window of a stripe: 8 MiB are 640 Mbit/s at 100 ms",
    (4096, 131_072),
    stripe=True,
)
TCP_SEND = Wanted(
    "net.ipv4.tcp_wmem",
    TCP_BUFFER_BYTES,
    "what a stripe may have under way, with the kernel's own share: 500 Mbit/s at 100 ms are 6 MiB of bytes alone",
    (4096, 16_384),
    stripe=True,
)
CONNTRACK_MAX = Wanted(
    "net.netfilter.nf_conntrack_max",
    CONNTRACK_ENTRIES,
    "every stripe, port and connection is an entry of conntrack's table; when it is full, new ones are dropped",
    optional=True,
)
CONNTRACK_BUCKETS = Wanted(
    "net.netfilter.nf_conntrack_buckets",
    CONNTRACK_ENTRIES // CONNTRACK_PER_BUCKET,
    "a bucket with more than four entries is searched one by one for every packet",
    optional=True,
)

SYSCTLS = (
    *(SOMAXCONN, SYN_BACKLOG, RECEIVE_MAX, SEND_MAX, TCP_RECEIVE, TCP_SEND),
    *(CONNTRACK_MAX, CONNTRACK_BUCKETS),
)
