"""`forwarder init`: a starter configuration, valid as it stands, that shows every key.

Prose in it is `# text`; a key that is not set is `#key = value`, with its default unless the prose says otherwise. The
tunnel of mode "spray" is not set as a whole.
conf/ holds the same text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forwarder import keys
from forwarder.errors import ConfigError, ForwarderError, NotPermitted

Role = Literal["client", "server"]

KEY_ID = "laptop"

_GENERAL = """
# What changes below applies with `forwarder reload`, except role, suite, user, group, pin and control.socket.

# Worker processes, 0 to 64. 0: one per core that this process may use.
workers = 0

# The cipher, on both ends the same: "aes256gcm", or "chacha20poly1305" where the CPU has no AES instructions.
suite = "aes256gcm"

# How long a stop waits for open connections to finish. Times are whole numbers of ms, s, m or h; "0s": not at all.
#drain_timeout = "30s"

# Who to become after a start as root. No default: whoever starts it.
#user = "nobody"
#group = "nogroup"

# Bind each worker to a core.
#pin = false
"""

_SECTIONS = """
[control]
# Where `forwarder status`, `reload` and `stop` reach this instance. A relative path is relative to this file.
# Default, after this file's name: /run/forwarder/{role}.sock as root, else in $XDG_RUNTIME_DIR/forwarder, else in
# the temporary directory.
#socket = "/run/forwarder/{role}.sock"

[log]
# "debug", "info", "warning" or "error".
#level = "info"
# "text" or "json", one line each.
#format = "text"
# Needed with --daemon. A relative path is relative to this file. No default: standard error.
#file = "/var/log/forwarder/{role}.log"

# Over HTTP, for whoever can connect there: a page for people at /, metrics for Prometheus at /metrics, and /healthz,
# which answers 200 while all workers are up. An address and a port, "[::]:{metrics_port}" for all. No default: none.
#[metrics]
#listen = "127.0.0.1:{metrics_port}"
"""

_BOTH_ENDS = """
# The largest window of a connection in either direction, 16KiB to 1GiB; sizes are whole numbers of B, KiB, MiB or GiB.
# At least speed x round-trip time: 500 Mbit/s x 100 ms = 6MiB.
#window_max = "32MiB"
# The largest piece that travels on one stripe, 4KiB to 256KiB.
#frame_max = "256KiB"
# How long connections outlive the loss of the last stripe. The shorter one of both ends counts; "0s": not at all.
#resume_timeout = "30s"
# How long {connect_to} may take to answer.
#connect_timeout = "10s"
# TCP congestion control of the stripes, as in net.ipv4.tcp_available_congestion_control. No default: the system's.
#congestion = "bbr"
"""

_SPRAY_BOTH_ENDS = """
# The network device for fake TCP. No default: that of the route to the {other_end}.
#dev = "eth0"
# How fake TCP is sent and captured: "packet", or "pcap" (slower; needs pypcap: libpcap and a raw socket).
#backend = "packet"
# A conversation (a sender's address and port) is over after so long without a datagram either way; "1s" or more.
#duration = "60s"
# How often an idle port is probed; "100ms" or more.
#keepalive = "10s"
# On how many ports each datagram travels: 1, or 2 where many are lost.
#copies = 1
# The largest packet, 576 to 65535 bytes with all headers. No default: what the path turns out to carry.
#mtu = 1400
# To look for faults: write what passes these ports to a file for Wireshark and tcpdump; each worker has one of its own,
# with its number in the name (kcp.0.pcap). A relative path is relative to this file. No default: none.
#capture = "kcp.pcap"
# That file's largest size, 1MiB to 1024GiB: then it begins anew, and the full one is kept (kcp.0.old.pcap).
#capture_max = "64MiB"
"""

_SPRAY_CLIENT = """
# Or of mode "spray": datagrams (UDP), spread over many ports of the server.
#[[tunnel]]
# The name that the tunnel has at the server too.
#name = "kcp"
#mode = "spray"
# The server, as above.
#host = "server.example.net"
# Ports of the server, at most 4096: numbers and ranges. It has to listen on all of them.
#ports = "80,443,10000-10005"
# What a port looks like: "tcp" is fake TCP (needs root or CAP_NET_RAW), "udp" is UDP, "all" is both of each.
#type = "tcp"
# Applications send their datagrams here.
#ludp = "127.0.0.1:30000"
{both_ends}# New ports a second, at most.
#dial_rate = 100
# Dial ports of this age anew. No default: never.
#rotate_after = "1h"
# The address to send from, or an array of addresses that get ports in turn. No default: the system's choice.
#source = "192.0.2.10"
"""

_SPRAY_SERVER = """
# Or of mode "spray": datagrams (UDP), spread over many ports.
#[[tunnel]]
# The name that the tunnel has at the clients too.
#name = "kcp"
#mode = "spray"
# Ports arrive here: an address or a name; "[::]" is all addresses, IPv4 and IPv6.
#listen = "[::]"
# The ports, at most 4096: numbers and ranges.
#ports = "80,443,10000-10005"
# What a port looks like: "tcp" is fake TCP (needs root or CAP_NET_RAW), "udp" is UDP, "all" is both of each.
#type = "tcp"
# Where datagrams go.
#taddr = "127.0.0.1:9999"
{both_ends}# Sessions (running clients) of this tunnel, at most; 1 to 1048576.
#max_sessions = 1024
# Conversations through this tunnel, at most; 1 to 1048576.
#max_conversations = 65536
"""

_CLIENT = """# forwarder, client: makes TCP and UDP ports of a server's network appear here.
#
#   forwarder check -c {role}.toml     what is in effect, or the first mistake
#   forwarder start -c {role}.toml
#   forwarder status -c {role}.toml
#   forwarder reload -c {role}.toml    after a change of this file: connections stay

