"""The log: one record a line, a fixed sentence and then its values, as text or JSON.

`log(INFO, "a worker is ready", worker=0)` is the standard library's `logger.info("a worker is ready", {"worker": 0})`,
which takes a single dict as the record's arguments. `logger.info("a worker is ready worker=%d", 0)` reads the same.

Only the supervisor holds the log file. Workers send it finished lines over a datagram socket, so a rotated file is
reopened in one place, by who may open it. Nothing here blocks or raises: a line that cannot be written, for a full disk
or a reader that is away, is counted, and a line with the count goes before the next one that can.
"""

import contextlib
import errno
import json
import logging
import os
import re
import select
import socket
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from forwarder.errors import BootError
from workers.settings import LogSettings

PAIR = re.compile(r" (?=[a-z_]\w*=)")
LOGGER = logging.getLogger("forwarder")
STDERR = 2
_WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
# A pipe that polls writable takes this much without blocking (POSIX PIPE_BUF on Linux).
PIPE_LINE_MAX = 4096
# One datagram; a traceback is cut here.
WORKER_LINE_MAX = 32768


class LineFormatter(logging.Formatter):
    """One line a record: `time LEVEL process: sentence key=value` or a JSON object of the same."""

    def __init__(self, process: str, json_lines: bool) -> None:
        super().__init__()
        self._process = process
        self._json = json_lines

    def lost_line(self, lost: int) -> bytes:
        """The line that takes the place of lost ones."""
        told = logging.LogRecord(LOGGER.name, logging.WARNING, "", 0, "log lines were lost", ({"lines": lost},), None)
        return self.format(told).encode() + b"\n"

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{seconds}.{int(record.msecs):03d}Z"
        values: dict[str, object] = {}
        if isinstance(record.args, Mapping):
            sentence, values = str(record.msg), dict(record.args)
        else:
            sentence, *pairs = PAIR.split(record.getMessage())
            for pair in pairs:
                key, _, values[key] = pair.partition("=")
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)
        if self._json:
            head = {"time": stamp, "level": record.levelname.lower(), "process": self._process, "message": sentence}
            return json.dumps({**values, **head}, default=str)
        tail = "".join(f" {key}={_plain(value)}" for key, value in values.items())
        return f"{stamp} {record.levelname} {self._process}: {_one_line(sentence)}{tail}"


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _plain(value: object) -> str:
    """A value as `key=value` shows it: quoted only where it would not read as one word."""
    text = str(value)
    if text and text.isprintable() and not any(c in ' "=' for c in text):
        return text
    return json.dumps(text, ensure_ascii=False)


class Output(ABC):
    """Where finished lines go; counts those that did not get there."""

    def __init__(self) -> None:
        self.lost = 0
        self.lost_line: Callable[[int], bytes] = lambda lost: b"(%d log lines were lost here)\n" % lost

    def write(self, line: bytes) -> None:
        """Takes a whole line with its line feed."""
        if self.lost:
            line = self.lost_line(self.lost) + line
        if self._put(line):
            self.lost = 0
        else:
            self.lost += 1

    @abstractmethod
    def _put(self, line: bytes) -> bool:
        """True if the line was taken."""


