"""The metrics child of real instances: what it says while they live and die, and what it may.

FORWARDER_TEST_LONG=1: a real Prometheus scrapes a pair, which answers every query of the dashboard; what ten scrapes a
second cost.
"""

import http.client
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.free_ports import free_port
from tests.netlab import Lab
from tests.system.load import Bulk, judged
from tests.system.pair import Pair
from tests.system.payload import exchange, together
from tests.system.processes import skip_unless_nobody_can_import
from tests.system.scrape import get, samples
from tests.system.test_exit_codes import forwarder, write_client

ROOT = Path(__file__).parents[2]
LONG = pytest.mark.skipif(not os.environ.get("FORWARDER_TEST_LONG"), reason="takes minutes: FORWARDER_TEST_LONG=1")
METRICS = {"client": '[metrics]\nlisten = "127.0.0.1:9464"', "server": '[metrics]\nlisten = "[::]:9465"'}
PORTS = {"client": 9464, "server": 9465}
MIB = 1 << 20


def wait_until(true: Callable[[], Any], what: str, patience_s: float = 10.0) -> Any:
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(OSError):
            if found := true():
                return found
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)


def way_to(lab: Lab, end: str) -> Callable[[], socket.socket]:
    return partial(lab.connect, end, "127.0.0.1", PORTS[end], timeout=5)


# In a lab


@pytest.fixture
def pair(lab: Lab) -> Iterator[Pair]:
    with Pair(lab, workers=(2, 1), client=METRICS["client"], server=METRICS["server"]) as pair:
        yield pair


def sums(scrape: dict[str, float]) -> dict[str, float]:
    """Counters of tunnels, which no death of a worker may take back."""
    return {name: value for name, value in scrape.items() if "_total " in name and " tunnel=" in name}


def test_totals_outlive_the_worker_that_counted_them(lab: Lab, pair: Pair) -> None:
    client, server = way_to(lab, "client"), way_to(lab, "server")
    with pair.listen() as listener:
        for _ in range(4):
            with pair.connect() as application, listener.accept()[0] as service:
                service.settimeout(20)
                exchange(application, service, MIB)
        name = "forwarder_received_bytes_total tunnel=web"
        wait_until(lambda: samples(client).get(name, 0) >= 4 * MIB, "4 MiB in the client's metrics")
        wait_until(lambda: samples(server).get(name, 0) >= 4 * MIB, "4 MiB in the server's metrics")
        assert get(client, "/healthz") == (200, "ok\n")
        before = samples(client)
        assert before["forwarder_carriers_up kind=stripe tunnel=web"] == 10
        assert before["forwarder_flows_total tunnel=web"] == 4
        os.kill(pair.worker_pids("client")[0], signal.SIGKILL)
        deadline, is_back = time.monotonic() + 10, False
        while not is_back:
            assert time.monotonic() < deadline, pair.logs()
            time.sleep(0.1)
            now = samples(client)
            for counter, value in sums(before).items():
                assert now[counter] >= value, counter
            before = now
            is_back = now["forwarder_worker_restarts_total worker=0"] == 1 and now["forwarder_ready"] == 1
        assert now[name] >= 4 * MIB
        wait_until(lambda: samples(client)["forwarder_carriers_up kind=stripe tunnel=web"] == 10, "all stripes again")


# On this host


class Alone:
    """A client whose server is not there. The metrics child is found by its title."""

    def __init__(self, folder: Path, top: str = "") -> None:
        self.port = free_port()
        file = write_client(folder, free_port())
        file.write_text(f'{top}\n{file.read_text()}[metrics]\nlisten = "127.0.0.1:{self.port}"\n')
        self.log = folder / "log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "forwarder", "start", "-c", str(file)]
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdin=subprocess.DEVNULL)
        wait_until(lambda: get(self.connect, "/healthz").status == 200, "healthy instance")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def child(self) -> psutil.Process:
        found = psutil.Process(self.process.pid).children()
        return wait_until(lambda: [each for each in found if each.cmdline()[0] == "forwarder: metrics"], "child")[0]


