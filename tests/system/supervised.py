"""An instance whose workers are fakes, as a program of its own: `python -m tests.system.supervised PLAN.json`.

The fakes speak the channel's protocol, beat, and append what happens to them to a journal of JSON lines. They prove
what memory they share by writing their serial into their arena and into every ring to a peer.
"""

import dataclasses
import itertools
import json
import os
import select
import socket
import sys
import time
from logging import INFO
from pathlib import Path
from typing import Any

import msgspec

from forwarder import upgrading
from forwarder.config import Loaded
from forwarder.errors import ConfigError
from forwarder.launch import resume, run
from forwarder.logs import log
from forwarder.source import Source
from forwarder.timing import Timing
from forwarder.upgrade import inherited
from workers.boot import (
    Boot,
    Drain,
    Drained,
    Failed,
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
from workers.settings import Settings
from workers.status import SessionStatus, TunnelStatus, WorkerReport, WorkerStatus

BEAT_S = 0.05


class Plan(msgspec.Struct, kw_only=True):
    """behaviour: slot -> what its first process does (with "!" every one of it; all: every process of every slot)."""

    settings: Settings
    timing: Timing
    behaviour: dict[str, str] = {}
    journal: str
    pid_file: str | None = None
    daemon: bool = False


class FakeWorker:
    def __init__(self, boot: Boot, behaviour: str, journal: int) -> None:
        self.boot = boot
        self.behaviour = behaviour
        self.journal = journal
        self.serials = {boot.slot: boot.serial}
        self.arenas: dict[int, int] = {}
        self.from_rings: dict[int, int] = {}
        self.inbox_count = 0
        self.drain_at: float | None = None
        self.opened: dict[int, list[socket.socket]] = {}

    def note(self, event: str, **values: Any) -> None:
        line = {"event": event, "slot": self.boot.slot, "serial": self.boot.serial, "pid": os.getpid(), **values}
        os.write(self.journal, json.dumps(line).encode() + b"\n")

    def run(self) -> None:
        self.note(
            "born",
            peers=[[peer.slot, peer.serial] for peer in self.boot.peers],
            uid=os.getuid(),
            cores=sorted(os.sched_getaffinity(0)),
            stray=self.stray_fds(),
            listeners={index: len(socks) for index, socks in self.boot.listeners.items()},
            base=self.boot.base,
            workers=self.boot.workers,
            boot_id=self.boot.boot_id,
        )
        if self.behaviour == "crash":
            raise RuntimeError("this fake crashes")
        if self.behaviour == "fail":
            self.send(Failed(78, "this fake cannot start"))
            return
        os.pwrite(self.boot.arena, self.boot.serial.to_bytes(8), 0)
        for peer in self.boot.peers:
            self.meet(peer.slot, peer.serial, peer.arena, peer.to_peer.memory, peer.from_peer.memory)
        if self.behaviour != "late":
            self.send(Ready())
        log(INFO, "a fake is born", serial=self.boot.serial)
        while self.turn():
            pass
        self.note("leaving")

    def meet(self, slot: int, serial: int, arena: int, to_ring: int, from_ring: int) -> None:
        self.serials[slot] = serial
        self.arenas[slot], self.from_rings[slot] = arena, from_ring
        os.pwrite(to_ring, self.boot.serial.to_bytes(8), 0)
        if slot in self.boot.inboxes:
            self.boot.inboxes[slot].send(b"hello")

    def stray_fds(self) -> list[str]:
        """What is open that the boot parameters do not explain."""
        boot = self.boot
        known = {
            0,
            1,
            2,
            self.journal,
            boot.arena,
            boot.stats,
            boot.lifetime,
            boot.channel.fileno(),
            boot.inbox.fileno(),
        }
        known |= {sock.fileno() for sock in boot.inboxes.values()}
        known |= {sock.fileno() for socks in boot.listeners.values() for sock in socks}
        for peer in boot.peers:
            known.add(peer.arena)
            known |= {*dataclasses.astuple(peer.to_peer), *dataclasses.astuple(peer.from_peer)}
        stray = []
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in known and os.path.exists(f"/proc/self/fd/{name}"):
                stray.append(os.readlink(f"/proc/self/fd/{name}"))
        return [name for name in stray if not name.startswith("/memfd:forwarder-heartbeat")]

    def turn(self) -> bool:
        if self.behaviour != "hang":
            self.boot.heartbeat[self.boot.slot] += 1
        select.select([self.boot.channel], [], [], BEAT_S)
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.boot.channel, 65536, 64)
            except BlockingIOError:
                break
            if not data and self.behaviour != "stubborn":
                return False
            if not data:
                time.sleep(BEAT_S)
                break
            if not self.on_message(msgspec.msgpack.decode(data, type=ToWorker), fds):
                return False
        if self.drain_at is not None and time.monotonic() >= self.drain_at:
            self.send(Drained())
            return False
        return True

    def on_message(self, message: ToWorker, fds: list[int]) -> bool:
        self.note(type(message).__name__, message=msgspec.to_builtins(message))
        match message:
            case StatusRequest(request) if self.behaviour != "mute":
                self.report(request)
            case Drain() if self.behaviour != "stubborn":
                for sock in itertools.chain(*self.boot.listeners.values()):
                    sock.close()
                self.drain_at = time.monotonic() + (0.5 if self.behaviour == "slow" else 0.0)
            case Quit():
                return self.behaviour == "stubborn"
            case PeerGone(slot, serial):
                assert self.serials.pop(slot) == serial
            case PeerJoined(slot, serial):
                arena, to_ring, _, _, from_ring, _, _, inbox = fds
                kinds = [os.readlink(f"/proc/self/fd/{fd}").split(" ")[0] for fd in fds]
                self.note("joined", kinds=kinds)
                self.boot.inboxes[slot] = socket.socket(fileno=inbox)
                self.meet(slot, serial, arena, to_ring, from_ring)
            case Retire() if self.behaviour != "busy":
                self.drain_at = time.monotonic() + 0.1
            case Opened(tunnel):
                self.opened.setdefault(tunnel, []).extend(socket.socket(fileno=fd) for fd in fds)
            case Reconfigure(number):
                self.reconfigure(fds[0])
                self.send(Reconfigured(number))
            case _:
                pass
        return True

    def reconfigure(self, memory: int) -> None:
        """Has the listening sockets that these settings speak of, and no others."""
        settings = msgspec.msgpack.decode(os.pread(memory, os.fstat(memory).st_size, 0), type=Settings)
        os.close(memory)
        for index in list(self.boot.listeners):
            if index in self.opened or index not in [tunnel.index for tunnel in settings.tunnels]:
                for sock in self.boot.listeners.pop(index):
                    sock.close()
        self.boot.listeners.update(self.opened)
        self.opened.clear()
        ports = {
            tunnel.name: [tunnel.index, *(sock.getsockname()[1] for sock in self.boot.listeners.get(tunnel.index, []))]
            for tunnel in settings.tunnels
        }
        keys = [[key.key_id, key.revoked] for key in settings.keys]
        self.note("settings", ports=ports, keys=keys, workers=settings.workers, level=settings.log.level)

    def report(self, request: int) -> None:
        while True:
            try:
                self.boot.inbox.recv(100)
            except BlockingIOError:
                break
            self.inbox_count += 1
        seen = {"inbox": self.inbox_count}
        for slot in self.serials.keys() - {self.boot.slot}:
            seen[f"arena_{slot}"] = int.from_bytes(os.pread(self.arenas[slot], 8, 0))
            seen[f"ring_{slot}"] = int.from_bytes(os.pread(self.from_rings[slot], 8, 0))
        worker = WorkerStatus(self.boot.slot, self.boot.serial, os.getpid(), "up", 1, 0, 5, 99, 10, 1 << 30)
        sessions = [
            SessionStatus(f"{number:x}", "laptop", "", 5, 10, 1, 2, 3, []) for number in self.boot.session_ids.values()
        ]
        tunnels = [
            TunnelStatus(tunnel.name, "stripe", "up", 1, 2, 3, 4, 5, sessions)
            for tunnel in (*self.boot.settings.client_tunnels, *self.boot.settings.server_tunnels)
        ]
        memory = os.memfd_create("report")
        os.write(memory, msgspec.json.encode(WorkerReport(worker, tunnels, seen)))
        self.send(StatusReply(request), [memory])
        os.close(memory)

    def send(self, message: msgspec.Struct, fds: list[int] | None = None) -> None:
        socket.send_fds(self.boot.channel, [msgspec.msgpack.encode(message)], fds or [])


