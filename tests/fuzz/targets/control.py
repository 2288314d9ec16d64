"""What the supervisor hears: lines at its control socket, the answers that commands read, messages of the workers."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec

from forwarder import control, slots, status
from tests.fuzz.source import Source
from workers import boot
from workers.settings import Settings
from workers.status import CarrierStatus, SessionStatus, TunnelStatus, WorkerReport, WorkerStatus

REQUEST_MAX = 512
SETTINGS = Settings(role="client", workers=1, keys=())


def run(data: bytes) -> None:
    """First byte: who is heard."""
    source = Source(data)
    source.choose((_requests, _answer, _worker, _report))(source)


class Selector:
    """Registers, and lets the target fire what is registered."""

    def __init__(self) -> None:
        self.callbacks: dict[int, Any] = {}
        self.watched: dict[int, int] = {}

    def register(self, sock: socket.socket, events: int, data: Any) -> None:
        """As selectors."""
        self.callbacks[sock.fileno()] = data
        self.watched[sock.fileno()] = events

    modify = register

    def unregister(self, sock: socket.socket) -> None:
        """As selectors."""
        del self.callbacks[sock.fileno()], self.watched[sock.fileno()]

    def get_map(self) -> dict[int, Any]:
        """As selectors."""
        return self.callbacks


class Office:
    """A ControlServer whose only client is the other end of `sock`."""

    def __init__(self) -> None:
        self.selector = Selector()
        self.later: list[control.Client] = []
        self.requests = 0
        ours, self.sock = socket.socketpair()
        self.sock.setblocking(False)
        self.answers = bytearray()
        self.fd = ours.fileno()
        listener = SimpleNamespace(fileno=lambda: -1, accept=lambda: (ours, ""), close=lambda: None)
        path: Any = SimpleNamespace(stat=lambda: SimpleNamespace(st_ino=1), unlink=lambda: None)
        self.server = control.ControlServer(path, listener, self.selector, self.handle)  # type: ignore[arg-type]
        self.selector.callbacks[-1](1)

    def handle(self, client: control.Client, message: control.Message) -> None:
        """Answers at once, later, or for good."""
        assert client.asked, "asked while it was being answered"
        self.requests += 1
        command = message.get("command")
        if command == "later":
            self.later.append(client)
        else:
            self.server.reply(client, {"echo": message}, stay=command == "stop")

    def turn(self) -> None:
        """Events as the kernel would report them."""
        events = self.selector.watched.get(self.fd, 0)
        if events:
            self.selector.callbacks[self.fd](events)
        with suppress(BlockingIOError, ConnectionError):
            self.answers += self.sock.recv(1 << 20)

    def answer_later(self) -> None:
        """What waits is answered now."""
        while self.later:
            self.server.reply(self.later.pop(), {"late": True})


def _requests(source: Source) -> None:
    """In pieces, ended, answered late: one answer for every whole line, and a bounded memory."""
    with mock.patch.object(control, "REQUEST_MAX", REQUEST_MAX):
        office = Office()
        (client,) = office.server._clients
        try:
            while len(source):
                does = source.choose(("send", "send", "later", "end"))
                if does == "send":
                    with suppress(BlockingIOError, ConnectionError):
                        office.sock.send(source.block() * source.choose((1, 1, 1, 8)))
                elif does == "later":
                    office.answer_later()
                else:
                    with suppress(OSError):
                        office.sock.shutdown(socket.SHUT_WR)
                office.turn()
                assert len(client.received) <= REQUEST_MAX + control.READ_BYTES
            for _ in range(8):
                office.answer_later()
                office.turn()
            lines = office.answers.split(b"\n")
            assert lines.pop() == b"", "half an answer"
            assert all(isinstance(json.loads(line), dict) for line in lines)
            assert len(lines) >= office.requests
        finally:
            office.server.close()
            office.sock.close()
            client.sock.close()


def _answer(source: Source) -> None:
    """A command gets a dictionary, or ControlError of one line."""
    ours, theirs = socket.socketpair()
    ours_end = mock.MagicMock(wraps=ours)
    ours_end.__enter__ = lambda _self: ours_end
    ours_end.__exit__ = lambda *_: ours.close()
    ours_end.connect = lambda _path: None
    with theirs, mock.patch.object(socket, "socket", lambda *_: ours_end):
        for piece in source.pieces(source.take(source.number(2))):
            theirs.sendall(piece)
        theirs.shutdown(socket.SHUT_WR)
        try:
            answer = control.request(Path("/run/i.sock"), {"command": source.choose(("status", "stop"))}, 5.0)
        except control.ControlError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        else:
            assert isinstance(answer, dict)


def _worker(source: Source) -> None:
    """Packets of a worker, to which the supervisor listens, and what workers read: a message, or ValueError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        worker = slots.Worker(0, 1, 0, ours)
        packets = 0
        while len(source):
            packet = source.block() * source.choose((1, 1, 1, 64))
            if packet:
                try:
                    theirs.send(packet)
                except BlockingIOError:
                    break  # more than a socket holds: a worker would wait
                packets += 1
            with suppress(ValueError, RecursionError):
                message = msgspec.msgpack.decode(packet, type=boot.ToWorker)
                assert msgspec.msgpack.decode(slots.ENCODER.encode(message), type=boot.ToWorker) == message
        for _ in range(packets):
            try:
                for heard, fds in worker.receive():
                    assert isinstance(heard, boot.FromWorker) and not fds
            except ValueError:
                continue