def test_child_that_dies_is_replaced_and_the_next_one_ends_with_the_supervisor(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    try:
        first = alone.child()
        first.kill()
        wait_until(lambda: get(alone.connect, "/").status == 200, "page")
        second = alone.child()
        assert second.pid != first.pid and second.nice() > 0
        assert "the metrics child died and is replaced" in alone.log.read_text()
    finally:
        alone.process.kill()
        alone.process.wait()
    second.wait(5)
    with pytest.raises(ConnectionRefusedError):
        alone.connect()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_child_has_no_rights_and_nothing_of_the_workers(tmp_path: Path) -> None:
    skip_unless_nobody_can_import()
    tmp_path.chmod(0o755)
    alone = Alone(tmp_path, 'user = "nobody"')
    try:
        child = alone.child()
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh")} == {0}
        assert child.uids().effective == pwd.getpwnam("nobody").pw_uid
        opened = [os.readlink(each) for each in Path(f"/proc/{child.pid}/fd").iterdir()]
        assert sum(each.startswith("/memfd:") for each in opened) == 1
        assert not any("forwarder-arena" in each or "forwarder-ring" in each for each in opened), opened
        assert len(opened) <= 12, opened
        alone.process.terminate()
        assert alone.process.wait(20) == 0
        assert not child.is_running()
    finally:
        alone.process.kill()
        alone.process.wait()


def test_taken_address_is_69_with_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file = write_client(tmp_path, free_port())
        file.write_text(f'{file.read_text()}[metrics]\nlisten = "127.0.0.1:{port}"\n')
        line = f"metrics: cannot listen on 127.0.0.1:{port}: address already in use"
        assert forwarder("start", "-c", file) == (69, [line])
        file.write_text(file.read_text().replace(f"127.0.0.1:{port}", f"192.0.2.1:{port}"))
        code, (line,) = forwarder("start", "-c", file)
        assert code == 69 and line.startswith(f"metrics: cannot listen on 192.0.2.1:{port}: ")


# Files for Prometheus and Grafana


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} (Debian: prometheus)")
    return found