class PlanSource(Source):
    """Its file is a plan."""

    def read(self) -> Loaded:
        return Loaded(read_plan(self.file).settings, ())


def read_plan(file: Path) -> Plan:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Plan)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None


def main(plan_file: Path) -> int:
    saved = inherited(os.environ)
    plan = read_plan(plan_file)
    journal = os.open(plan.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def worker_main(boot: Boot) -> None:
        born = {json.loads(line)["slot"] for line in os.pread(journal, 1 << 20, 0).splitlines()}
        first = boot.slot not in born
        behaviour = plan.behaviour.get("all") or plan.behaviour.get(str(boot.slot), "")
        if not first and "all" not in plan.behaviour and not behaviour.endswith("!"):
            behaviour = ""
        FakeWorker(boot, behaviour.rstrip("!"), journal).run()

    pid_file = Path(plan.pid_file) if plan.pid_file else None
    source = PlanSource(plan_file)
    if saved is not None:
        return resume(saved, source, worker_main=worker_main, timing=plan.timing)
    return run(plan.settings, source, pid_file, plan.daemon, worker_main=worker_main, timing=plan.timing)


if __name__ == "__main__":
    if "FAKE_FORMAT" in os.environ:  # every process has one of its own
        vars(upgrading)["FORMAT"] = os.getpid()
    if sys.argv[1] == "check":
        read_plan(Path(sys.argv[-1]))
    else:
        sys.exit(main(Path(sys.argv[1])))
