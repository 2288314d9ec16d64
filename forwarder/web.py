"""What the metrics child has to show: `/metrics` for Prometheus, `/healthz` for whoever watches, `/` for people.

Answers are made at most once in KEEP_S, and the less often the longer that takes, so that nobody can keep the process
busy by asking. `forwarder.http` brings them to who asks.
"""

import gzip
import time
from collections.abc import Callable
from http import HTTPStatus
from socket import socket

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from forwarder import page
from forwarder.exposition import Statistics
from forwarder.http import Answer, Server
from forwarder.observer import SAMPLE_S, History, Snapshot, look
from workers.shm.stats import INSTANCE_PAGE, read_page
from workers.shm.totals import InstanceTotals

KEEP_S = 0.9
"""Workers report once a second: a scraper that comes so often gets each report."""
COST = 0.05
"""The most of a core that answers take."""
OPENMETRICS = "application/openmetrics-text"
TEXT = "text/plain; charset=utf-8"


class Kept:
    """An answer that is made again when it is KEEP_S old or, if making it takes long, older."""

    def __init__(self, make: Callable[[], Answer]) -> None:
        self._make = make
        self._answer: Answer | None = None
        self._until_s = 0.0

    def get(self) -> Answer:
        now = time.monotonic()
        if self._answer is None or now >= self._until_s:
            began_s = time.thread_time()
            self._answer = self._make()
            self._until_s = now + max(KEEP_S, (time.thread_time() - began_s) / COST)
        return self._answer


class Site:
    """What there is to see. `memory`: the pages of statistics."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._history = History()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Statistics(lambda: look(memory)))
        self._text = _scrape(registry, "text/plain")
        self._openmetrics = _scrape(registry, f"{OPENMETRICS}; version=1.0.0")
        self._page = Kept(self._make_page)

    def sample(self) -> None:
        """Every SAMPLE_S."""
        self._history.sample(look(self._memory))

    def answer(self, path: str, accept: str) -> Answer:
        """What a GET of `path` gets."""
        if path == "/metrics":
            return (self._openmetrics if OPENMETRICS in accept else self._text).get()
        if path == "/healthz":
            return self._health()
        if path == "/":
            return self._page.get()
        return Answer(HTTPStatus.NOT_FOUND, TEXT, b"there are /, /metrics and /healthz\n")

    def _health(self) -> Answer:
        instance = read_page(self._memory, INSTANCE_PAGE, InstanceTotals)
        missing = Snapshot(time.monotonic(), instance, [], []).missing()
        status = HTTPStatus.SERVICE_UNAVAILABLE if missing else HTTPStatus.OK
        return Answer(status, TEXT, "".join(f"{line}\n" for line in missing or ["ok"]).encode())

    def _make_page(self) -> Answer:
        text = page.render(look(self._memory), self._history)
        headers = (("Content-Security-Policy", page.POLICY),)
        return _compressed("text/html; charset=utf-8", text.encode(), headers)


def _scrape(registry: CollectorRegistry, accept: str) -> Kept:
    encode, kind = choose_encoder(accept)
    return Kept(lambda: _compressed(kind, encode(registry)))


def _compressed(kind: str, body: bytes, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    return Answer(HTTPStatus.OK, kind, body, headers, gzip.compress(body, 4, mtime=0))


def serve_forever(memory: int, sockets: list[socket]) -> None:
    """Serves until the process ends, and samples what the lines are drawn of."""
    site = Site(memory)
    server = Server(sockets, site)
    due_s = time.monotonic()
    while True:
        now = time.monotonic()
        if now >= due_s:
            site.sample()
            due_s = max(due_s + SAMPLE_S, now)
        server.turn(due_s - now)
