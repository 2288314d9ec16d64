"""A client and a server of forwarder with a fresh key, started as a user starts them."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from forwarder.control import ControlError, request
from forwarder.keys import new_key, write_key_file
from tests.demo.place import SPRAY_PORTS, Place, Process, running
from tests.demo.signals import Signals
from tests.demo.web import DemoError

HOST_PORT = 9000
LOCAL_PORT = 8080
LOCAL_DATAGRAMS_PORT = 30000

_START_S = 30.0
_STATUS_S = 5.0

_SERVER = """\
role = "server"
drain_timeout = "1s"
[control]
socket = "server.sock"
[[client]]
key_id = "demo"
key_file = "demo.key"
[[tunnel]]
"""
_CLIENT = """\
role = "client"
drain_timeout = "1s"
[control]
socket = "client.sock"
[auth]
key_id = "demo"
key_file = "demo.key"
[[tunnel]]
"""
_STRIPE_SERVER = """\
name = "web"
mode = "stripe"
listen = "{server}"
host_port = {host_port}
remote_port = {remote_port}
{congestion}
"""
_STRIPE_CLIENT = """\
name = "web"
mode = "stripe"
host = "{server}"
host_port = {host_port}
local_port = {local_port}
somaxconn = {stripes}
{congestion}
"""
_SPRAY_SERVER = """\
name = "kcp"
mode = "spray"
listen = "{server}"
ports = "{ports}"
type = "{kind}"
taddr = "127.0.0.1:{target_port}"
"""
_SPRAY_CLIENT = """\
name = "kcp"
mode = "spray"
host = "{server}"
ports = "{ports}"
type = "{kind}"
ludp = "127.0.0.1:{local_port}"
"""


@contextlib.contextmanager
def stripes(place: Place, folder: Path, count: int, remote_port: int, signals: Signals) -> Iterator[int]:
    """Yields the client's local port once all stripes are there."""
    local_port = place.port(LOCAL_PORT)
    values = {
        "server": place.server,
        "host_port": place.port(HOST_PORT),
        "local_port": local_port,
        "remote_port": remote_port,
        "stripes": count,
        "congestion": f'congestion = "{place.congestion}"' if place.congestion else "",
    }
    texts = {"server": _STRIPE_SERVER.format(**values), "client": _STRIPE_CLIENT.format(**values)}
    with _both(place, folder, texts, count, "stripes", signals):
        yield local_port


@contextlib.contextmanager
def spray(place: Place, folder: Path, target_port: int, signals: Signals) -> Iterator[int]:
    """Yields the client's local UDP port once all ports are up. They look like TCP, where nothing has to be asked."""
    local_port = place.port(LOCAL_DATAGRAMS_PORT)
    values = {
        "server": place.server,
        "ports": ",".join(str(place.port(port)) for port in SPRAY_PORTS),
        "kind": "tcp" if place.lab else "udp",
        "target_port": target_port,
        "local_port": local_port,
    }
    texts = {"server": _SPRAY_SERVER.format(**values), "client": _SPRAY_CLIENT.format(**values)}
    with _both(place, folder, texts, len(SPRAY_PORTS), "ports", signals):
        yield local_port


@contextlib.contextmanager
def _both(
    place: Place, folder: Path, tunnels: dict[str, str], carriers: int, what: str, signals: Signals
) -> Iterator[None]:
    """Until the end of the block, from when both ends have so many carriers on."""
    folder.mkdir()
    write_key_file(folder / "demo.key", new_key())
    (folder / "server.toml").write_text(_SERVER + tunnels["server"])
    (folder / "client.toml").write_text(_CLIENT + tunnels["client"])
    with running(_start(place, "server", folder)) as server, running(_start(place, "client", folder)) as client:
        processes = {"server": server, "client": client}

        def up() -> bool:
            return all(_carriers(folder, end) >= carriers for end in processes) or any(
                process.poll() is not None for process in processes.values()
            )

        in_time = signals.wait(up, _START_S)
        for end, process in processes.items():
            if not in_time or process.poll() is not None:
                raise DemoError(f"{carriers} {what} do not come up; the {end} says:\n{_log(folder, end)}")
        yield


def _start(place: Place, end: str, folder: Path) -> Process:
    with open(folder / f"{end}.log", "wb") as log:
        argv = [sys.executable, "-m", "forwarder", "start", "-c", str(folder / f"{end}.toml")]
        return place.start(end, argv, stdout=log, stderr=log)


def _carriers(folder: Path, end: str) -> int:
    """How many that end says are up; none while it does not answer."""
    try:
        status = request(folder / f"{end}.sock", {"command": "status"}, _STATUS_S)
    except ControlError:
        return 0
    return sum(session["carriers_up"] for tunnel in status.get("tunnels", ()) for session in tunnel["sessions"])


def _log(folder: Path, end: str) -> str:
    return (folder / f"{end}.log").read_text().strip()