@pytest.mark.parametrize("check", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")])
def test_alerts_are_what_promtool_wants(check: tuple[str, ...]) -> None:
    done = subprocess.run(
        [program("promtool"), *check],
        cwd=ROOT / "deploy" / "prometheus",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def queries() -> list[str]:
    """Every query of the dashboard, its variables filled in."""
    board = json.loads((ROOT / "deploy" / "grafana" / "forwarder.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    values = {"$__rate_interval": "15s", "$job": "forwarder", "$instance": ".+", "$tunnel": ".+"}
    for name, value in values.items():
        found = [each.replace(name, value) for each in found]
    assert len(found) > 40 and not any("$" in each for each in found)
    return found


SPRAY = {
    "client": '[[tunnel]]\nname = "kcp"\nmode = "spray"\nports = "7001-7004"\ntype = "udp"\nhost = "{server}"\n'
    'ludp = "127.0.0.1:30000"\n',
    "server": '[[tunnel]]\nname = "kcp"\nmode = "spray"\nports = "7001-7004"\ntype = "udp"\ntaddr = "127.0.0.1:9999"\n',
}


class Prometheus:
    """Scrapes both ends of a pair every second, from the client's namespace."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        rules = ROOT / "deploy" / "prometheus" / "alerts.yml"
        targets = f'["127.0.0.1:{PORTS["client"]}", "{lab.server_ip4}:{PORTS["server"]}"]'
        (folder / "prometheus.yml").write_text(
            f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{rules}]\n"
            f"scrape_configs: [{{job_name: forwarder, static_configs: [{{targets: {targets}}}]}}]\n"
        )
        with (folder / "log").open("wb") as log:
            self.process = lab.popen(
                "client",
                [
                    program("prometheus"),
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/data",
                    "--web.listen-address=127.0.0.1:9090",
                ],
                stdout=log,
                stderr=log,
            )

    def ask(self, path: str, **parameters: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", 9090)
        connection.sock = self.lab.connect("client", "127.0.0.1", 9090, timeout=10)
        connection.request("GET", f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        answer = json.loads(connection.getresponse().read())
        connection.close()
        assert answer["status"] == "success", answer
        return answer["data"]


@LONG
@pytest.mark.deadline(240)
def test_prometheus_answers_every_query_of_the_dashboard(lab: Lab, tmp_path: Path) -> None:
    program("prometheus")
    with ExitStack() as stack:
        spray = {end: text.replace("{server}", lab.server_ip4) for end, text in SPRAY.items()}
        pair = stack.enter_context(
            Pair(
                lab,
                workers=(2, 2),
                client=METRICS["client"],
                server=METRICS["server"],
                client_tunnel=spray["client"],
                server_tunnel=spray["server"],
            )
        )
        prometheus = Prometheus(lab, tmp_path)
        stack.callback(prometheus.process.wait)
        stack.callback(prometheus.process.kill)
        listener = stack.enter_context(pair.listen())
        with Bulk(pair, listener, 4, upwards=False) as bulk:
            bulk.measure(25)
        wait_until(lambda: prometheus.ask("query", query="up"), "Prometheus")
        unanswered = [query for query in queries() if not prometheus.ask("query", query=query)["result"]]
        # Where nothing was lost or refused there may still be a series: it is at 0.
        assert unanswered == []
        ready = prometheus.ask("query", query="forwarder_ready")["result"]
        assert [each["value"][1] for each in ready] == ["1", "1"]
        groups = prometheus.ask("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) > 10 and {rule["health"] for rule in rules} == {"ok"}
        targets = prometheus.ask("targets")["activeTargets"]
        assert {target["health"] for target in targets} == {"up"}, targets
        for end in ("client", "server"):
            text = get(way_to(lab, end)).body
            check = subprocess.run(
                [program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
            )
            assert (check.returncode, check.stdout + check.stderr) == (0, "")


def cpu_s(supervisors: list[int]) -> dict[str, float]:
    """CPU time of each process of these instances, by its title and pid."""
    found = [psutil.Process(pid) for pid in supervisors]
    processes = [*found, *(child for each in found for child in each.children())]
    return {f"{each.cmdline()[0]} {each.pid}": sum(each.cpu_times()[:2]) for each in processes}


def scrape(connect: Callable[[], socket.socket], seconds: float, a_second: float) -> int:
    """How many scrapes there were."""
    begin, count = time.monotonic(), 0
    while time.monotonic() < begin + seconds:
        assert get(connect).status == 200
        count += 1
        time.sleep(max(0.0, begin + count / a_second - time.monotonic()))
    return count


@LONG
@pytest.mark.deadline(120)
def test_ten_scrapes_a_second_cost_less_than_a_hundredth(lab: Lab, pair: Pair) -> None:
    """Of the CPU time of all processes of both ends, which move what they can."""
    pids = [pair.status(end)["pid"] for end in PORTS]
    with judged() as require, pair.listen() as listener, Bulk(pair, listener, 4, upwards=False) as bulk:
        bulk.measure(2)
        before = cpu_s(pids)
        rates, count = together(lambda: bulk.measure(20), lambda: scrape(way_to(lab, "client"), 20, 10))
        used = {name: value - before[name] for name, value in cpu_s(pids).items()}
        assert count > 150
        whole, child = sum(used.values()), max(value for name, value in used.items() if "metrics" in name)
        share = f"{child / whole:.2%} of {whole / 20:.2f} cores"
        print(f"\n{count} scrapes at {sum(rates) / 1e6:.0f} Mbit/s: {share}, {used}")
        require(child < 0.01 * whole, f"the metrics child took {share}")
