"""Network namespaces joined by a link that misbehaves as told. Needs `ip` (iproute2) and a C compiler with
libc's headers (Debian: gcc, libc6-dev).

    with Lab(Link(delay_ms=25, loss=0.01, rate_bps=500e6), connections=[Connection(rate_bps=10e6)], seed=7) as lab:
        server = lab.popen("server", ["iperf3", "-s", "-1"])
        lab.run("client", ["iperf3", "-C", "cubic", "-c", lab.server_ip4, "-t", "3"])
        with lab.connect("client", lab.server_ip6, 80) as connection: ...   # from this very process
        lab.check()                                                         # raises RunVoid: the figures are worthless

     namespace client            namespace link             namespace server
    +------------------+    +---------------------+    +------------------+
    | 198.18.1.1       |    |      emulator       |    |       198.18.2.1 |
    | 2001:2::1:1 eth0 |----| to-client to-server |----| eth0 2001:2::2:1 |      Lab(emulate=False): eth0 to eth0
    +------------------+    +---------------------+    +------------------+

*Up* is client to server. A link's values may differ by direction (`Lab(up=Link(...), down=Link(...))`), and each
connection (4-tuple) may have limits of its own (`connections=`). Two MTU-sized frames never travel as one: the ends'
segmentation offloads are off. Checksums are complete, so corruption is seen by the receiver.
Faults while it runs: `blackhole`, `restore`, `reset`, `change`, `limit`; `connections()` lists what is there.

Without root, a user namespace is tried; `NamespacesRefused` says why there is no lab. Everything ends with the block or
with the process that made it, however it dies. Congestion control in a new namespace is the host's default: set it.
Times and rates are real: a test that measures calls `check`, and is run again when it raises RunVoid (`rerun_if_void`).
"""

from tests.netlab.emulator import LiveConnection, Report, Way
from tests.netlab.errors import LabError, LabUnavailable, NamespacesRefused, NoCompiler, RunVoid
from tests.netlab.lab import Lab
from tests.netlab.rerun import rerun_if_void
from tests.netlab.settings import Connection, Direction, Link

__all__ = [
    "Connection",
    "Direction",
    "Lab",
    "LabError",
    "LabUnavailable",
    "Link",
    "LiveConnection",
    "NamespacesRefused",
    "NoCompiler",
    "Report",
    "RunVoid",
    "Way",
    "rerun_if_void",
]
