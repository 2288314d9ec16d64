"""Real workers of both ends on the loopback interface, and a supervisor that does what it is told, as a program of its
own: `python -m tests.system.generations`.

A line of JSON on standard input is a command, one on standard output its answer: `Generations` is the other side.
"""

import contextlib
import json
import os
import random
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import msgspec

from forwarder.mesh import Mesh, joined_fds
from workers.boot import (
    Boot,
    Drain,
    Drained,
    FromWorker,
    Opened,
    PeerGone,
    PeerJoined,
    Quit,
    Ready,
    Reconfigure,
    Reconfigured,
    Retire,
    StatusReply,
    StatusRequest,
    ToWorker,
)
from workers.settings import Settings, SprayServerTunnel, StripeClientTunnel, StripeServerTunnel, Tunnel

SLOTS = 128
PATIENCE_S = 60.0


class Process:
    """A worker, and our end of its channel."""

    def __init__(self, slot: int, serial: int, pid: int, channel: socket.socket) -> None:
        self.slot, self.serial, self.pid, self.channel = slot, serial, pid, channel
        self.said: list[FromWorker] = []
        self.reports: dict[int, Any] = {}
        self.exit: int | None = None

    def send(self, message: ToWorker, fds: list[int] | None = None) -> None:
        with contextlib.suppress(OSError):
            socket.send_fds(self.channel, [msgspec.msgpack.encode(message)], fds or [])

    def hear(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.channel, 65536, 4)
            except OSError:
                return
            if not data:
                return
            message = msgspec.msgpack.decode(data, type=FromWorker)
            if isinstance(message, StatusReply):
                with open(fds.pop(), "rb") as file:
                    file.seek(0)
                    self.reports[message.request] = json.loads(file.read())
            self.said.append(message)


