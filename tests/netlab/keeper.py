"""The process that makes the namespaces of one lab, creates sockets in them, and ends what is left in them.

Run as `python -m tests.netlab.keeper DESCRIPTOR MAKER`. It answers JSON requests on a SOCK_SEQPACKET socket; namespace
and socket descriptors travel beside the answers. Namespaces have no name and no mount: they live as long as a
descriptor of the keeper or the maker, or a process in them. When the maker closes the socket or dies, however that
happens, the keeper kills every process in the namespaces and exits.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from tests.netlab import kernel

NAMESPACES = ("client", "server", "link")

_MAC = {"client": "02:00:00:00:00:01", "server": "02:00:00:00:00:02"}

# What cuts or merges segments, so that each packet on the link is one of the MTU's size.
_SEGMENTATION = (
    "tx-tcp-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
    "tx-tcp6-segmentation",
    "tx-udp-segmentation",
    "tx-gso-list",
    "tx-gso-robust",
)
_RECEIVE = ("rx-gro", "rx-gro-list", "rx-udp-gro-forwarding")


class Refused(Exception):
    """Namespaces, or interfaces in them, are not permitted here."""


class Keeper:
    def __init__(self) -> None:
        self.user = -1
        self.descriptors: dict[str, int] = {}

    def make(self, request: dict[str, Any]) -> list[int]:
        """Make namespaces and interfaces; returns descriptors: the namespaces, then the user namespace if any."""
        if not os.path.exists("/proc/self/ns/net"):
            raise Refused("/proc is not mounted")
        try:
            self._unshare()
        except OSError as error:
            raise Refused(str(error)) from error
        links = [("client", "server")] if not request["emulate"] else [("client", "link"), ("server", "link")]
        for end, other in links:
            self._join(end, other, request)
        for end in ("client", "server"):
            self._address(end, request)
        if request["emulate"]:
            self._offload(request["gro"])
            self._spread()
        return [*self.descriptors.values(), *([self.user] if self.user >= 0 else [])]

    def _unshare(self) -> None:
        uid, gid = os.geteuid(), os.getegid()
        for name in NAMESPACES:
            try:
                kernel.unshare(kernel.CLONE_NEWNET)
            except PermissionError:
                kernel.unshare(kernel.CLONE_NEWUSER)
                kernel.map_root(uid, gid)
                self.user = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
                kernel.unshare(kernel.CLONE_NEWNET)
            self.descriptors[name] = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def _join(self, end: str, other: str, request: dict[str, Any]) -> None:
        peer = f"to-{end}" if other == "link" else "eth0"
        target = self.descriptors[other]
        os.set_inheritable(target, True)
        self._ip(
            end,
            f"link add eth0 address {_MAC[end]} mtu {request['mtu']} type veth "
            f"peer name {peer} {'' if other == 'link' else 'address ' + _MAC[other]} mtu {request['mtu']} "
            f"netns /proc/self/fd/{target}",
        )
        os.set_inheritable(target, False)
        if other == "link":
            self._ip(other, f"link set {peer} addrgenmode none", f"link set {peer} up")

    def _address(self, end: str, request: dict[str, Any]) -> None:
        lines = ["link set lo up", "link set eth0 addrgenmode none", "link set eth0 up"]
        for address in request["addresses"][end]:
            prefix = "64 dev eth0 nodad" if ":" in address else "16 dev eth0"
            lines.append(f"addr add {address}/{prefix}")
        # Known neighbours: what waits for an ARP answer is overtaken by what is sent just after it came.
        other = "server" if end == "client" else "client"
        lines += [
            f"neigh add {peer} lladdr {_MAC[other]} dev eth0 nud permanent" for peer in request["addresses"][other]
        ]
        self._ip(end, *lines)

    def _ip(self, namespace: str, *lines: str) -> None:
        kernel.setns(self.descriptors[namespace])
        done = subprocess.run(
            ["ip", "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, close_fds=False, check=False
        )
        if done.returncode:
            raise Refused(f"ip in {namespace}: {done.stderr.strip()}")

    def _offload(self, gro: bool) -> None:
        for end in ("client", "server"):
            kernel.setns(self.descriptors[end])
            kernel.set_features("eth0", dict.fromkeys(_SEGMENTATION, False) | dict.fromkeys(_RECEIVE, gro))

    def _spread(self) -> None:
        """Receive on all cores: otherwise both ends' TCP runs inside the emulator's sends (a third of its time, at 400
        Mbit/s). Not permitted everywhere."""
        mask = f"{(1 << min(os.cpu_count() or 1, 32)) - 1:x}"
        try:
            kernel.unshare(kernel.CLONE_NEWNS)
            for end in ("client", "server"):
                kernel.setns(self.descriptors[end])
                kernel.mount_own_sysfs()
                with open("/sys/class/net/eth0/queues/rx-0/rps_cpus", "w", encoding="ascii") as file:
                    file.write(mask)
        except OSError:
            return

    def socket(self, request: dict[str, Any]) -> list[int]:
        kernel.setns(self.descriptors[request["namespace"]])
        made = socket.socket(request["family"], request["type"], request["protocol"])
        return [made.detach()]

    def lost(self) -> int:
        """Packets that the kernel dropped between the interfaces of the lab."""
        total = 0
        for name, descriptor in self.descriptors.items():
            kernel.setns(descriptor)
            with open("/proc/self/net/dev", encoding="ascii") as file:
                for line in file.readlines()[2:]:
                    interface, counters = line.split(":")
                    if interface.strip() != "lo" or name == "link":
                        total += int(counters.split()[11])
        return total

    def kill(self, names: list[str]) -> None:
        """Kill every process in these namespaces, except the keeper; a process that appears meanwhile, too."""
        wanted = {os.fstat(self.descriptors[name]).st_ino for name in names if name in self.descriptors}
        until = time.monotonic() + 5
        while wanted and time.monotonic() < until:
            victims = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _kill_in(pid, wanted)]
            if not victims:
                return
            time.sleep(0.001)


def _kill_in(pid: int, namespaces: set[int]) -> bool:
    """Whether `pid` was alive in one of these namespaces."""
    if pid == os.getpid():
        return False
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if os.stat(f"/proc/{pid}/ns/net").st_ino not in namespaces:
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _answer(keeper: Keeper, request: dict[str, Any]) -> tuple[dict[str, Any], list[int], list[int]]:
    """The answer, the descriptors that go with it, and those of them to close afterwards."""
    match request["do"]:
        case "make":
            return {}, keeper.make(request), []
        case "socket":
            made = keeper.socket(request)
            return {}, made, made
        case "lost":
            return {"lost": keeper.lost()}, [], []
        case "kill":
            keeper.kill(request["names"])
            return {}, [], []
    return {"error": f"unknown request {request['do']}"}, [], []


def serve(keeper: Keeper, requests: socket.socket, maker: int) -> None:
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    poll.register(maker, select.POLLIN)
    while not any(descriptor == maker for descriptor, _ in poll.poll()):
        message = requests.recv(65536)
        if not message:
            return
        request = json.loads(message)
        to_close: list[int] = []
        try:
            answer, descriptors, to_close = _answer(keeper, request)
        except Refused as refused:
            answer, descriptors = {"refused": str(refused)}, []
        except OSError as error:
            answer, descriptors = {"error": str(error), "errno": error.errno}, []
        socket.send_fds(requests, [json.dumps(answer | {"number": request["number"]}).encode()], descriptors)
        for descriptor in to_close:
            os.close(descriptor)


def main() -> None:
    """The maker's pid is our parent's, or it has died already."""
    descriptor, maker = int(sys.argv[1]), int(sys.argv[2])
    keeper = Keeper()
    try:
        watched = os.pidfd_open(maker)
        if os.getppid() == maker:
            serve(keeper, socket.socket(fileno=descriptor), watched)
    except (ProcessLookupError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        keeper.kill(list(NAMESPACES))


if __name__ == "__main__":
    main()
