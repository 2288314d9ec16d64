"""One instance: nobody else holds its control socket or its pid file, and nothing that a killed one left is in the way.

A control socket is alive if it takes a connection, a pid file if it is locked; both locks die with their process.
Looking, clearing away and taking over happen under a lock on the directory itself, which leaves no file behind.
"""

import contextlib
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from forwarder.errors import BootError

SOCKET_PATH_MAX = 107  # sun_path without its zero
LOCK_TIMEOUT_S = 5.0
BACKLOG = 16


def take_control_socket(path: Path) -> tuple[socket.socket, bool]:
    """The listening control socket, non-blocking, mode 0600; and whether a killed instance's was cleared away.

    Creates the directory. Raises BootError.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise BootError(78, f"[control] socket: expected at most {SOCKET_PATH_MAX} bytes, found {path}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _directory_lock(path.parent):
            stale = _clear_stale_socket(path)
            return _bind(path), stale
    except OSError as error:
        raise _refused("control socket", path, error) from None


def _clear_stale_socket(path: Path) -> bool:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BootError(69, f"control socket {path}: something else is there")
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(LOCK_TIMEOUT_S)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return True
        except (TimeoutError, BlockingIOError):
            raise BootError(69, f"already running, but not answering (control socket {path})") from None
        pid, _, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    raise BootError(69, f"already running with pid {pid} (control socket {path})")


def _bind(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        sock.bind(os.fspath(path))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


class PidFile:
    """Holds this process's pid, and a lock on it, from `take` to `release`."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._fd = -1

    def take(self) -> None:
        """Writes the file as a whole. Raises BootError if another process holds it."""
        fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with _directory_lock(self._path.parent):
                self._refuse_if_held()
                fresh.unlink(missing_ok=True)  # of one that was killed right here, with the same pid
                self._fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(self._fd, b"%d\n" % os.getpid())
                fresh.rename(self._path)
        except OSError as error:
            self.close()
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise _refused("pid file", self._path, error) from None

    def saved(self) -> tuple[str, int]:
        """Path and descriptor, for `restored`."""
        return str(self._path), self._fd

    @classmethod
    def restored(cls, saved: tuple[str, int]) -> "PidFile":
        """The same one, held by this process under another program."""
        pid_file = cls(Path(saved[0]))
        pid_file._fd = saved[1]
        return pid_file

    def _refuse_if_held(self) -> None:
        try:
            held = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(held, 32).decode("ascii", "replace").strip()
            raise BootError(69, f"already running with pid {pid} (pid file {self._path})") from None
        finally:
            os.close(held)

    def release(self) -> None:
        """Removes the file, if it is still this one's, and lets go."""
        if self._fd == -1:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(self._path.stat(), os.fstat(self._fd)):
                self._path.unlink()
        self.close()

    def close(self) -> None:
        """For a forked child, whose copy would keep the lock."""
        if self._fd != -1:
            os.close(self._fd)
            self._fd = -1


@contextlib.contextmanager
def _directory_lock(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise BootError(69, f"{directory} stays locked by another process") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _refused(what: str, path: Path, error: OSError) -> BootError:
    code = 77 if isinstance(error, PermissionError) else 69
    return BootError(code, f"{what} {path}: {(error.strerror or str(error)).lower()}")