class End:
    """One instance: `settings` and the workers of its generations."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.mesh = Mesh()
        self.boot_id, self.serial = random.getrandbits(64), random.getrandbits(32)
        self.heartbeat = memoryview(bytearray(8 * SLOTS)).cast("Q")
        self.lifetime = os.pipe()
        self.inboxes: dict[int, tuple[socket.socket, socket.socket]] = {}
        self.listeners: dict[int, list[socket.socket]] = {}
        self.session_ids: dict[int, int] = {}
        self.processes: list[Process] = []
        self.generation: list[Process] = []
        self.next_slot = self.requests = 0
        for tunnel in settings.tunnels:
            self.open(tunnel)

    def open(self, tunnel: Tunnel) -> None:
        self.listeners[tunnel.index] = listeners_of(tunnel)
        self.session_ids[tunnel.index] = random.getrandbits(64)

    def add(self, workers: int, others: list["End"]) -> None:
        """Fork a generation and wait until it serves."""
        if self.next_slot + workers > SLOTS:
            self.next_slot = 0
        base, self.next_slot = self.next_slot, self.next_slot + workers
        slots = range(base, base + workers)
        for slot in slots:
            self.serial = (self.serial + 1) % (1 << 32) or 1
            self.mesh.add(slot, self.serial)
            self.inboxes[slot] = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        old = [process for process in self.processes if process.exit is None]
        new = [self._fork(slot, base, workers, others) for slot in slots]
        for process in new:
            for other in old:
                fds = [*joined_fds(self.mesh.peer(other.slot, process.slot)), self.inboxes[process.slot][1].fileno()]
                other.send(PeerJoined(process.slot, process.serial), fds)
        self.processes += new
        self.generation = new
        self.wait(lambda: all(Ready() in process.said for process in new), "new workers are ready")

    def _fork(self, slot: int, base: int, workers: int, others: list["End"]) -> Process:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        boot = Boot(
            slot=slot,
            workers=workers,
            serial=self.mesh.serials[slot],
            boot_id=self.boot_id,
            settings=msgspec.structs.replace(self.settings, workers=workers),
            arena=self.mesh.arena(slot),
            arena_bytes=self.mesh.arena_bytes,
            channel=theirs,
            inbox=self.inboxes[slot][0],
            lifetime=self.lifetime[0],
            heartbeat=self.heartbeat,
            base=base,
            inboxes={each: self.inboxes[each][1] for each in range(base, base + workers)},
            session_ids=self.session_ids,
            listeners=self._share(slot - base, workers),
            peers=self.mesh.peers(slot),
        )
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(2, 1)
                os.close(self.lifetime[1])
                ours.close()
                for end in [self, *others]:
                    for process in end.processes:
                        process.channel.close()
                for end in others:
                    end.release()
                import logging  # noqa: PLC0415

                logging.basicConfig(
                    level=self.settings.log.level.upper(),
                    format=f"%(relativeCreated)d {self.settings.role} {slot} %(name)s %(message)s",
                )
                from workers.worker import run  # noqa: PLC0415

                run(boot)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        return Process(slot, self.mesh.serials[slot], pid, ours)

    def _share(self, seat: int, workers: int) -> dict[int, list[socket.socket]]:
        own = {tunnel.index for tunnel in self.settings.spray_client_tunnels}
        return {index: sockets[seat::workers] if index in own else sockets for index, sockets in self.listeners.items()}

    def release(self) -> None:
        """In a child of another end: close what is not its own."""
        os.close(self.lifetime[1])
        for sockets in self.listeners.values():
            for sock in sockets:
                sock.close()

    def retire(self) -> None:
        """All but the newest."""
        for process in self.processes:
            if process not in self.generation:
                process.send(Retire())

    def reconfigure(self, settings: Settings) -> None:
        """New tunnels are opened, others are told apart by their index."""
        fresh = [tunnel for tunnel in settings.tunnels if tunnel.index not in self.listeners]
        for index in [index for index in self.listeners if index not in {each.index for each in settings.tunnels}]:
            for sock in self.listeners.pop(index):
                sock.close()
        for tunnel in fresh:
            self.open(tunnel)
        self.settings, self.requests = settings, self.requests + 1
        memory = os.memfd_create("settings")
        os.write(memory, msgspec.msgpack.encode(settings))
        for process in self.alive():
            seat = process.slot - self.generation[0].slot
            for tunnel in fresh if process in self.generation else []:
                share = self._share(seat, len(self.generation))[tunnel.index]
                process.send(Opened(tunnel.index), [sock.fileno() for sock in share])
            fd = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
            process.send(Reconfigure(self.requests, self.session_ids), [fd])
            os.close(fd)
        os.close(memory)
        self.wait(
            lambda: all(Reconfigured(self.requests) in each.said for each in self.alive()), "settings are in effect"
        )

    def alive(self) -> list[Process]:
        return [process for process in self.processes if process.exit is None]

    def turn(self) -> None:
        """What workers say, and who has ended."""
        for process in self.alive():
            process.hear()
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if pid:
                process.hear()
                process.exit = os.waitstatus_to_exitcode(status)
                process.channel.close()
                self.mesh.remove(process.slot)
                for sock in self.inboxes.pop(process.slot):
                    sock.close()
                for other in self.alive():
                    other.send(PeerGone(process.slot, process.serial))

    def wait(self, true: Any, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            select.select([each.channel for each in self.alive()], [], [], 0.02)
            self.turn()
            if time.monotonic() > deadline:
                raise TimeoutError(what)

    def status(self) -> list[Any]:
        self.requests += 1
        asked = [process for process in self.alive() if Drained() not in process.said]
        for process in asked:
            process.send(StatusRequest(self.requests, counts=True))
        self.wait(lambda: all(self.requests in each.reports for each in asked if each.exit is None), "status")
        return [each.reports.pop(self.requests) for each in asked if self.requests in each.reports]


def listeners_of(tunnel: Tunnel) -> list[socket.socket]:
    """As the supervisor opens them, on IPv4."""
    if isinstance(tunnel, StripeClientTunnel | StripeServerTunnel):
        address = tunnel.local if isinstance(tunnel, StripeClientTunnel) else tunnel.listen
        sock = socket.create_server((address.host, address.port), backlog=512)
        sock.setblocking(False)
        return [sock]
    if isinstance(tunnel, SprayServerTunnel):
        return [_udp(tunnel.listen, port) for kind, port in tunnel.carriers if kind == "udp"]
    return [_udp(tunnel.local.host, tunnel.local.port) for _ in range(4)]


def _udp(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.bind((host, port))
    return sock


def serve() -> None:
    """Commands from standard input until it ends."""
    ends: dict[str, End] = {}
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    try:
        while True:
            for end in ends.values():
                end.turn()
            if not selector.select(0.02):
                continue
            line = sys.stdin.readline()
            if not line:
                return
            command = json.loads(line)
            try:
                answer = obey(ends, command)
            except Exception as error:
                answer = {"error": repr(error)}
            print(json.dumps(answer), flush=True)
    finally:
        for end in ends.values():
            for process in end.alive():
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)


def obey(ends: dict[str, End], command: dict[str, Any]) -> Any:
    """One command."""
    name, what = command["end"], command["do"]
    others = [end for other, end in ends.items() if other != name]
    if what == "start":
        ends[name] = End(msgspec.convert(command["settings"], Settings, strict=False))
        ends[name].add(command["workers"], others)
    elif what == "add":
        ends[name].add(command["workers"], others)
    elif what == "reconfigure":
        ends[name].reconfigure(msgspec.convert(command["settings"], Settings, strict=False))
    elif what == "retire":
        ends[name].retire()
    elif what == "drain":
        for process in ends[name].alive():
            process.send(Drain(command["timeout_s"]))
    elif what == "quit":
        for process in ends[name].alive():
            process.send(Quit())
    elif what == "kill":
        os.kill(ends[name].alive()[command["worker"]].pid, signal.SIGKILL)
    elif what == "status":
        return ends[name].status()
    elif what == "exits":
        return [process.exit for process in ends[name].processes]
    return {}


class Generations:
    """The program, as a test uses it."""

    def __init__(self, log: Path) -> None:
        self.log_file = log

    def __enter__(self) -> Self:
        with open(self.log_file, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.system.generations"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=Path(__file__).parents[2],
            )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)

    def do(self, what: str, end: str, **options: Any) -> Any:
        """A command, and its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if "settings" in options:
            options["settings"] = msgspec.to_builtins(options["settings"])
        self._process.stdin.write(json.dumps({"do": what, "end": end, **options}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert not isinstance(answer, dict) or "error" not in answer, f"{answer}\n{self.log_file.read_text()}"
        return answer

    def replace(self, end: str, workers: int) -> None:
        """A whole change of generations."""
        self.do("add", end, workers=workers)
        self.do("retire", end)

    def wait_exits(self, end: str, count: int, timeout_s: float = 20.0) -> list[int | None]:
        """Until so many workers have ended."""
        deadline = time.monotonic() + timeout_s
        while sum(code is not None for code in self.do("exits", end)) < count:
            assert time.monotonic() < deadline, f"{self.do('status', end)}\n{self.log_file.read_text()}"
            time.sleep(0.05)
        return list(self.do("exits", end))


if __name__ == "__main__":
    serve()
