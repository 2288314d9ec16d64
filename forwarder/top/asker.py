"""Asks the running instance for its status without ever waiting: one question at a time, each on its own connection."""

import socket
from pathlib import Path
from typing import NamedTuple

import msgspec

from forwarder.control import READ_BYTES, REPLY_MAX
from forwarder.summary import InstanceStatus

TIMEOUT_S = 10.0

_QUESTION = b'{"command": "status"}\n'


class Answer(NamedTuple):
    """What came of a question: a status, or why there is none, as one line."""

    status: InstanceStatus | None
    silence: str = ""


class Asker:
    """`socket` is open while an answer is awaited: call `on_readable` when it is, and `on_time` at `deadline_s`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._received = bytearray()
        self.socket: socket.socket | None = None
        self.deadline_s = 0.0

    def ask(self, now: float) -> Answer | None:
        """Sends the question; an answer already if nobody takes it."""
        self.close()
        self.deadline_s = now + TIMEOUT_S
        try:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self.socket.connect(str(self._path))
            self.socket.sendall(_QUESTION)
        except OSError as error:
            return self._failed(error)
        return None

    def on_readable(self) -> Answer | None:
        """Takes what has come; the answer once it is whole."""
        assert self.socket is not None
        try:
            data = self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            return self._failed(error)
        self._received += data
        if data and not data.endswith(b"\n") and len(self._received) <= REPLY_MAX:
            return None
        line = bytes(self._received)
        self.close()
        return self._read(line)

    def on_time(self) -> Answer:
        """Nothing has come for too long."""
        self.close()
        return Answer(None, f"no answer within {TIMEOUT_S:g} s (control socket {self._path})")

    def close(self) -> None:
        """Gives the question up."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        self._received.clear()

    def _failed(self, error: OSError) -> Answer:
        self.close()
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return Answer(None, f"no instance is running (control socket {self._path})")
        return Answer(None, f"control socket {self._path}: {(error.strerror or str(error)).lower()}")

    def _read(self, line: bytes) -> Answer:
        """An instance that ends closes its connections without an answer."""
        if not line:
            return Answer(None, f"the instance gave no answer (control socket {self._path})")
        try:
            return Answer(msgspec.json.decode(line, type=InstanceStatus))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            return Answer(None, f"the answer is not one of this version: {error}")
