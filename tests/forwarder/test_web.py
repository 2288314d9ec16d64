"""The HTTP server in this process, with clients that mean well and others that do not."""

import gzip
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import pytest

from forwarder import http
from forwarder.http import CONNECTIONS_MAX, REQUEST_MAX, Answer, Server
from forwarder.web import KEEP_S, Kept, Site
from tests.forwarder.statistics import Pages

GET = b"GET %s HTTP/1.1\r\nHost: anything\r\n\r\n"


class Place:
    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = self.listener.getsockname()
        self.site: Any = Site(pages.memory)
        self.server = Server([self.listener], self.site)
        self.ended = False
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while not self.ended:
            self.server.turn(0.02)

    def close(self) -> None:
        self.ended = True
        self.thread.join()
        self.server.close()
        self.listener.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=5)

    def ask(self, request: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
        """The status line, the headers by their names in small letters, the body."""
        with self.connect() as sock:
            with suppress(OSError):
                sock.sendall(request)
            received = b""
            with suppress(ConnectionResetError):
                while data := sock.recv(1 << 16):
                    received += data
        head, _, body = received.partition(b"\r\n\r\n")
        status, *lines = head.split(b"\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
        return status, headers, body


@pytest.fixture
def place() -> Iterator[Place]:
    with Pages() as pages:
        pages.instance()
        pages.worker(0)
        pages.worker(1)
        place = Place(pages)
        try:
            yield place
        finally:
            place.close()


def test_metrics_are_text_or_openmetrics(place: Place) -> None:
    status, headers, body = place.ask(GET % b"/metrics")
    assert status.endswith(b"200 OK") and headers[b"content-type"].startswith(b"text/plain; version=0.0.4")
    assert b'forwarder_received_bytes_total{tunnel="web"} 2000.0\n' in body and b"# EOF" not in body
    assert int(headers[b"content-length"]) == len(body)
    accept = b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n\r\n"
    _, headers, body = place.ask(accept)
    assert headers[b"content-type"].startswith(b"application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")


def test_what_a_client_accepts_may_be_anything(place: Place) -> None:
    for accept in (b"application/openmetrics-text; version=x.y", b"\xff", b"*/*", b"," * 4000, b"text/plain;version=9"):
        status, _, _ = place.ask(b"GET /metrics HTTP/1.1\r\nAccept: " + accept + b"\r\n\r\n")
        assert status.endswith(b"200 OK"), accept


def test_answer_is_compressed_for_who_wants_it(place: Place) -> None:
    request = b"GET /metrics HTTP/1.1\r\nAccept-Encoding: gzip\r\n\r\n"
    _, headers, body = place.ask(request)
    assert headers[b"content-encoding"] == b"gzip" and b"forwarder_ready" in gzip.decompress(body)


def test_page_and_its_policy(place: Place) -> None:
    status, headers, body = place.ask(GET % b"/?anything")
    assert status.endswith(b"200 OK") and headers[b"content-type"] == b"text/html; charset=utf-8"
    assert body.startswith(b"<!doctype html>") and headers[b"content-security-policy"].startswith(b"default-src 'none'")
    assert headers[b"server"] == b"forwarder" and headers[b"cache-control"] == b"no-store"


def test_health_names_what_is_missing(place: Place) -> None:
    assert place.ask(GET % b"/healthz")[0::2] == (b"HTTP/1.1 200 OK", b"ok\n")
    place.pages.instance(("up", "down"), "draining")
    status, _, body = place.ask(GET % b"/healthz")
    assert (status, body) == (b"HTTP/1.1 503 Service Unavailable", b"forwarder is draining\nworker 1 is down\n")


def test_head_has_no_body(place: Place) -> None:
    status, headers, body = place.ask(b"HEAD / HTTP/1.1\r\n\r\n")
    assert status.endswith(b"200 OK") and int(headers[b"content-length"]) > 1000 and body == b""


@pytest.mark.parametrize("path", [b"/metrics/", b"/etc/passwd", b"/../..", b"http://other/", b"*", b"/%2e"])
def test_there_is_nothing_else(place: Place, path: bytes) -> None:
    assert b" 404 " in place.ask(GET % path)[0]


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"OPTIONS", b"CONNECT", b"BREW"])
def test_other_methods_are_refused(place: Place, method: bytes) -> None:
    status, headers, _ = place.ask(method + b" /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
    assert b" 405 " in status and headers[b"allow"] == b"GET, HEAD"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"a" * (2 * REQUEST_MAX) + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * (2 * REQUEST_MAX) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
    ],
    ids=["long line", "long header", "endless headers", "version", "TLS", "no path"],
)
def test_request_beyond_the_bounds_is_refused(place: Place, request_bytes: bytes) -> None:
    status, _, body = place.ask(request_bytes)
    assert not status or b" 4" in status, body
    assert place.ask(GET % b"/healthz")[2] == b"ok\n"


def test_slow_clients_are_cut_off_and_keep_nobody_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTION_S", 0.5)
    slow = [place.connect() for _ in range(CONNECTIONS_MAX)]
    began_s = time.monotonic()
    for sock in slow:
        sock.sendall(b"GET / HT")
    assert place.ask(GET % b"/healthz")[2] == b"ok\n"
    with suppress(ConnectionResetError):
        assert slow[0].recv(10) == b""
    for number in range(40):
        time.sleep(0.02)
        for sock in slow:
            with suppress(OSError):
                sock.sendall(b"X" if number else b"TP/1.1\r\nX-")
        if not place.server.open:
            break
    for sock in slow:
        with suppress(ConnectionResetError):
            sock.recv(1 << 16)
        sock.close()
    assert not place.server.open and time.monotonic() - began_s < 3
    assert place.ask(GET % b"/healthz")[2] == b"ok\n"


def test_client_that_takes_nothing_is_cut_off(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTION_S", 0.3)
    answer = Answer(HTTPStatus.OK, "text/plain", bytes(64 << 20))
    monkeypatch.setattr(place.site, "answer", lambda path, accept: answer)
    with place.connect() as sock:
        sock.sendall(GET % b"/")
        deadline = time.monotonic() + 3
        time.sleep(0.1)
        while place.server.open and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not place.server.open


def test_request_that_fails_costs_only_itself(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, accept: str) -> Answer:
        raise RuntimeError("this fails")

    with monkeypatch.context() as patch:
        patch.setattr(place.site, "answer", fail)
        assert place.ask(GET % b"/")[0] == b""
    assert place.ask(GET % b"/healthz")[2] == b"ok\n"


def test_request_may_come_byte_by_byte(place: Place) -> None:
    with place.connect() as sock:
        for byte in GET % b"/healthz":
            sock.sendall(bytes([byte]))
        assert sock.recv(1 << 16).endswith(b"ok\n")


def test_answer_is_made_anew_when_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("forwarder.web.time.monotonic", lambda: now_s[0])
    made: list[float] = []

    def make() -> Answer:
        made.append(now_s[0])
        return Answer(HTTPStatus.OK, "text/plain", b"")

    kept = Kept(make)
    for _ in range(30):
        kept.get()
        now_s[0] += 0.1
    assert len(made) == pytest.approx(3 / KEEP_S, abs=1)
