"""A client and a server of forwarder with a fresh key, started as a user starts them."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from forwarder.control import ControlError, request
from forwarder.keys import new_key, write_key_file
from tests.demo.place import Place, Process, running
from tests.demo.signals import Signals
from tests.demo.web import DemoError

HOST_PORT = 9000
LOCAL_PORT = 8080

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
name = "web"
mode = "stripe"
listen = "{server}"
host_port = {host_port}
remote_port = {remote_port}
{congestion}
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
name = "web"
mode = "stripe"
host = "{server}"
host_port = {host_port}
local_port = {local_port}
somaxconn = {stripes}
{congestion}
"""


@contextlib.contextmanager
def tunnel(place: Place, folder: Path, stripes: int, remote_port: int, signals: Signals) -> Iterator[int]:
    """Yields the client's local port once all stripes are there."""
    folder.mkdir()
    local_port = place.port(LOCAL_PORT)
    values = {
        "server": place.server,
        "host_port": place.port(HOST_PORT),
        "local_port": local_port,
        "remote_port": remote_port,
        "stripes": stripes,
        "congestion": f'congestion = "{place.congestion}"' if place.congestion else "",
    }
    write_key_file(folder / "demo.key", new_key())
    (folder / "server.toml").write_text(_SERVER.format(**values))
    (folder / "client.toml").write_text(_CLIENT.format(**values))
    with running(_start(place, "server", folder)) as server, running(_start(place, "client", folder)) as client:
        processes = {"server": server, "client": client}

        def up() -> bool:
            return all(_stripes(folder, end) >= stripes for end in processes) or any(
                process.poll() is not None for process in processes.values()
            )

        in_time = signals.wait(up, _START_S)
        for end, process in processes.items():
            if not in_time or process.poll() is not None:
                raise DemoError(f"{stripes} stripes do not come up; the {end} says:\n{_log(folder, end)}")
        yield local_port


def _start(place: Place, end: str, folder: Path) -> Process:
    with open(folder / f"{end}.log", "wb") as log:
        argv = [sys.executable, "-m", "forwarder", "start", "-c", str(folder / f"{end}.toml")]
        return place.start(end, argv, stdout=log, stderr=log)


def _stripes(folder: Path, end: str) -> int:
    """How many that end says are up; none while it does not answer."""
    try:
        status = request(folder / f"{end}.sock", {"command": "status"}, _STATUS_S)
    except ControlError:
        return 0
    return sum(session["carriers_up"] for tunnel in status.get("tunnels", ()) for session in tunnel["sessions"])


def _log(folder: Path, end: str) -> str:
    return (folder / f"{end}.log").read_text().strip()