role = "client"
{general}
# The key that the server knows this client by. Copy the key file to the server, over a safe way, and name it there
# in a [[client]] table. `forwarder genkey` makes another one.
[auth]
key_id = "{key_id}"
# A file with 32 bytes in base64, relative to this file. Or, here: key = "..."
key_file = "{key_id}.key"
{sections}
# One [[tunnel]] for each port.
[[tunnel]]
# The name that the tunnel has at the server too.
name = "web"
mode = "stripe"
# The server: a name, an IPv4 or an IPv6 address. A name is looked up again for every reconnect. Or an array of its
# addresses, host = ["192.0.2.1", "198.51.100.1"]: they get stripes in turn, and those that do not answer, none.
host = "server.example.net"
# The tunnel's port at the server.
host_port = 9000
# Applications connect here: a port of 127.0.0.1. Or an address and a port: local = "[::]:8080"
local_port = 8080
# Stripes (TCP connections to the server), 1 to 4096, shared by all connections of this tunnel. Or "auto": at first 4,
# more (to 256) while that makes the tunnel faster.
somaxconn = 10
{both_ends}# After so long without any connection each worker keeps only one of its stripes.
#idle_timeout = "10m"
# New stripes a second, at most.
#dial_rate = 100
# Replace stripes of this age, the new one first. No default: never.
#rotate_after = "1h"
# The address to connect from, or an array of addresses that get stripes in turn. No default: the system's choice.
#source = "192.0.2.10"
"""

_SERVER = """# forwarder, server: lets clients with a key reach TCP and UDP ports of this network.
#
#   forwarder check -c {role}.toml     what is in effect, or the first mistake
#   forwarder start -c {role}.toml
#   forwarder status -c {role}.toml
#   forwarder reload -c {role}.toml    after a change of this file: connections stay

role = "server"
{general}{sections}
# One [[client]] for each client: its key is its own. A server does not start without.
[[client]]
key_id = "{key_id}"
# A file with 32 bytes in base64, relative to this file: copy it over from the client, where `forwarder init client`
# has made it, or copy this one there. Or, here: key = "..."
key_file = "{key_id}.key"
# The tunnels that this client may use. No default: all of them.
#tunnels = ["web"]

# One [[tunnel]] for each port.
[[tunnel]]
# The name that the tunnel has at the clients too.
name = "web"
mode = "stripe"
# Stripes arrive here: an address or a name; "[::]" is all addresses, IPv4 and IPv6.
#listen = "[::]"
# The port where stripes arrive.
host_port = 9000
# Where connections go: a port of 127.0.0.1. Or a host and a port: remote = "10.0.0.5:80"
remote_port = 80
{both_ends}# Whoever has not proven a key by then is disconnected.
#handshake_timeout = "10s"
# Sessions (running clients) of this tunnel, at most; 1 to 1048576.
#max_sessions = 1024
# Connections through this tunnel, at most; 1 to 1048576.
#max_streams = 65536
"""


@dataclass(frozen=True, slots=True)
class Written:
    """What `init` has left in the directory. `fresh`: the key was made now, not found there."""

    config_file: Path
    key_file: Path
    fresh: bool


def starter_text(role: Role, key_id: str = KEY_ID) -> str:
    """The starter configuration of a role."""
    client = role == "client"
    sections = _SECTIONS.format(role=role, metrics_port=9464 if client else 9465)
    both_ends = _BOTH_ENDS.format(connect_to="the server" if client else "the target")
    text = _CLIENT if client else _SERVER
    stripe = text.format(
        role=role, key_id=key_id, general=_GENERAL, sections=sections, both_ends=both_ends.lstrip("\n")
    )
    spray_both_ends = _SPRAY_BOTH_ENDS.format(other_end="server" if client else "client")
    spray = _SPRAY_CLIENT if client else _SPRAY_SERVER
    return stripe + spray.format(both_ends=spray_both_ends.lstrip("\n"))


def write_starter(role: Role, directory: Path) -> Written:
    """Writes `ROLE.toml` and the key file that it names into `directory`, which is made if need be.

    Overwrites nothing: an existing configuration is an error, an existing key is used as it is. Raises ForwarderError.
    """
    config_file, key_file = directory / f"{role}.toml", directory / f"{KEY_ID}.key"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if config_file.is_symlink() or config_file.exists():
            raise ForwarderError(f"{config_file} exists already: nothing is written")
        fresh = _provide_key(key_file)
        with config_file.open("x") as stream:
            stream.write(starter_text(role))
    except PermissionError as error:
        raise NotPermitted(f"{error.filename}: {error.strerror}") from error
    except OSError as error:
        raise ForwarderError(f"{error.filename}: {error.strerror}") from error
    return Written(config_file, key_file, fresh)


def _provide_key(file: Path) -> bool:
    """Makes the key file; False if there is one already, which then has to hold a key."""
    try:
        keys.write_key_file(file, keys.new_key())
    except FileExistsError:
        try:
            keys.read_key_file(file)
        except keys.KeyMistake as error:
            raise ConfigError(f"{file}: expected 32 bytes in base64, found {error}") from error
        return False
    return True
