"""Going to the background, and telling who waits in the foreground how the start went."""

import contextlib
import json
import os
import sys

from forwarder.errors import complain


class Announcement:
    """Reports, once, that the instance serves or why it does not: on standard error, or through a daemon's pipe."""

    def __init__(self, pipe: int | None = None) -> None:
        self._pipe = pipe
        self._background = pipe is not None

    def ready(self) -> None:
        self._report(0, "")

    def failed(self, code: int, line: str) -> None:
        if self._background:
            self._report(code, line)
            return
        complain(line)

    def close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def _report(self, code: int, line: str) -> None:
        if self._pipe is not None:
            with contextlib.suppress(OSError):  # nobody waits any more
                os.write(self._pipe, json.dumps([code, line]).encode() + b"\n")
            self.close()


def detach() -> Announcement | int:
    """Forks a daemon. In it: what it reports through. In the calling process: the exit code that it reported.

    The daemon has a session of its own without being its leader, `/` as directory, and /dev/null as standard streams:
    give it a better standard error.
    Call it while this process has one thread and holds nothing that must not be shared.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    middle = os.fork()
    if middle:
        os.close(writing)
        os.waitpid(middle, 0)
        return _outcome(reading)
    os.close(reading)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
    return Announcement(writing)


def _outcome(reading: int) -> int:
    """Waits for the daemon's line; end of file without one means that it died."""
    with open(reading, "rb") as pipe:
        line = pipe.readline()
    try:
        code, message = json.loads(line)
    except ValueError:
        code, message = 1, "the daemon died while starting"
    if message:
        complain(message)
    return int(code)