def _report(source: Source) -> None:
    """A worker's report: merged with itself it can be shown, or ValueError."""
    deep = source.number()
    fd = os.memfd_create("report", os.MFD_CLOEXEC)
    try:
        os.write(fd, source.rest() if deep < 128 else b'{"x":' + b"[" * (deep * 128))
        report = status.read_report(fd)
        merged = status.merge_tunnels(SETTINGS, [report, status.read_report(fd)], "up")
        assert json.loads(msgspec.json.encode(merged)) == merged
    except (ValueError, OverflowError):
        return
    finally:
        os.close(fd)


def _packet(message: msgspec.Struct) -> bytes:
    data = slots.ENCODER.encode(message)
    return bytes((len(data),)) + data + b"\0"


def _sent(line: bytes) -> bytes:
    return b"\0" + bytes((len(line),)) + line


_CARRIER = CarrierStatus(0, 0, "stripe", "a:1", "b:2", "up", 1.5, 0.0, 1e6, 0, 2.5, 10, 20)
_SESSION = SessionStatus("00ff", "laptop", "b:2", 1, 10, 0, 0, 0, [_CARRIER])
_TUNNEL = TunnelStatus("web", "stripe", "up", 10, 20, 1, 2, 0, [_SESSION])
_REPORT = WorkerReport(WorkerStatus(0, 1, 2, "up", 1, 0, 1, 0, 0, 0), [_TUNNEL], {"slots": 0})
_STATUS = b'{"command": "status"}\n'
SEEDS = {
    "request": b"\0" + _sent(_STATUS),
    "request-in-pieces": b"\0" + b"".join(_sent(_STATUS[at : at + 4]) for at in range(0, len(_STATUS), 4)),
    "requests-late": b"\0" + _sent(b'{"command": "later"}\n' + _STATUS) + b"\2" + _sent(_STATUS),
    "request-stop": b"\0" + _sent(b'{"command": "stop"}\n') + _sent(_STATUS) + b"\3",
    "request-not-json": b"\0" + _sent(b"status\n") + _sent(b"[]\n") + b"\3",
    "request-too-long": b"\0" + (b"\0\xff" + b"x" * 255 + b"\3") * 1 + b"\3",
    "request-deep": b"\0" + (b"\0\xfa" + b"[" * 250 + b"\3") + _sent(b"\n"),
    "answer": b"\1" + (12).to_bytes(2, "big") + b'{"a": "\\u1"}' + b"\0",
    "answer-genuine": b"\1" + (9).to_bytes(2, "big") + b'{"a": 1}\n' + b"\3\3\0\1",
    "answer-deep": b"\1" + (3000).to_bytes(2, "big") + b"[" * 3000,
    "answer-empty": b"\1\0\0",
    "worker": b"\2"
    + b"".join(map(_packet, (boot.Ready(), boot.StatusReply(3), boot.Failed(69, "port"), boot.Drained()))),
    "to-worker": b"\2"
    + b"".join(
        map(_packet, (boot.StatusRequest(3), boot.Drain(2.5), boot.Quit(), boot.PeerGone(1, 9), boot.PeerJoined(2, 8)))
    ),
    "report": b"\3\0" + msgspec.json.encode(_REPORT),
    "report-deep": b"\3\xff",
    "worker-nonsense": b"\2\4\x80\xc1\xff\x91\0\3abc\0",
    "worker-deep": b"\2\x80\x82\xa4type\xa5ready\xa1x" + b"\x91" * 114 + b"\3",
}
