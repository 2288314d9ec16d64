"""A router between a lab's ends that translates addresses and believes nothing: MASQUERADE with random ports, strict
connection tracking, and what that calls invalid is dropped.

     client of `lab` ---- inside0 +--------+
        198.18.1.1                | router | outside ---- server of `lab`
     client of `lab2` --- inside1 +--------+               198.18.2.1
        198.18.3.1
"""

import os
import socket
import struct
import subprocess
from typing import Self

import pytest

from tests.netlab import Lab, LabUnavailable

ROUTER = "link"
"""The namespace of a lab without an emulator that nothing else is in."""
OUTSIDE = "198.18.2.254"
_NETLINK_NETFILTER, _CONNTRACK_DELETE, _REQUEST, _ACKNOWLEDGE = 12, 1 << 8 | 2, 1, 4
_ERROR = 2
_SETTINGS = {
    "net/ipv4/ip_forward": 1,
    "net/netfilter/nf_conntrack_tcp_be_liberal": 0,
    "net/netfilter/nf_conntrack_tcp_loose": 0,
    "net/netfilter/nf_conntrack_checksum": 1,
}
_RULES = (
    "-A INPUT -m conntrack --ctstate INVALID -j DROP",
    "-A INPUT -i outside -j DROP",
    "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
    "-A FORWARD -i outside -m conntrack --ctstate NEW -j DROP",
    "-t nat -A POSTROUTING -o outside -j MASQUERADE --random",
)


class StrictNat:
    """`labs`: of two clients; the server is the first one's. Skips the test where there are no such rules."""

    def __init__(self) -> None:
        self.labs = Lab(emulate=False), Lab(emulate=False)

    def __enter__(self) -> Self:
        first, second = self.labs
        first.__enter__()
        try:
            second.__enter__()
            for name, lab, end, address in (
                ("inside0", first, "client", first.client_ip4),
                ("inside1", second, "client", "198.18.3.1"),
                ("outside", first, "server", first.server_ip4),
            ):
                self._join(name, lab, end, address)
            for setting, value in _SETTINGS.items():
                self.router("sh", "-c", f"echo {value} > /proc/sys/{setting}")
            for rule in _RULES:
                self.router("iptables", "-w", *rule.split())
        except BaseException as error:
            self.close()
            if isinstance(error, subprocess.CalledProcessError):
                pytest.skip(f"no such router here: {error.stderr}")
            if isinstance(error, FileNotFoundError):
                pytest.skip(str(error))
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for lab in reversed(self.labs):
            lab.close()

    def _join(self, name: str, lab: Lab, end: str, address: str) -> None:
        gateway = address.rpartition(".")[0] + ".254"
        lab.run(end, ["ip", "link", "del", "eth0"], check=False)
        # Whoever is in a namespace names it.
        holder = lab.popen(end, ["sh", "-c", "echo; exec sleep 3600"], stdout=subprocess.PIPE)
        assert holder.stdout is not None
        holder.stdout.readline()
        self.router(*f"ip link add {name} type veth peer name eth0 netns {holder.pid}".split())
        self.router(*f"ip addr add {gateway}/24 dev {name}".split())
        self.router(*f"ip link set {name} up".split())
        for line in ("link set eth0 up", f"addr add {address}/24 dev eth0", f"route add default via {gateway}"):
            if end == "client" or not line.startswith("route"):
                lab.run(end, ["ip", *line.split()])

    def router(self, *command: str) -> str:
        """Run a command in the router; its output."""
        done = self.labs[0].run(ROUTER, command)
        output: str = done.stdout
        return output

    def mappings(self, protocol: str) -> set[tuple[int, int]]:
        """The ports of each connection of TCP or UDP: as the server sees its client's, and the server's own."""
        found = set()
        for line in self.router("cat", "/proc/net/nf_conntrack").splitlines():
            if f" {protocol} " in line:
                answer = line.split(" src=")[2]
                ports = dict(word.split("=") for word in answer.split() if "=" in word)
                found.add((int(ports["dport"]), int(ports["sport"])))
        return found

    def invalid(self) -> int:
        """How many forwarded packets were dropped as invalid."""
        for line in self.router("iptables", "-w", "-nvxL", "FORWARD").splitlines():
            if "INVALID" in line:
                return int(line.split()[0])
        raise LabUnavailable("iptables does not count")

    def forget(self) -> None:
        """Lose all mappings, as a router that restarts."""
        with self.labs[0].socket(ROUTER, socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as sock:
            sock.settimeout(5)
            content = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
            flags = _REQUEST | _ACKNOWLEDGE
            sock.send(struct.pack("=IHHII", 16 + len(content), _CONNTRACK_DELETE, flags, 1, 0) + content)
            answer = sock.recv(4096)
        kind, number = struct.unpack_from("=H", answer, 4)[0], struct.unpack_from("=i", answer, 16)[0]
        assert kind == _ERROR
        if number:
            raise OSError(-number, os.strerror(-number))