class FileOutput(Output):
    """A file that is appended to, or standard error (`path` None)."""

    def __init__(self, path: str | None) -> None:
        """Raises BootError if the file cannot be opened; later trouble with it only loses lines."""
        super().__init__()
        self._path = None if path is None else os.path.abspath(path)
        self._fd = STDERR
        if self._path is not None:
            try:
                self._fd = _open_log(self._path)
            except OSError as error:
                raise BootError(_code_of(error), f"[log] file: cannot open {path}: {error.strerror}") from None
        self._may_block = _may_block(self._fd)
        self._torn = self._told = False
        self._has_standard_error = False

    def take_standard_error(self) -> None:
        """From now on what the interpreter and libraries write to standard error goes to the file, too."""
        os.dup2(self._fd, STDERR)
        self._has_standard_error = True

    def reopen(self) -> None:
        """Opens the path anew, after a rotation; keeps the old file if that fails. Raises OSError then."""
        if self._path is None:
            return
        fd = _open_log(self._path)
        self.close()
        self._fd, self._torn = fd, False
        self._may_block = _may_block(fd)
        if self._has_standard_error:
            self.take_standard_error()

    def move(self, path: str | None) -> None:
        """Goes to another file from now on. Raises BootError, and then stays."""
        other = FileOutput(path)
        self.close()
        self._path, self._fd, self._may_block = other._path, other._fd, other._may_block
        if self._has_standard_error:
            self.take_standard_error()

    @property
    def has_standard_error(self) -> bool:
        return self._has_standard_error

    def close(self) -> None:
        if self._fd not in (STDERR, -1):
            os.close(self._fd)
        self._fd = -1

    def _put(self, line: bytes) -> bool:
        if self._torn:
            line = b"\n" + line
        if self._may_block and len(line) > PIPE_LINE_MAX:
            line = line[: PIPE_LINE_MAX - 1] + b"\n"
        try:
            written = _write(self._fd, self._may_block, line)
        except OSError as error:
            self._tell(error)
            return False
        if written:
            self._torn, self._told = written < len(line), False
        return written == len(line)

    def _tell(self, error: OSError) -> None:
        """Says once that the log file takes nothing, to whoever sees standard error."""
        if self._path is None or self._has_standard_error or self._told:
            return
        self._told = True
        reason = (error.strerror or str(error)).lower()
        line = f"log file {self._path}: {reason}: lines are lost until it takes them again\n"
        with contextlib.suppress(OSError):
            _write(STDERR, _may_block(STDERR), line.encode("utf-8", "backslashreplace"))


def _write(fd: int, may_block: bool, line: bytes) -> int:
    """The bytes that were taken: none if it would block. Raises OSError."""
    if may_block:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if not any(events & select.POLLOUT for _, events in poll.poll(0)):
            return 0
    return os.write(fd, line)


def _code_of(error: OSError) -> int:
    """The exit code for a log that cannot be opened: not permitted, a mistake in its path, or something is missing."""
    if isinstance(error, PermissionError):
        return 77
    return 78 if error.errno in _WRONG_PATH else 69


def _open_log(path: str) -> int:
    """Non-blocking, for the sake of a FIFO without a reader."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    return os.open(path, flags, 0o640)


def _may_block(fd: int) -> bool:
    try:
        return not stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


class WorkerOutput(Output):
    """A worker's end of the socket pair whose other end the supervisor writes to the file. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        sock.setblocking(False)

    def _put(self, line: bytes) -> bool:
        if len(line) > WORKER_LINE_MAX:
            line = line[: WORKER_LINE_MAX - 1] + b"\n"
        try:
            return self._sock.send(line) == len(line)
        except OSError:
            return False


class WorkerLines:
    """The socket pair by which finished lines of all workers reach the one Output."""

    def __init__(self, saved: tuple[int, int] | None = None) -> None:
        """saved: the descriptors that another program of this process left."""
        if saved is None:
            self._receiver, self.sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        else:
            self._receiver, self.sender = (socket.socket(fileno=fd) for fd in saved)
        self._receiver.setblocking(False)

    def fileno(self) -> int:
        return self._receiver.fileno()

    def saved(self) -> tuple[int, int]:
        """The descriptors of both ends."""
        return self._receiver.fileno(), self.sender.fileno()

    def pass_on(self, output: Output, lines_max: int = 256) -> None:
        """Writes what has arrived, within reason for one turn."""
        for _ in range(lines_max):
            try:
                line = self._receiver.recv(WORKER_LINE_MAX)
            except OSError:
                return
            output.write(line)

    def close_in_child(self) -> None:
        self._receiver.close()

    def close(self) -> None:
        self._receiver.close()
        self.sender.close()


class LineHandler(logging.Handler):
    """Hands formatted lines to an Output; a record that cannot be formatted is counted as lost."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
        except Exception:  # a mistake in a log call must not stop traffic
            self._output.lost += 1
            return
        self._output.write(line)


def log(level: int, sentence: str, /, **values: object) -> None:
    """Logs a fixed sentence and its values, for the supervisor's side."""
    LOGGER.log(level, sentence, *([values] if values else []))


def set_up(settings: LogSettings, output: Output, process: str) -> None:
    """Makes `output` the only place that this process logs to; `process` names it in every line."""
    handler = LineHandler(output)
    formatter = LineFormatter(process, settings.format == "json")
    handler.setFormatter(formatter)
    output.lost_line = formatter.lost_line
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
