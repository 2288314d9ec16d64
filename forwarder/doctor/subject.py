"""What the host is examined for: a configuration and its running instance, or forwarder in general."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from forwarder.config import load
from forwarder.control import ControlError, request
from forwarder.document import read_file
from forwarder.schema import Auth, ClientFile
from workers.settings import Settings, SprayClientTunnel, SprayServerTunnel

ASK_TIMEOUT_S = 3.0
ROOTS_SOCKETS = Path("/run/forwarder")


class KeyFile(NamedTuple):
    """A file that holds a key: one of its own, or (`inline`) the configuration itself."""

    owner: str
    path: Path
    inline: bool = False


@dataclass(frozen=True, slots=True)
class Subject:
    """settings None: no configuration was named. pids: those of the running
    instance, the supervisor's first. unseen: why it is not known whether one runs."""

    file: Path | None = None
    settings: Settings | None = None
    key_files: tuple[KeyFile, ...] = ()
    pids: tuple[int, ...] = ()
    unseen: str = ""

    @property
    def wants_stripes(self) -> bool:
        return self.settings is None or bool(self.settings.client_tunnels or self.settings.server_tunnels)

    @property
    def wants_spray(self) -> bool:
        return self.settings is None or bool(self.settings.spray_tunnels)

    @property
    def wants_fake_tcp(self) -> bool:
        return self.settings is None or bool(self.fake_tcp_tunnels)

    @property
    def fake_tcp_tunnels(self) -> list[SprayClientTunnel | SprayServerTunnel]:
        """The tunnels that need packet sockets."""
        tunnels = self.settings.spray_tunnels if self.settings else ()
        return [tunnel for tunnel in tunnels if "tcp" in tunnel.kinds]


def subject_of(file: Path | None) -> Subject:
    """Reads a configuration, keys aside, and asks its instance. Raises ConfigError."""
    if file is None:
        return Subject()
    settings = load(file, secrets=False).settings
    tables = read_file(file)
    owners: list[tuple[str, Auth]] = [("auth", tables.auth)] if isinstance(tables, ClientFile) else []
    if not isinstance(tables, ClientFile):
        owners = [(f'client "{client.key_id}"', client) for client in tables.client]
    here = file.absolute().parent
    key_files = [KeyFile(owner, here / auth.key_file) for owner, auth in owners if auth.key_file is not None]
    if any(auth.key is not None for _, auth in owners):
        key_files.append(KeyFile(file.name, file.absolute(), inline=True))
    pids, unseen = _running(Path(settings.control_socket))
    return Subject(file, settings, tuple(key_files), pids, unseen)


def _running(control_socket: Path) -> tuple[tuple[int, ...], str]:
    """The processes of the running instance; none if there is none, with the reason if that is not known."""
    try:
        answer = request(control_socket, {"command": "status"}, ASK_TIMEOUT_S)
        workers = answer.get("workers", [])
        pids = [int(answer["pid"]), *(int(worker["pid"]) for worker in workers)]
    except ControlError as error:
        reason = "" if "no instance is running" in str(error) else str(error)
        return (), reason or _hidden(control_socket)
    except (KeyError, TypeError, ValueError):
        return (), "the running instance answers as another version does"
    return tuple(pid for pid in pids if pid), ""


def _hidden(control_socket: Path) -> str:
    """Root's instance has its control socket elsewhere by default, and answers nobody else."""
    of_root = ROOTS_SOCKETS / control_socket.name
    there = os.geteuid() != 0 and of_root != control_socket and of_root.exists()
    return f"control socket {of_root}: only root may ask" if there else ""
