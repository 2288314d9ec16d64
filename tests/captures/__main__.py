"""Runs the pair, its load, and `status` and `top` in terminals of two sizes."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.captures.picture import write_svg
from tests.netlab import Connection, Lab, Link
from tests.system.instances import Instance, Instances
from tests.system.pseudo_terminal import PseudoTerminal

DOCS = Path(__file__).parents[2] / "docs"
SIZES = ((80, 24), (200, 34))
STRIPES = 6
PORTS = "7001-7004"
SPRAY_PORTS_UP = 4
LINK = Link(delay_ms=25, rate_bps=500e6)
PLAIN = Connection(rate_bps=10e6)
CONNECTIONS = (PLAIN, PLAIN, PLAIN, Connection(rate_bps=10e6, delay_ms=70), PLAIN, Connection(rate_bps=10e6, loss=0.02))
WATCH_S = 130.0
PERIODS_S = (9.0, 5.0, 14.0, 4.0)
"""For so long there is load, and then none, by turns: a line that is level shows nothing."""

CLIENT = """role = "client"
workers = 2
[auth]
{key}
[[tunnel]]
name = "web"
mode = "stripe"
host = "{address}"
host_port = 9000
local_port = 8080
somaxconn = {stripes}
congestion = "cubic"
[[tunnel]]
name = "kcp"
mode = "spray"
host = "{address}"
ports = "{ports}"
type = "udp"
ludp = "127.0.0.1:30000"
"""
SERVER = """role = "server"
workers = 2
[[client]]
{key}
[[tunnel]]
name = "web"
mode = "stripe"
host_port = 9000
remote_port = 8000
congestion = "cubic"
[[tunnel]]
name = "kcp"
mode = "spray"
ports = "{ports}"
type = "udp"
taddr = "127.0.0.1:9999"
"""


class Load:
    """A download through the stripes, and datagrams there and back through the ports, until the block ends."""

    def __init__(self, lab: Lab) -> None:
        self._over = threading.Event()
        self._listener = lab.listen("server", "127.0.0.1", 8000)
        self._reader = lab.connect("client", "127.0.0.1", 8080)
        self._writer, _ = self._listener.accept()
        self._target = lab.socket("server", socket.AF_INET, socket.SOCK_DGRAM)
        self._target.bind(("127.0.0.1", 9999))
        self._application = lab.socket("client", socket.AF_INET, socket.SOCK_DGRAM)
        self._application.connect(("127.0.0.1", 30000))
        for sock in (self._reader, self._writer, self._target, self._application):
            sock.settimeout(0.5)
        parts = (self._write, self._read, self._answer, self._send)
        self._threads = [threading.Thread(target=part) for part in parts]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        for sock in (self._reader, self._writer, self._target, self._application, self._listener):
            sock.close()

    def _write(self) -> None:
        block = os.urandom(1 << 16)
        start_s = time.monotonic()
        while not self._over.is_set():
            place = (time.monotonic() - start_s) % sum(PERIODS_S)
            if PERIODS_S[0] < place < sum(PERIODS_S[:2]) or place > sum(PERIODS_S[:3]):
                time.sleep(0.1)
                continue
            with contextlib.suppress(TimeoutError):
                self._writer.send(block)

    def _read(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                self._reader.recv(1 << 20)

    def _answer(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                datagram, source = self._target.recvfrom(2000)
                self._target.sendto(datagram[:600], source)

    def _send(self) -> None:
        """1000 a second, 9.6 Mbit/s there and half of it back."""
        datagram = os.urandom(1200)
        while not self._over.is_set():
            for _ in range(10):
                self._application.send(datagram)
            time.sleep(0.01)


@contextlib.contextmanager
def pair() -> Iterator[tuple[Lab, Instance, Path]]:
    """The client, and its configuration."""
    with Lab(LINK, connections=CONNECTIONS) as lab, Instances(lab) as instances:
        words = {"key": instances.key("laptop"), "address": lab.server_ip4, "ports": PORTS, "stripes": STRIPES}
        instances.start("server", "server", SERVER.format(**words))
        client = instances.start("client", "client", CLIENT.format(**words))
        client.wait_carriers("web", STRIPES)
        client.wait_carriers("kcp", SPRAY_PORTS_UP)
        yield lab, client, instances.file("client")


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    with pair() as (lab, _, file), Load(lab):
        tops = [PseudoTerminal(_command("top", file), *size) for size in SIZES]
        with tops[0], tops[1]:
            for top in tops:
                top.wait(lambda screen: "web" in screen.text)
                top.press("a")
            deadline = time.monotonic() + WATCH_S
            while time.monotonic() < deadline:
                for top in tops:
                    top.read(0.1)
            for size, top in zip(SIZES, tops, strict=True):
                write_svg(DOCS / f"top-{size[0]}.svg", f"forwarder top -c {file.name}", top.screen.coloured, size[0])
                top.press("q")
                top.exit_code()
        for columns, lines in SIZES:
            with PseudoTerminal(_command("status", file), columns, lines) as terminal:
                terminal.exit_code()
                shown = terminal.screen.written.replace("\r\n", "\n").rstrip("\n").split("\n")
            write_svg(DOCS / f"status-{columns}.svg", f"forwarder status -c {file.name}", shown, columns)


def _command(name: str, file: Path) -> list[str]:
    return [sys.executable, "-m", "forwarder", name, "-c", str(file)]


if __name__ == "__main__":
    main()
