"""Strangers, and clients that break the protocol, at a server in service: not a byte for them, no harm to others."""

import base64
import contextlib
import os
import random
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netlab import Lab
from tests.system.pair import ENDS, KEY_ID, Pair
from tests.system.traffic import WHOLE, Exchange, Traffic
from workers.core import frame
from workers.core.handshake import ClientHandshake, Hello, Mode, WorkerId
from workers.core.noise import Suite
from workers.core.record import Opener, Sealer
from workers.io.pending import MAX_PENDING_PER_ADDRESS

DEADLINE_S = 2.0
"""The server's handshake_timeout."""
LATE_S = 1.0
"""How late the reset may come: the server looks ten times a second, and the machine is busy."""
GROWTH_KIB = 16 << 10
FRAME_MAX = 256 << 10


class Service:
    """A pair in service: an exchange that goes on all the time shows that nobody else notices."""

    def __init__(self, pair: Pair, traffic: Traffic) -> None:
        self.pair, self.traffic = pair, traffic
        self.key = base64.b64decode((pair.folder / "laptop.key").read_bytes())
        self.carriers = self.stripe_ids()
        self.memory_kib = self.resident_kib()
        self.serials: dict[int, int] = {}
        self.exchange: Exchange = traffic.open(1, total_bytes=1 << 30, rate_bps=20e6)[0]

    def connect(self) -> socket.socket:
        return self.pair.lab.connect("client", self.pair.lab.server_ip4, self.pair.host_port)

    def stripe_ids(self) -> list[tuple[int, str]]:
        sessions = self.pair.tunnel("server")["sessions"]
        return sorted((each["id"], each["peer"]) for session in sessions for each in session["carriers"])

    def pending(self) -> int:
        return sum(counts["pending"] for counts in self.pair.open_counts("server"))

    def resident_kib(self) -> int:
        """Of the server's workers, without what they share."""
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in self.pair.worker_pids("server")]
        return sum(int(status.partition("RssAnon:")[2].split()[0]) for status in statuses)

    def hello(self, key_id: str = KEY_ID, secret: bytes | None = None, **changes: Any) -> ClientHandshake:
        """A client's handshake, with a genuine key unless told otherwise, for a session of its own."""
        fields: dict[str, Any] = {
            "session_id": random.getrandbits(64),
            "boot_id": random.getrandbits(64),
            "carrier_index": 0,
            "worker_slot": 0,
            "tunnel": "web",
            "roster": (WorkerId(0, 77),),
        }
        return ClientHandshake(
            key_id,
            secret or self.key,
            changes.pop("suite", Suite.AES256GCM),
            changes.pop("mode", Mode.STRIPE),
            Hello(**(fields | changes)),
            ephemeral_private=os.urandom(32),
        )

    def shake_hands(self, **changes: Any) -> tuple[socket.socket, Sealer, Opener]:
        """A genuine client's connection, up to and without its first record."""
        handshake = self.hello(**changes)
        sock = self.connect()
        sock.sendall(handshake.message_to_send)
        while (welcome := handshake.receive(sock.recv(4096))) is None:
            pass
        self.serials = {worker.slot: worker.serial for worker in welcome.roster}
        send_key, receive_key = handshake.split()
        return sock, Sealer(send_key, Suite.AES256GCM), Opener(receive_key, Suite.AES256GCM, FRAME_MAX)

    def assert_untouched(self) -> None:
        """The session that was there is as it was, and nothing else is left."""
        self.pair.wait(lambda: not self.pending(), "end of what is pending", DEADLINE_S + LATE_S)
        before = self.exchange.received
        time.sleep(0.2)
        assert self.exchange.outcome is None and self.exchange.received > before, self.pair.logs()
        assert self.stripe_ids() == self.carriers
        status = self.pair.status("server")
        assert len(self.pair.tunnel("server")["sessions"]) == 1
        assert self.resident_kib() < self.memory_kib + GROWTH_KIB
        assert [worker["restarts"] for worker in status["workers"]] == [0] * len(status["workers"])


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    options = {"server_tunnel": f'handshake_timeout = "{DEADLINE_S:g}s"\nresume_timeout = "1s"'}
    with Lab(emulate=False) as lab, Pair(lab, workers=(2, 2), **options) as pair, Traffic(pair) as traffic:  # type: ignore[arg-type]
        yield Service(pair, traffic)


def seal(sealer: Sealer, plaintext: bytes) -> bytes:
    record = memoryview(bytearray(len(plaintext) + 64))
    return bytes(record[: sealer.seal_into(plaintext, record)])


def give(sock: socket.socket, data: bytes) -> None:
    """Send as much as the other end takes."""
    sock.settimeout(0.2)
    with contextlib.suppress(OSError):
        sock.sendall(data)


def ending(sock: socket.socket) -> tuple[bytes, str, float]:
    """All that comes, how it ends, and when."""
    sock.settimeout(DEADLINE_S + LATE_S + 2)
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
        how = "end of stream"
    except ConnectionResetError:
        how = "reset"
    except TimeoutError:
        how = "open"
    return received, how, time.monotonic()


