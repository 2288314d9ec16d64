"""Reload: the file is read again, compared with what runs, and what changed goes to the workers.

All that may be refused comes first, so that a refused reload has changed nothing.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from logging import ERROR, INFO, WARNING
from typing import Any

from msgspec.structs import replace

from forwarder import logs
from forwarder.control import Client
from forwarder.crew import Crew
from forwarder.errors import BootError, ConfigError, ForwarderError, Unavailable
from forwarder.generation import Generation, Standing
from forwarder.listeners import Wanted, own_share, wanted_by
from forwarder.logs import log
from forwarder.privileges import capabilities_wanted, identity_wanted
from forwarder.raw import check_raw
from forwarder.reload import Plan, plan
from forwarder.slots import ENCODER, Parcel, State
from forwarder.source import Source
from workers.boot import Opened, Reconfigure
from workers.settings import Settings, SprayClientTunnel, Tunnel

DESCRIPTORS_MAX = 64
"""Of one Opened."""

PATIENCE_S = 10.0
RETIRING_S = 1.0
"""How long to wait for a port that a retiring worker may be about to close."""

Answer = dict[str, Any]


class Reconfiguring:
    """At most one reload at a time, from `begin` until `finished` has given its answer."""

    def __init__(
        self, source: Source, crew: Crew, output: logs.FileOutput, serve_metrics: Callable[[Settings], None]
    ) -> None:
        self._serve_metrics = serve_metrics
        self._source = source
        self._crew = crew
        self._output = output
        self._number = 0
        self._client: Client | None = None
        self._answer: Answer | None = None
        self._waiting: set[int] = set()
        self.deadline_s: float | None = None

    @property
    def busy(self) -> bool:
        return self.deadline_s is not None

    def begin(self, client: Client | None) -> None:
        """Reads and applies the file. client: who asked; None if a signal did."""
        self._client = client
        self.deadline_s = time.monotonic() + PATIENCE_S
        with contextlib.ExitStack() as memories:
            try:
                planned = self.prepare(same_workers=True)
                contents = self._written(planned.running.settings, memories)
            except ForwarderError as error:
                log(ERROR, "the configuration stays as it was", reason=str(error))
                self._answer = {"error": str(error), "code": error.code}
                return
            self._answer = {"changes": planned.changes}
            before = self._crew.running.settings
            self._crew.running = planned.running
            if planned.changes:
                self._hand_out(before, contents)
        self._crew.doors.close_unwanted(planned.running.settings)
        log(INFO, "the configuration was read again", changes=len(planned.changes))
        for change in planned.changes:
            log(INFO, "reload", change=change)

    def prepare(self, same_workers: bool) -> Plan:
        """Reads the file and opens what it takes; only the log goes to its new place already. Raises ForwarderError,
        and then leaves all as it was.

        same_workers: those that run are to take the settings, too.
        """
        loaded = self._source.read()
        for warning in loaded.warnings:
            log(WARNING, "the configuration deserves a look", warning=warning)
        running, found = self._crew.running, loaded.settings
        planned = plan(self._source.file, running, found, _new_session_id, _new_secret)
        if same_workers:
            self._check_rights(running.settings, found)
        check_raw(found)
        workers = max(generation.size for generation in self._crew.generations)
        retiring = any(generation.standing is Standing.RETIRING for generation in self._crew.generations)
        patience_s = RETIRING_S if retiring else 0.0
        self._crew.doors.open_missing(planned.running.settings, max(workers, found.workers), patience_s)
        try:
            self._serve_metrics(planned.running.settings)
            self._set_up_log(running.settings, found)
        except BootError:
            self._serve_metrics(running.settings)
            self._crew.doors.close_unwanted(running.settings)
            raise
        return planned

    def _written(self, settings: Settings, memories: contextlib.ExitStack) -> dict[int, int]:
        """By slot, a memfd of the settings for the worker in it: its own, since whoever reads moves the position for
        all who share one. Raises Unavailable, and then what `prepare` did is undone."""
        written = {}
        try:
            for generation in self._crew.generations:
                content = ENCODER.encode(replace(settings, workers=generation.size))
                for slot in generation.slots if not generation.apart else ():
                    written[slot.index] = memories.enter_context(_memory(content))
        except OSError as error:
            old = self._crew.running.settings
            self._crew.doors.close_unwanted(old)
            self._set_up_log(settings, old)
            self._serve_metrics(old)
            raise Unavailable(f"the workers cannot be told: {str(error.strerror).lower()}") from None
        return written

    def _check_rights(self, old: Settings, found: Settings) -> None:
        """Workers that became another user cannot get back what they gave up. Raises ConfigError."""
        if identity_wanted(found.user, found.group) and not capabilities_wanted(found) <= capabilities_wanted(old):
            raise ConfigError(
                f"{self._source.file}: fake TCP takes rights that the running workers gave up when they became another "
                "user: restart, or upgrade in place (SIGUSR2)"
            )

    def _set_up_log(self, old: Settings, found: Settings) -> None:
        if old.log.file != found.log.file:
            if found.log.file is None and self._output.has_standard_error:
                raise BootError(78, f"{self._source.file}: log.file: expected a file for --daemon, found none")
            self._output.move(found.log.file)
        logs.set_up(found.log, self._output, "supervisor")

    def _hand_out(self, before: Settings, contents: dict[int, int]) -> None:
        """Listening sockets first, then the settings that speak of them."""
        self._number += 1
        for generation in self._crew.generations:
            if generation.apart:
                continue
            if generation.standing is not Standing.RETIRING:
                self._send_listeners(generation, before)
            self._send_settings(generation, contents)

    def _send_listeners(self, generation: Generation, before: Settings) -> None:
        settings = self._crew.running.settings
        old = {tunnel.index: tunnel for tunnel in before.tunnels}
        new = [tunnel for tunnel in settings.tunnels if _ports(old.get(tunnel.index)) != _ports(tunnel)]
        listeners = self._crew.doors.listeners(settings)
        for tunnel in new:
            shared = isinstance(tunnel, SprayClientTunnel)
            all_fds = [sock.fileno() for sock in listeners[tunnel.index]]
            parcels = [] if shared else _parcels(tunnel.index, all_fds)
            for slot in generation.slots:
                if slot.worker is None:
                    continue
                if shared:
                    own = own_share(listeners[tunnel.index], slot.seat, generation.size)
                    parcels = _parcels(tunnel.index, [sock.fileno() for sock in own])
                for parcel in parcels:
                    slot.worker.post(parcel)

    def _send_settings(self, generation: Generation, contents: dict[int, int]) -> None:
        message = Reconfigure(self._number, self._crew.running.session_ids)
        for slot in generation.slots:
            if slot.worker is not None:
                slot.worker.send(message, [contents[slot.index]])
                if slot.worker.state is not State.LEAVING:
                    self._waiting.add(slot.index)

    # Answers

    def on_reconfigured(self, slot: int, number: int) -> None:
        if number == self._number:
            self._waiting.discard(slot)

    def on_death(self, slot: int) -> None:
        """Its successor is born with the new settings."""
        self._waiting.discard(slot)

    def finished(self, now: float) -> Iterator[tuple[Client, Answer]]:
        """Once every worker has taken the settings, or had its time for it: the answer, if somebody asked."""
        if self._answer is None or self.deadline_s is None or (self._waiting and now < self.deadline_s):
            return
        answer, client = self._answer, self._client
        if self._waiting:
            names = ", ".join(map(str, sorted(self._waiting)))
            reason = f"worker {names}: the new settings are not in effect yet"
            log(ERROR, "a reload is not complete", workers=names)
            answer = {"error": reason, "code": 1}
        self._answer = self._client = self.deadline_s = None
        self._waiting.clear()
        if client is not None:
            yield client, answer


@contextlib.contextmanager
def _memory(content: bytes) -> Iterator[int]:
    """A memfd that holds this, at its start."""
    memory = os.memfd_create("forwarder-settings", os.MFD_CLOEXEC)
    try:
        with open(os.dup(memory), "wb") as file:
            file.write(content)
            file.seek(0)
        yield memory
    finally:
        os.close(memory)


def _ports(tunnel: Tunnel | None) -> tuple[Wanted, ...] | None:
    """What a tunnel's listening sockets depend on."""
    return None if tunnel is None else tuple(wanted_by(tunnel))


def _parcels(tunnel: int, fds: list[int]) -> list[Parcel]:
    return [Parcel(Opened(tunnel), fds[at : at + DESCRIPTORS_MAX]) for at in range(0, len(fds), DESCRIPTORS_MAX)]


def _new_session_id() -> int:
    return secrets.randbits(64)


def _new_secret() -> bytes:
    return secrets.token_bytes(32)
