"""The metrics child as a supervisor keeps it, with this process as the supervisor."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from forwarder.errors import BootError
from forwarder.metrics import MetricsChild
from tests.free_ports import free_port
from tests.system.scrape import get
from workers.settings import Address, Settings

WAIT_S = 20.0


def settings(port: int | None, host: str = "127.0.0.1") -> Settings:
    listen = Address(host, port) if port is not None else None
    return Settings(role="client", workers=0, keys=(), metrics_listen=listen)


@dataclass
class Place:
    child: MetricsChild
    port: int

    def turn(self) -> None:
        self.child.turn(time.monotonic(), "up", [])

    def serves(self, port: int) -> bool:
        """Whether somebody answers there; waits for one who has only begun to."""
        try:
            return get(partial(socket.create_connection, ("127.0.0.1", port), WAIT_S), "/healthz").body == "ok\n"
        except ConnectionRefusedError:
            return False

    def wait(self, port: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while True:
            self.turn()
            try:
                if self.serves(port):
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def place() -> Iterator[Place]:
    port = free_port()
    child = MetricsChild(settings(port), time.monotonic())
    lines, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        child.open()
        child.start(sender, None)
        place = Place(child, port)
        place.turn()
        yield place
    finally:
        child.close()
        lines.close()
        sender.close()


def test_address_changes_while_it_runs(place: Place) -> None:
    assert place.serves(place.port)
    other = free_port()
    place.child.reconfigure(settings(other))
    assert place.serves(other) and not place.serves(place.port)
    place.child.restart(None)
    place.turn()
    assert not place.serves(other)
    place.child.restart(Address("127.0.0.1", place.port))
    assert place.serves(place.port)


def test_address_that_cannot_be_had_changes_nothing(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(BootError) as refused:
            place.child.reconfigure(settings(taken.getsockname()[1]))
        assert refused.value.code == 69
    place.turn()
    assert place.serves(place.port)


def test_address_that_was_taken_during_an_upgrade_is_had_by_the_next_reload() -> None:
    lines, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    child = MetricsChild(settings(port), time.monotonic())
    try:
        child.begin_again(0.0, sender, None)
        taken.close()
        place = Place(child, port)
        place.turn()
        assert not place.serves(port)
        child.reconfigure(settings(port))
        assert place.serves(port)
    finally:
        taken.close()
        child.close()
        lines.close()
        sender.close()


def test_child_that_dies_again_and_again_comes_back_later_each_time(place: Place) -> None:
    pauses = []
    for _ in range(3):
        place.wait(place.port)
        os.kill(place.child._pid, signal.SIGKILL)
        while place.child.due_s is None:
            place.turn()
        pauses.append(place.child.due_s - time.monotonic())
        place.child.due_s = time.monotonic()
    assert 0.3 < pauses[0] < 0.6 < pauses[1] < 1.1 < pauses[2] < 2.1