STRANGERS: dict[str, Callable[[Service], list[bytes]]] = {
    "nothing": lambda _: [b""],
    "one byte": lambda _: [b"\0", b"\xf7", b"G"],
    "other protocols": lambda _: [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"SSH-2.0-x\r\n"],
    "random megabytes": lambda _: [random.Random(seed).randbytes(3 << 20) for seed in range(3)],
    "the magic and random megabytes": lambda _: [b"\xf7FWD\x01\x01\x01" + random.Random(1).randbytes(1 << 20)],
    "message 1 and more": lambda service: [service.hello().message_to_send + b"\0"],
    "two of message 1": lambda service: [2 * service.hello().message_to_send],
    "a wrong key": lambda service: [service.hello(secret=bytes(32)).message_to_send],
    "an unknown key id": lambda service: [service.hello(key_id="desktop").message_to_send],
    "another tunnel": lambda service: [service.hello(tunnel="ssh").message_to_send],
    "another suite": lambda service: [service.hello(suite=Suite.CHACHA20POLY1305).message_to_send],
    "another mode": lambda service: [service.hello(mode=Mode.SPRAY).message_to_send],
    "a flipped bit": lambda service: flipped(service.hello().message_to_send),
    "every truncation": lambda service: truncations(service.hello().message_to_send),
}


def flipped(message: bytes) -> list[bytes]:
    places = range(0, len(message), 5)
    return [message[:place] + bytes((message[place] ^ 1 << place % 8,)) + message[place + 1 :] for place in places]


def truncations(message: bytes) -> list[bytes]:
    return [message[:length] for length in range(1, len(message))]


def test_strangers_get_no_byte_and_a_reset_at_the_deadline(service: Service) -> None:
    opened: list[tuple[str, socket.socket, float]] = []
    for what, sends in STRANGERS.items():
        for sent in sends(service):
            opened.append((what, service.connect(), time.monotonic()))
            give(opened[-1][1], sent)
    last_s = time.monotonic()
    for what, sock, began_s in opened:
        with sock:
            received, how, ended_s = ending(sock)
            assert (received, how) == (b"", "reset"), f"after {what}"
            assert ended_s - began_s > DEADLINE_S - 0.1, f"closed at once after {what}: a stranger learns from that"
            assert ended_s - last_s < DEADLINE_S + LATE_S
    service.assert_untouched()


def test_slow_drip_does_not_move_the_deadline(service: Service) -> None:
    with service.connect() as sock:
        began_s = time.monotonic()
        sent, how = service.hello().message_to_send, ""
        for place in range(len(sent)):
            try:
                sock.sendall(sent[place : place + 1])
                sock.settimeout(1.0)
                assert sock.recv(1) == b"no byte was expected, nor an end"
            except TimeoutError:
                continue
            except ConnectionError:
                how = "reset"
                break
        assert how == "reset" and time.monotonic() - began_s < DEADLINE_S + LATE_S
    service.assert_untouched()


# With a genuine message 1


def test_message_1_is_answered_once_and_leaves_nothing(service: Service) -> None:
    message = service.hello(carrier_index=1).message_to_send
    flows = service.pair.tunnel("server")["flows_total"]
    opened = [service.connect() for _ in range(3)]
    answers = []
    for sock in opened:
        sock.sendall(message)
        sock.settimeout(0.5)
        try:
            answers.append(sock.recv(1024))
        except TimeoutError:
            answers.append(b"")
    assert answers[0] and answers[1:] == [b"", b""]
    assert service.stripe_ids() == service.carriers
    tunnel = service.pair.tunnel("server")
    assert tunnel["flows_total"] == flows and len(tunnel["sessions"]) == 1
    for sock in opened:
        with sock:
            assert ending(sock)[:2] == (b"", "reset")
    service.assert_untouched()


AFTER_MESSAGE_2 = {
    "length 0": struct.pack(">I", 0) + bytes(64),
    "length 16": struct.pack(">I", 16) + bytes(64),
    "length max": struct.pack(">I", FRAME_MAX + frame.HEADER_BYTES + 16) + bytes(2048),
    "length max + 1": struct.pack(">I", FRAME_MAX + frame.HEADER_BYTES + 17) + bytes(2048),
    "length 1024": struct.pack(">I", 1024) + bytes(1024),
    "length 1025": struct.pack(">I", 1025) + bytes(1025),
    "length 2^32 - 1": struct.pack(">I", 2**32 - 1) + bytes(2048),
    "half a record": struct.pack(">I", 100) + bytes(50),
    "nothing": b"",
    "garbage": random.Random(3).randbytes(1 << 20),
}


def test_garbage_instead_of_the_first_record_is_like_silence(service: Service) -> None:
    opened = {}
    for what, sent in AFTER_MESSAGE_2.items():
        sock = opened[what] = service.shake_hands()[0]
        give(sock, sent)
    for what, sock in opened.items():
        with sock:
            assert ending(sock)[:2] == (b"", "reset"), what
    service.assert_untouched()


