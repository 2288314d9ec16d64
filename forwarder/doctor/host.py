"""The system as the checks see it: files below a root, and the few questions that no file answers.

A test gives another root, or a class of its own with other answers.
"""

import ctypes
import fcntl
import importlib.util
import os
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path

from workers.io.route import open_netlink, route_to

RUN_TIMEOUT_S = 10.0
LOOKUP_TIMEOUT_S = 5.0

_SIOCGIFFLAGS, _SIOCGIFMTU, _SIOCETHTOOL = 0x8913, 0x8921, 0x8946
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_FLAGS, _MTU = struct.Struct("16sH22x"), struct.Struct("16si20x")
_ETHTOOL_REQUEST, _ETHTOOL_VALUE = struct.Struct("16sP16x"), struct.Struct("=II")
_OFFLOADS = {"tso": 0x1E, "gso": 0x23, "gro": 0x2B}  # ETHTOOL_GTSO and so on, linux/ethtool.h
_TIMEX_BYTES = 208  # struct timex
_STATUS_AT = 40 if ctypes.sizeof(ctypes.c_long) == 8 else 20
_STA_UNSYNC = 0x40


class Unseen(Exception):
    """What this user may not see, or what this kernel does not say: the reason."""


class Host:
    """This host, or with another `root` a picture of one."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    # Files

    def path(self, path: str) -> Path:
        """An absolute path, or one below the root without its slash, in this picture."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str | None:
        """A file's text; None if there is no such file. Raises Unseen."""
        try:
            return self.path(path).read_text("utf-8", "replace")
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            return None
        except OSError as error:
            raise Unseen(f"/{path.lstrip('/')}: {(error.strerror or str(error)).lower()}") from None

    def numbers(self, key: str) -> list[int] | None:
        """A kernel setting of one or several numbers; None if this kernel does not have it. Raises Unseen."""
        text = self.read("proc/sys/" + key.replace(".", "/"))
        if text is None:
            return None
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise Unseen(f"{key}: not a number") from None

    def stat(self, path: str) -> os.stat_result | None:
        """Raises Unseen."""
        try:
            return self.path(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Unseen(f"{path}: {(error.strerror or str(error)).lower()}") from None

    def may_write(self, path: str) -> bool:
        """Whether this process may write there; the answer of access(2)."""
        return os.access(self.path(path), os.W_OK, effective_ids=True)

    def free_bytes(self, path: str) -> int:
        """What its file system has left for this user. Raises Unseen."""
        try:
            return shutil.disk_usage(self.path(path)).free
        except OSError as error:
            raise Unseen(f"{path}: {(error.strerror or str(error)).lower()}") from None

    def links(self, directory: str) -> list[str]:
        """Where the symbolic links of a directory point. Raises Unseen."""
        folder = self.path(directory)
        try:
            names = os.listdir(folder)
        except OSError as error:
            raise Unseen(f"/{directory}: {(error.strerror or str(error)).lower()}") from None
        found: list[str] = []
        for name in names:
            try:
                found.append(os.readlink(folder / name))
            except OSError:
                continue
        return found

    # Programs and system calls

    @property
    def is_root(self) -> bool:
        return os.geteuid() == 0

    def run(self, *command: str) -> str | None:
        """What a program prints; None if it is not installed. Raises Unseen."""
        program = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            return None
        try:
            done = subprocess.run(
                [program, *command[1:]],
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=RUN_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Unseen(f"{command[0]}: {type(error).__name__}") from None
        if done.returncode:
            reason = done.stderr.strip().splitlines()
            raise Unseen(f"{command[0]}: {reason[0] if reason else f'exit code {done.returncode}'}")
        return done.stdout

    def device(self, name: str) -> tuple[bool, bool, int] | None:
        """Whether a network device is up and has a carrier, and its MTU; None if there is none of that name."""
        request = name.encode()[:15]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                _, flags = _FLAGS.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _FLAGS.pack(request, 0)))
                _, mtu = _MTU.unpack(fcntl.ioctl(sock, _SIOCGIFMTU, _MTU.pack(request, 0)))
            except OSError:
                return None
        return bool(flags & _IFF_UP), bool(flags & _IFF_RUNNING), mtu

    def devices_up(self) -> list[str]:
        """The names of all network devices that are up, but for `lo`."""
        names = [name for _, name in socket.if_nameindex() if name != "lo"]
        return [name for name in names if (found := self.device(name)) is not None and found[0]]

    def offloads(self, name: str) -> dict[str, bool]:
        """tso, gso and gro of a device, as far as its driver says."""
        found: dict[str, bool] = {}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for offload, number in _OFFLOADS.items():
                value = ctypes.create_string_buffer(_ETHTOOL_VALUE.pack(number, 0), _ETHTOOL_VALUE.size)
                try:
                    fcntl.ioctl(sock, _SIOCETHTOOL, _ETHTOOL_REQUEST.pack(name.encode()[:15], ctypes.addressof(value)))
                except OSError:
                    continue
                found[offload] = bool(_ETHTOOL_VALUE.unpack(value.raw)[1])
        return found

    def has_address(self, address: str) -> bool:
        """Whether one may send from that address here."""
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.bind((address, 0))
            except OSError:
                return False
        return True

    def device_of(self, address: str) -> str | None:
        """The device that has an address."""
        import psutil  # noqa: PLC0415  # takes its time, and few configurations have `source`

        for name, entries in psutil.net_if_addrs().items():
            if any(entry.address.partition("%")[0] == address for entry in entries):
                return str(name)
        return None

    def refuses_congestion(self, algorithm: str) -> int | None:
        """The error of choosing a congestion control; None if it can be had."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
            except OSError as error:
                return error.errno
        return None

    def clock_is_set(self) -> bool:
        """Whether something keeps the wall clock right, as the kernel knows. Raises Unseen."""
        buffer = ctypes.create_string_buffer(_TIMEX_BYTES)
        if ctypes.CDLL(None, use_errno=True).adjtimex(buffer) < 0:
            raise Unseen(f"adjtimex: {os.strerror(ctypes.get_errno()).lower()}")
        return not struct.unpack_from("=i", buffer.raw, _STATUS_AT)[0] & _STA_UNSYNC

    def way_to(self, address: str) -> str | None:
        """The device by which packets to a numeric address leave; None if there is no way."""
        try:
            with open_netlink() as netlink:
                return route_to(netlink, address).device
        except OSError:
            return None

    def default_device(self) -> str | None:
        """The device of the default route, IPv4's before IPv6's; None if there is none. Raises Unseen."""
        for line in (self.read("proc/net/route") or "").splitlines()[1:]:
            fields = line.split()
            if fields[1] == fields[7] == "00000000":
                return fields[0]
        for line in (self.read("proc/net/ipv6_route") or "").splitlines():
            fields = line.split()
            if fields[1] == "00" and fields[9] != "lo" and not set(fields[0]) - {"0"}:
                return fields[9]
        return None

    def has_module(self, name: str) -> bool:
        """Whether Python has that module."""
        return importlib.util.find_spec(name) is not None

    def look_up(self, name: str) -> list[str] | str:
        """The addresses of a name, or why it has none. Raises Unseen if nobody answers in time."""
        answer: list[list[str] | str] = []

        def ask() -> None:
            try:
                infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                answer.append(list(dict.fromkeys(str(where[0]) for *_, where in infos)))
            except (OSError, UnicodeError) as error:
                answer.append(str(getattr(error, "strerror", None) or error).lower())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(LOOKUP_TIMEOUT_S)
        if not answer:
            raise Unseen(f"no answer within {LOOKUP_TIMEOUT_S:g} s")
        return answer[0]
