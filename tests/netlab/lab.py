"""Two network namespaces and the link between them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from tests.netlab import build
from tests.netlab.emulator import Emulator, LiveConnection, Report
from tests.netlab.errors import LabError, NamespacesRefused
from tests.netlab.settings import WAYS, Connection, Direction, Link

_ROOT = Path(__file__).parents[2]
_ANSWER_TIMEOUT_S = 20.0

Socket = socket.socket


class Lab:
    """Namespaces `client` and `server`, joined by a link, while the `with` block or this process lives.

    `up` and `down` replace `link` for one direction. `emulate=False` joins the two by a bare veth pair with all
    offloads; then there is nothing to limit, report or break. `addresses` is how many each end has per family.
    With `gro` the ends merge received segments, as most network cards do.
    """

    def __init__(
        self,
        link: Link | None = None,
        *,
        up: Link | None = None,
        down: Link | None = None,
        connections: Sequence[Connection] = (),
        seed: int = 1,
        mtu: int = 1500,
        addresses: int = 1,
        gro: bool = False,
        emulate: bool = True,
    ) -> None:
        link = link or Link()
        self.links = [up or link, down or link]
        self.rules = list(connections)
        self.seed, self.mtu, self.gro, self.emulate = seed, mtu, gro, emulate
        numbers = range(1, addresses + 1)
        self.client_ip4s = [f"198.18.1.{number}" for number in numbers]
        self.server_ip4s = [f"198.18.2.{number}" for number in numbers]
        self.client_ip6s = [f"2001:2::1:{number:x}" for number in numbers]
        self.server_ip6s = [f"2001:2::2:{number:x}" for number in numbers]
        self._started: list[subprocess.Popen[Any]] = []
        self._lock = threading.Lock()
        self._asked = 0
        self._keeper: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._emulator: Emulator | None = None
        self._namespaces: dict[str, int] = {}
        self._user = -1

    @property
    def client_ip4(self) -> str:
        return self.client_ip4s[0]

    @property
    def server_ip4(self) -> str:
        return self.server_ip4s[0]

    @property
    def client_ip6(self) -> str:
        return self.client_ip6s[0]

    @property
    def server_ip6(self) -> str:
        return self.server_ip6s[0]

    def __enter__(self) -> Self:
        try:
            program = build.emulator()
            self._start_keeper()
            if self.emulate:
                self._emulator = Emulator(program, self._user, self._namespaces["link"], self.mtu)
                self._configure(self._emulator)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start_keeper(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.settimeout(_ANSWER_TIMEOUT_S)
        with theirs:
            self._keeper = subprocess.Popen(
                [sys.executable, "-S", "-E", "-m", "tests.netlab.keeper", str(theirs.fileno()), str(os.getpid())],
                cwd=_ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        ends = {"client": self.client_ip4s + self.client_ip6s, "server": self.server_ip4s + self.server_ip6s}
        request = {"do": "make", "emulate": self.emulate, "mtu": self.mtu, "gro": self.gro, "addresses": ends}
        descriptors = self._ask(request)[1]
        self._namespaces = dict(zip(("client", "server", "link"), descriptors, strict=False))
        if len(descriptors) > len(self._namespaces):
            self._user = descriptors[-1]

    def _configure(self, emulator: Emulator) -> None:
        emulator.command(f"seed {self.seed}")
        for way in WAYS["both"]:
            emulator.commands(self.links[way].commands(way))
        for number, rule in enumerate(self.rules):
            emulator.command(f"rule {rule.port}")
            emulator.commands(rule.commands(f"rule {number}"))

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        with self._lock:
            if self._requests is None:
                raise LabError("the lab is closed")
            try:
                return self._exchange(self._requests, request)
            except (TimeoutError, ConnectionError) as error:
                raise LabError(f"the keeper does not answer: {error}") from error

    def _exchange(self, requests: Socket, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        self._asked += 1
        requests.send(json.dumps(request | {"number": self._asked}).encode())
        answer: dict[str, Any] = {}
        descriptors: list[int] = []
        while answer.get("number") != self._asked:  # others are left from a request that a signal cut short
            for descriptor in descriptors:
                os.close(descriptor)
            message, descriptors, _, _ = socket.recv_fds(requests, 65536, 8, socket.MSG_CMSG_CLOEXEC)
            if not message:
                raise LabError("the keeper has died")
            answer = json.loads(message)
        if "refused" in answer:
            raise NamespacesRefused(answer["refused"])
        if "error" in answer:
            raise OSError(answer["errno"], answer["error"])
        return answer, descriptors

    def close(self) -> None:
        """End every process in the namespaces, then the namespaces. Harmless when closed already."""
        try:
            if self._keeper is not None and self._keeper.poll() is None and self._namespaces:
                self._ask({"do": "kill", "names": ["client", "server"]})
                for process in self._started:
                    process.kill()  # if it had not joined its namespace yet
                    process.wait()
        finally:
            self._dismantle()

    def _dismantle(self) -> None:
        if self._emulator is not None:
            self._emulator.close()
        if self._requests is not None:
            self._requests.close()
        if self._keeper is not None:
            self._keeper.wait()
        for descriptor in (*self._namespaces.values(), *([self._user] if self._user >= 0 else [])):
            os.close(descriptor)
        self._emulator = self._requests = self._keeper = None
        self._namespaces, self._user = {}, -1
        self._started.clear()

    # Processes and sockets

    def popen(self, namespace: str, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        """subprocess.Popen inside a namespace. The process, and all that it starts there, dies with the lab."""
        words = [os.fspath(word) for word in argv]
        if not self._namespaces:
            raise LabError("the lab is closed")
        path = (options.get("env") or os.environ).get("PATH")
        if shutil.which(words[0], path=path) is None and "/" not in words[0]:
            raise FileNotFoundError(f"no such program: {words[0]}")
        network = self._namespaces[namespace]
        inherited = [network, *([self._user] if self._user >= 0 else [])]
        process = subprocess.Popen(
            ["netlab-enter", "enter", str(self._user), str(network), *words],
            executable=build.emulator(),
            pass_fds=[*options.pop("pass_fds", ()), *inherited],
            **options,
        )
        self._started.append(process)
        return process

    def run(
        self,
        namespace: str,
        argv: Sequence[str | os.PathLike[str]],
        *,
        timeout: float | None = None,
        check: bool = True,
        input: Any = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """subprocess.run inside a namespace; output is captured as text unless told otherwise."""
        defaults: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        if input is not None:
            defaults["stdin"] = subprocess.PIPE
        process = self.popen(namespace, argv, **(defaults | options))
        try:
            output, errors = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        done = subprocess.CompletedProcess(list(argv), process.returncode, output, errors)
        if check:
            done.check_returncode()
        return done

    def socket(
        self, namespace: str, family: int = socket.AF_INET, type: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> Socket:
        """A socket of a namespace, for use in this process."""
        if namespace not in self._namespaces:
            raise LabError(f"no namespace {namespace}")
        request = {"do": "socket", "namespace": namespace, "family": family, "type": type, "protocol": protocol}
        return socket.socket(fileno=self._ask(request)[1][0])

    def descriptor(self, namespace: str) -> int:
        """Of the namespace, for setns; it is the lab's."""
        return self._namespaces[namespace]

    def listen(
        self, namespace: str, address: str, port: int = 0, *, congestion: str = "cubic", backlog: int = 128
    ) -> Socket:
        listener = self._tcp(namespace, address, congestion)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(backlog)
        return listener

    def connect(
        self, namespace: str, address: str, port: int, *, congestion: str = "cubic", timeout: float = 10.0
    ) -> Socket:
        """A connected TCP socket, blocking for at most `timeout` seconds an operation."""
        connection = self._tcp(namespace, address, congestion)
        connection.settimeout(timeout)
        try:
            connection.connect((address, port))
        except BaseException:
            connection.close()
            raise
        return connection

    def _tcp(self, namespace: str, address: str, congestion: str) -> Socket:
        made = self.socket(namespace, socket.AF_INET6 if ":" in address else socket.AF_INET)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        return made

    # The link

    def change(self, direction: Direction = "both", **changes: float) -> None:
        """Change fields of Link, from now on: `lab.change("down", loss=0.1)`. What waits already keeps its time."""
        emulator = self._running()
        for way in WAYS[direction]:
            self.links[way] = replace(self.links[way], **changes)  # type: ignore[arg-type]
            emulator.commands(self.links[way].commands(way))

    def limit(self, connection: LiveConnection | int, limits: Connection) -> None:
        """Give one connection other limits, from now on."""
        index = connection if isinstance(connection, int) else connection.index
        self._running().commands(limits.commands(f"flow {index}"))

    def blackhole(
        self, connection: LiveConnection | int | None = None, *, port: int | None = None, direction: Direction = "both"
    ) -> int:
        """Drop all packets of one connection, or of those open with this port, or everything (the future, too).

        Returns how many connections that concerns now. `restore` ends it.
        """
        return self._fault("blackhole", connection, port, direction)

    def restore(
        self, connection: LiveConnection | int | None = None, *, port: int | None = None, direction: Direction = "both"
    ) -> int:
        return self._fault("restore", connection, port, direction)

    def reset(self, connection: LiveConnection | int | None = None, *, port: int | None = None) -> int:
        """Reset open TCP connections: both ends read ECONNRESET. Returns how many."""
        return self._fault("reset", connection, port, None)

    def _fault(
        self, verb: str, connection: LiveConnection | int | None, port: int | None, direction: Direction | None
    ) -> int:
        if port is not None:
            which = f"port {port}"
        elif connection is None:
            which = "all"
        else:
            which = f"flow {connection if isinstance(connection, int) else connection.index}"
        ways = "" if direction is None else f" {sum(1 << way for way in WAYS[direction])}"
        return int(self._running().command(f"{verb} {which}{ways}")["connections"])

    def connections(self, *, closed: bool = False) -> list[LiveConnection]:
        """TCP and UDP 4-tuples in order of first appearance; `closed`: with those that have ended."""
        return self._running().connections("all" if closed else "live")

    def report(self) -> Report:
        return self._running().report(int(self._ask({"do": "lost"})[0]["lost"]))

    def clear_report(self) -> None:
        self._running().command("clear")

    def check(self, p99_ms: float = 2.0, max_ms: float | None = None) -> Report:
        """Raise RunVoid if the emulator was late beyond these bounds, or packets were lost by accident."""
        report = self.report()
        report.check(p99_ms, max_ms)
        return report

    @property
    def emulator_pid(self) -> int:
        return self._running().process.pid

    def _running(self) -> Emulator:
        if self._emulator is None:
            raise LabError("this lab has no emulator")
        return self._emulator