def test_garbage_after_the_first_record_ends_that_session_only(service: Service) -> None:
    for what, sent in AFTER_MESSAGE_2.items():
        sock, sealer, opener = service.shake_hands()
        with sock:
            sock.sendall(seal(sealer, frame.pack(frame.PING, 0, 0, 0, 5)))
            pong = sock.recv(1024)
            plaintext = memoryview(bytearray(frame.HEADER_BYTES))
            opener.open_into(pong[4:], pong[:4], plaintext)
            assert frame.unpack(plaintext) == (frame.PONG, 0, 0, 0, 5)
            if what in ("nothing", "half a record", "length max"):
                continue  # nothing wrong so far
            give(sock, sent)
            began_s = time.monotonic()
            received, how, ended_s = ending(sock)
            assert received == b"" and how != "open" and ended_s - began_s < LATE_S, what
    service.pair.wait(lambda: len(service.pair.tunnel("server")["sessions"]) == 1, "end of the strange sessions", 5)
    service.assert_untouched()


def test_frame_for_another_worker_that_breaks_the_protocol_ends_its_stripe(service: Service) -> None:
    """Over the mesh: the stripe's worker is not the one that finds out."""
    sock, sealer, _ = service.shake_hands()
    with sock:
        sock.sendall(seal(sealer, frame.pack(frame.PING, 0, 0, 0, 5)))
        assert sock.recv(1024)
        flow = frame.flow_id(frame.CLIENT, 0, 1, 77, 0)
        opening = frame.pack(frame.DATA, frame.OPENING, service.serials[1], flow, 1 << 30) + b"beyond any credit"
        sock.sendall(seal(sealer, opening))
        began_s = time.monotonic()
        _, how, ended_s = ending(sock)
        assert how != "open" and ended_s - began_s < LATE_S
    service.pair.wait(lambda: len(service.pair.tunnel("server")["sessions"]) == 1, "end of the strange session", 5)
    service.assert_untouched()


def test_silent_connections_are_capped_and_the_oldest_go(service: Service) -> None:
    """At a second server in the same lab, which is more patient."""
    lab = service.pair.lab
    ports = {"host_port": 9001, "local_port": 8081, "target_port": 8001}
    patient = {"server_tunnel": 'handshake_timeout = "60s"'}
    most = 2 * MAX_PENDING_PER_ADDRESS
    with Pair(lab, workers=(1, 2), **ports, **patient) as pair, Traffic(pair) as traffic:  # type: ignore[arg-type]
        old = traffic.open(1, total_bytes=8 << 20, rate_bps=10e6)
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(lab.connect("client", lab.server_ip4, 9001)) for _ in range(1500)]
            pair.wait(lambda: most / 2 <= sum(each["pending"] for each in pair.open_counts("server")) <= most, "cap", 5)
            is_open = [still_open(sock) for sock in silent]
            assert most / 2 <= sum(is_open) <= most
            assert all(is_open[-most // 4 :]) and sum(is_open[:750]) < sum(is_open[750:])
            new = traffic.open(1, total_bytes=1 << 20)
            traffic.wait(old + new, 20)
        assert [exchange.outcome for exchange in old + new] == [WHOLE] * 2
        pair.wait(lambda: not sum(each["pending"] for each in pair.open_counts("server")), "end of what is pending", 5)


def test_want_of_descriptors_stops_new_connections_only(service: Service) -> None:
    before = [log.count("WARNING") for log in (service.pair.log("client"), service.pair.log("server"))]
    with contextlib.ExitStack() as stack:
        for end in ENDS:
            for pid in service.pair.worker_pids(end):
                stack.enter_context(few_descriptors(pid, spare=60))
        for _ in range(150):
            with contextlib.suppress(ConnectionError):
                stack.enter_context(service.connect())
            with contextlib.suppress(ConnectionError):
                stack.enter_context(service.pair.connect())
        progress = service.exchange.received
        service.pair.wait(lambda: service.exchange.received > progress + (1 << 20), "progress")
        states = [each["state"] for end in ENDS for each in service.pair.status(end)["workers"]]
        assert states == ["up"] * 4, service.pair.logs()
    after = [log.count("WARNING") for log in (service.pair.log("client"), service.pair.log("server"))]
    at_client, at_server = (now - then for then, now in zip(before, after, strict=True))
    assert at_client <= 4 and 0 < at_server <= 4, service.pair.logs()
    service.assert_untouched()


@contextlib.contextmanager
def few_descriptors(pid: int, spare: int) -> Iterator[None]:
    """That process may open so many more."""
    used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + spare, limits[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def still_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        sock.recv(1)
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    pytest.fail("a stranger got an answer")


def test_keys_that_differ_are_named_at_both_ends() -> None:
    with (
        Lab(emulate=False) as lab,
        Pair(lab, start=False, client_tunnel='connect_timeout = "1s"\n') as pair,
    ):
        pair.start("server")
        (pair.folder / "laptop.key").write_bytes(base64.b64encode(bytes(32)))
        pair.start("client")
        pair.wait(lambda: "no answer to the handshake" in pair.log("client"), "the client's word")
        pair.wait(lambda: "handshakes refused" in pair.log("server"), "the server's word")
        assert 'reason="Noise message with a bad tag"' in pair.log("server")
        assert "bad tag" not in pair.log("client"), "nobody tells a stranger why"
