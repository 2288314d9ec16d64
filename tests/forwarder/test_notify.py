"""What a service manager reads on its socket."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forwarder.notify import ServiceManager


class Listener:
    """A manager's end. `name` is what NOTIFY_SOCKET says."""

    def __init__(self, name: str) -> None:
        self.environment = {"NOTIFY_SOCKET": name}
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(f"\0{name[1:]}" if name.startswith("@") else name)
        self._sock.setblocking(False)

    def told(self) -> list[list[str]]:
        """The messages since the last call, each by lines."""
        messages = []
        while True:
            try:
                messages.append(self._sock.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@forwarder-test-{os.getpid()}"
    made = Listener(name)
    yield made
    made.close()


def test_each_event_is_one_message(listener: Listener) -> None:
    manager = ServiceManager(listener.environment)
    before_us = time.monotonic_ns() // 1000
    manager.ready("serves (workers: 2)")
    manager.reloading()
    manager.stopping(35.5)
    ready, reloading, stopping = listener.told()
    assert ready == ["READY=1", "STATUS=serves (workers: 2)"]
    assert stopping == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=35500000", "STATUS=ends"]
    assert reloading[0] == "RELOADING=1"
    name, _, at_us = reloading[1].partition("=")
    assert name == "MONOTONIC_USEC" and before_us <= int(at_us) <= time.monotonic_ns() // 1000


def test_watchdog_is_fed_each_half_of_its_time(listener: Listener) -> None:
    manager = ServiceManager(listener.environment | {"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getpid())})
    for tenths in range(50, 100):
        manager.feed(tenths / 10)
    assert listener.told() == [["WATCHDOG=1"]] * 3


@pytest.mark.parametrize("watchdog", [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}])
def test_watchdog_of_nobody_or_of_another_process_is_not_fed(listener: Listener, watchdog: dict[str, str]) -> None:
    ServiceManager(listener.environment | watchdog).feed(100.0)
    assert listener.told() == []


@pytest.mark.parametrize("name", [None, "", "relative", "/nowhere/at/all", "@nobody", "vsock:2:1"])
def test_manager_that_does_not_listen_is_no_matter(name: str | None) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": name} if name is not None else {})
    manager.ready("")
    manager.feed(1.0)


def test_manager_that_reads_nothing_is_not_waited_for(listener: Listener) -> None:
    manager = ServiceManager(listener.environment)
    started = time.monotonic()
    for _ in range(1000):
        manager.ready("x" * 1000)
    assert time.monotonic() - started < 5
