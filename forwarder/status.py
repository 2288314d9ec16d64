"""`status`: asks every worker, waits a while, and merges what they say into one answer."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from forwarder import __version__
from forwarder.control import Client
from forwarder.crew import Crew
from forwarder.slots import Slot, State
from workers.boot import StatusRequest
from workers.settings import Settings
from workers.status import SessionStatus, TunnelStatus, WorkerReport, WorkerStatus

REPORT_MAX = 64 << 20


@dataclass(slots=True)
class Round:
    """One question to all workers. counts: with what is open; waiting: slots that have not reported."""

    request: int
    deadline_s: float
    clients: list[Client]
    counts: bool
    waiting: set[int] = field(default_factory=set)
    reports: dict[int, WorkerReport] = field(default_factory=dict)


class StatusDesk:
    """Answers clients. One round at a time; who asks meanwhile gets the next one, so that no answer is stale."""

    def __init__(self, crew: Crew, patience_s: float, started_s: float) -> None:
        """started_s: when this instance started."""
        self._crew = crew
        self._patience_s = patience_s
        self.started_s = started_s
        self._asked: list[Client] = []
        self._counts = False
        self._round: Round | None = None
        self._request = 0

    @property
    def deadline_s(self) -> float | None:
        """When `answers` is to be called next, if nothing happens before."""
        return None if self._round is None else self._round.deadline_s

    def ask(self, client: Client, counts: bool) -> None:
        """counts: with what every worker has open. Whoever shares the round gets it, too."""
        self._asked.append(client)
        self._counts = self._counts or counts

    def on_reply(self, slot: int, request: int, fds: Sequence[int]) -> None:
        """Takes a worker's answer, and ignores one to an earlier round. Raises ValueError for a malformed one."""
        if self._round is not None and request == self._round.request and slot in self._round.waiting:
            if len(fds) != 1:
                raise ValueError("a report comes with one descriptor")
            report = read_report(fds[0])
            self._round.waiting.discard(slot)
            self._round.reports[slot] = report

    def on_death(self, slot: int) -> None:
        if self._round is not None:
            self._round.waiting.discard(slot)

    def answers(self, now: float, phase: str) -> Iterator[tuple[Client, dict[str, Any]]]:
        """What is complete, or waited for too long; then starts the next round if somebody asked."""
        while True:
            if self._round is not None:
                if self._round.waiting and now < self._round.deadline_s:
                    return
                answer = self._answer(self._round, now, phase)
                yield from ((client, answer) for client in self._round.clients)
                self._round = None
            if not self._asked:
                return
            self._start_round(now)

    def _start_round(self, now: float) -> None:
        self._request += 1
        self._round = Round(self._request, now + self._patience_s, self._asked, self._counts)
        self._asked, self._counts = [], False
        for worker in self._crew.workers():
            if worker.state is not State.STARTING:
                self._round.waiting.add(worker.slot)
                worker.send(StatusRequest(self._request, self._round.counts))

    def _answer(self, done: Round, now: float, phase: str) -> dict[str, Any]:
        reports = [done.reports[slot] for slot in sorted(done.reports)]
        running = self._crew.running
        answer = {
            "role": running.settings.role,
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": round(now - self.started_s, 3),
            "workers": [msgspec.to_builtins(self._worker(slot, done)) for slot in self._crew.slots],
            "tunnels": merge_tunnels(running.settings, reports, phase, running.order),
        }
        return answer | ({"open": [report.open for report in reports]} if done.counts else {})

    def _worker(self, slot: Slot, done: Round) -> WorkerStatus:
        worker = slot.worker
        if slot.index in done.reports:
            report = done.reports[slot.index].worker
            leaving = worker is not None and worker.state is State.LEAVING
            state = State.LEAVING.value if leaving else report.state
            return msgspec.structs.replace(report, state=state, restarts=slot.restarts)
        if worker is None:
            return WorkerStatus(slot.index, 0, 0, "down", 0, 0, 0, slot.restarts, 0, 0)
        state = "down" if slot.index in done.waiting else State.STARTING.value  # started after the question
        return WorkerStatus(slot.index, worker.serial, worker.pid, state, 0, 0, 0, slot.restarts, 0, 0)


def read_report(fd: int) -> WorkerReport:
    """Reads a memfd from its start, wherever its position is. Raises ValueError (msgspec's errors are such)."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_size > REPORT_MAX:
        raise ValueError("a report is a file in memory of bounded size")
    data = bytearray()
    while len(data) < info.st_size:
        chunk = os.pread(fd, info.st_size - len(data), len(data))
        if not chunk:
            break
        data += chunk
    try:
        return msgspec.json.decode(data, type=WorkerReport)
    except RecursionError as error:
        raise ValueError("a report is nested too deeply") from error


def merge_tunnels(
    settings: Settings, reports: Sequence[WorkerReport], phase: str, order: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every configured tunnel by its name, in the file's order, then those that are gone from it and still drain.

    phase: the instance's own state word. order: the names, where the indices do not tell.
    """
    configured = {tunnel.name: tunnel.mode for tunnel in settings.tunnels}
    names = order or configured
    merged = {name: TunnelStatus(name, configured[name], "", 0, 0, 0, 0, 0, []) for name in names}
    for report in reports:
        for share in report.tunnels:
            whole = merged.setdefault(share.name, TunnelStatus(share.name, share.mode, "", 0, 0, 0, 0, 0, []))
            _add_tunnel(whole, share)
    if phase == "up" and not reports:
        phase = "down"
    for tunnel in merged.values():
        if phase == "up" and tunnel.name not in configured:
            tunnel.state = "draining"
        else:
            tunnel.state = phase if phase != "up" or settings.role == "server" else _client_state(tunnel)
    return [msgspec.to_builtins(tunnel) for tunnel in merged.values()]


def _client_state(tunnel: TunnelStatus) -> str:
    up = sum(session.carriers_up for session in tunnel.sessions)
    if up == 0:
        return "connecting"
    return "up" if up >= sum(session.carriers_wanted for session in tunnel.sessions) else "degraded"


def _add_tunnel(whole: TunnelStatus, share: TunnelStatus) -> None:
    whole.bytes_in += share.bytes_in
    whole.bytes_out += share.bytes_out
    whole.flows_open += share.flows_open
    whole.flows_total += share.flows_total
    whole.flows_reset += share.flows_reset
    known = {session.id: session for session in whole.sessions}
    for session in share.sessions:
        if session.id in known:
            _add_session(known[session.id], session)
        else:
            known[session.id] = session
            whole.sessions.append(session)


def _add_session(whole: SessionStatus, share: SessionStatus) -> None:
    whole.carriers_up += share.carriers_up
    whole.carriers_wanted = max(whole.carriers_wanted, share.carriers_wanted)
    whole.reinjected_bytes += share.reinjected_bytes
    whole.duplicate_bytes += share.duplicate_bytes
    whole.resumes += share.resumes
    whole.carriers.extend(share.carriers)
    whole.key_id = whole.key_id or share.key_id
    whole.peer = whole.peer or share.peer
