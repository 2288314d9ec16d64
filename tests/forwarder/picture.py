"""A host for `doctor` to look at that is a directory of files and a few answers."""

from pathlib import Path

from forwarder.doctor.host import Host, Unseen

LIMITS = "Limit Soft Limit Hard Limit Units\nMax open files            {} {} files\n"
STATUS = "Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t{:016x}\n"
WELL = {
    "net.core.somaxconn": "4096",
    "net.ipv4.tcp_max_syn_backlog": "4096",
    "net.ipv4.tcp_syncookies": "0",
    "net.core.rmem_max": "8388608",
    "net.core.wmem_max": "4194304",
    "net.ipv4.tcp_rmem": "4096\t131072\t16777216",
    "net.ipv4.tcp_wmem": "4096\t16384\t16777216",
    "net.ipv4.ip_local_port_range": "32768\t60999",
    "net.ipv4.tcp_available_congestion_control": "reno cubic bbr",
    "net.ipv4.tcp_congestion_control": "cubic",
    "net.netfilter.nf_conntrack_max": "262144",
    "net.netfilter.nf_conntrack_buckets": "65536",
    "net.netfilter.nf_conntrack_count": "10",
    "kernel.osrelease": "6.1.0-18-amd64",
}


class Picture(Host):
    """A host that lacks nothing; tests change its files and answers. denied: paths that may not be read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root_user = True
        self.denied: set[str] = set()
        self.programs: dict[str, str | Unseen] = {"nft": '{"nftables": []}', "iptables-save": "", "ip6tables-save": ""}
        self.devices: dict[str, tuple[bool, bool, int]] = {"eth0": (True, True, 1500)}
        self.its_offloads = {"gso": True, "gro": True, "tso": True}
        self.addresses = {"192.0.2.1": "eth0", "198.51.100.1": "eth1"}
        self.names: dict[str, list[str] | str] = {"server.example.net": ["203.0.113.1"]}
        self.congestions = {"bbr", "cubic"}
        self.synchronised = True
        self.free = 1 << 30
        for key, value in WELL.items():
            self.set(key, value)
        self.write("proc/self/limits", LIMITS.format(1024, 524288))
        self.write("proc/self/status", STATUS.format((1 << 41) - 1))
        self.write("proc/self/uid_map", "         0          0 4294967295\n")
        self.write("proc/meminfo", "MemTotal:       16000000 kB\nMemAvailable:   15000000 kB\n")
        self.write("proc/net/route", "Iface\tDestination\neth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n")
        self.write("etc/sysctl.d/README", "")

    def write(self, path: str, text: str) -> None:
        file = self.path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def set(self, key: str, value: str) -> None:
        self.write("proc/sys/" + key.replace(".", "/"), value + "\n")

    def get(self, key: str) -> str:
        return " ".join(self.path("proc/sys/" + key.replace(".", "/")).read_text().split())

    def remove(self, key: str) -> None:
        self.path("proc/sys/" + key.replace(".", "/")).unlink()

    @property
    def is_root(self) -> bool:
        return self.root_user

    def read(self, path: str) -> str | None:
        if path in self.denied:
            raise Unseen(f"/{path}: permission denied")
        return super().read(path)

    def run(self, *command: str) -> str | None:
        answer = self.programs.get(command[0])
        if isinstance(answer, Unseen):
            raise answer
        return answer

    def device(self, name: str) -> tuple[bool, bool, int] | None:
        return self.devices.get(name)

    def devices_up(self) -> list[str]:
        return [name for name, (up, _, _) in self.devices.items() if up]

    def offloads(self, name: str) -> dict[str, bool]:
        return self.its_offloads

    def has_address(self, address: str) -> bool:
        return address in self.addresses

    def device_of(self, address: str) -> str | None:
        return self.addresses.get(address)

    def way_to(self, address: str) -> str | None:
        return "eth0"

    def look_up(self, name: str) -> list[str] | str:
        return self.names.get(name, "name or service not known")

    def refuses_congestion(self, algorithm: str) -> int | None:
        return None if algorithm in self.congestions else 2

    def clock_is_set(self) -> bool:
        return self.synchronised

    def free_bytes(self, path: str) -> int:
        return self.free

    def has_module(self, name: str) -> bool:
        return False
