"""How many stripes there are: idle workers keep one, and a server that drops what it has accepted is not stormed."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.netlab import Lab
from tests.system.pair import Pair


def accepted(pair: Pair) -> int:
    """Connections that the server's namespace has accepted so far."""
    lines = Path(f"/proc/{pair.processes['server'].pid}/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(dict(zip(names, values, strict=True))["PassiveOpens"])


def least_carriers(pair: Pair, *, upwards: bool, for_s: float) -> int:
    """The fewest stripes that were up while one connection transferred all it could, from a second after it began."""
    with pair.listen() as listener, pair.connect() as application:
        target = listener.accept()[0]
        source, sink = (application, target) if upwards else (target, application)
        stop = threading.Event()

        def send() -> None:
            block = os.urandom(1 << 18)
            while not stop.is_set():
                source.sendall(block)
            source.shutdown(1)

        def receive() -> None:
            while sink.recv(1 << 20):
                pass

        threads = [threading.Thread(target=each) for each in (send, receive)]
        for thread in threads:
            thread.start()
        least = pair.somaxconn
        try:
            time.sleep(1)
            end_s = time.monotonic() + for_s
            while time.monotonic() < end_s:
                least = min(least, pair.carriers_up())
                time.sleep(0.1)
        finally:
            stop.set()
            for thread in threads:
                thread.join(10)
            target.close()
        return least


@pytest.mark.parametrize("upwards", [True, False], ids=["upload", "download"])
def test_stripes_in_use_by_any_worker_stay_and_those_without_a_connection_go_and_come_back(
    link: Lab, upwards: bool
) -> None:
    with Pair(link, workers=(2, 2), client_tunnel='idle_timeout = "1s"') as pair:
        assert least_carriers(pair, upwards=upwards, for_s=2) == 10, pair.logs()
        pair.wait(lambda: pair.carriers_up() == 2, "idle tunnel with a stripe a worker", 5)
        assert least_carriers(pair, upwards=upwards, for_s=0.5) == 10, pair.logs()


def test_worker_without_connections_keeps_its_stripes_while_another_is_in_use(lab: Lab) -> None:
    with Pair(lab, workers=(2, 1), client_tunnel='idle_timeout = "3s"') as pair:
        with pair.listen() as listener, pair.connect(), listener.accept()[0]:
            time.sleep(5)
            assert pair.carriers_up() == 10, pair.logs()
        pair.wait(lambda: pair.carriers_up() == 2, "idle tunnel with a stripe a worker", 8)


def test_server_that_drops_every_stripe_is_dialled_with_pauses_and_both_ends_say_why(lab: Lab) -> None:
    with Pair(lab, server_tunnel='max_sessions = 1\nresume_timeout = "10s"') as pair:
        pair.stop("client", signal.SIGKILL)
        pair.start("client")
        time.sleep(1.5)
        before = accepted(pair)
        time.sleep(2)
        assert 1 <= accepted(pair) - before < 8, pair.logs()
        assert pair.log("client").count("after the handshake") == 1, pair.logs()
        assert pair.log("server").count("too many sessions") == 1, pair.logs()


def test_client_past_max_sessions_is_told_of_and_served_when_there_is_room(lab: Lab) -> None:
    with Pair(lab, server_tunnel='max_sessions = 1\nresume_timeout = "3s"') as pair:
        pair.stop("client", signal.SIGKILL)
        before = accepted(pair)
        pair.start("client")
        pair.wait(lambda: "too many sessions" in pair.log("server"), "refusal in the server's log", 3)
        pair.wait(lambda: pair.carriers_up() == 10, "all stripes", 10)
        assert pair.log("client").count("after the handshake") == 1, pair.logs()
        assert accepted(pair) - before < 40, pair.logs()
