"""How figures become tables and a plot, and where a stream is. Measurements themselves are made by
tests/system/test_throughput.py."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import datagrams, limited, loss, plot, readme, speed, ways
from tests.bench.machine import machine
from tests.bench.measure import BUSY_CORES, BenchError, Flow, Meter, _received
from tests.bench.section import ATTEMPTS, Section
from tests.bench.speed import Result
from tests.bench.table import Column, Row, Table, read_json, write_json, write_markdown
from tests.bench.trips import Trip, Trips
from tests.netlab import RunVoid

ENDS = (sys.executable, "-m", "tests.bench.ends")
DATAGRAM_ENDS = (sys.executable, "-m", "tests.bench.datagram_ends")


def flow(mbit_s: float, stripes: int = 0) -> Flow:
    return Flow(mbit_s * 1e6, 1.0, 0, 0.0, stripes)


def section(rounds: int = 1, until: float = float("inf")) -> Section:
    return Section(rounds, 20, lambda text: None, until)


def fail_with(*errors: Exception) -> Callable[[], str]:
    waiting = list(errors)

    def once() -> str:
        if waiting:
            raise waiting.pop(0)
        return "done"

    return once


def test_measurement_is_repeated_only_if_void() -> None:
    part = section()
    assert part.measure(0, "a", fail_with(*[RunVoid("late")] * (ATTEMPTS - 1)), str) == "done"
    assert part.left_out == []
    assert part.measure(0, "b", fail_with(*[RunVoid("late")] * ATTEMPTS), str) is None
    assert part.measure(1, "c", fail_with(BenchError("no")), str) is None
    assert part.left_out == ["Left out: round 1, b: late.", "Left out: round 2, c: no."]


def test_nothing_is_begun_when_time_is_over() -> None:
    part = section(until=time.monotonic())
    assert [part.measure(1, name, lambda: "done", str) for name in "ab"] == [None, None]
    assert part.left_out == ["Left out: all from round 2, a on: the time was over."]


def test_ratio_is_the_median_of_ratios_within_a_round() -> None:
    rounds: list[limited.Round] = [
        {(10, 0): flow(100), (10, 1): flow(90)},
        {(10, 0): flow(10), (10, 1): flow(8)},
        {(10, 0): flow(100)},
        {(10, 0): flow(50), (10, 1): flow(50)},
    ]
    (row,) = limited._tabulate([10], rounds, section(4)).rows
    assert (row["stripes"], row["iperf3"], row["speed_1"], row["ratio_1"]) == ("10", 75, 50, 0.9)
    assert "speed_2" not in row


def test_auto_is_compared_to_the_best_of_the_same_round() -> None:
    rounds: list[limited.Round] = [
        {(10, 0): flow(100), (40, 0): flow(400), (None, 1): flow(300, 32)},
        {(10, 0): flow(100), (None, 1): flow(50, 36), (None, 2): flow(90, 41)},
    ]
    (row,) = limited._tabulate([None], rounds, section(2)).rows
    assert (row["stripes"], row["iperf3"], row["ratio_1"], row["ratio_2"]) == ("auto (34, 41)", 250, 0.625, 0.9)


def test_loss_is_compared_to_one_connection() -> None:
    rounds: list[loss.Round] = [
        {("cubic", 1, 0): flow(2), ("cubic", 10, 1): flow(20)},
        {("cubic", 10, 1): flow(40)},
    ]
    few, row, _ = loss._tabulate(["cubic"], rounds, section(2)).rows
    assert (row["stripes"], row["plain"], row["speed_1"], row["ratio_1"]) == (10, 2, 30, 10)
    assert (few["stripes"], few["plain"]) == (1, 2) and "speed_1" not in few


def result(mbit_s: float, idle_us: float) -> Result:
    return Result(flow(mbit_s), Trips(Trip(idle_us, 10 * idle_us), Trip(2 * idle_us, 10 * idle_us)))


def speed_tables() -> list[Table]:
    contenders = [each for each in speed.contenders("cubic") if each.row in ("haproxy", "10x1", "1000x1", "1x2")]
    few, many, one = (next(each.name for each in contenders if each.row == row) for row in ("10x1", "1000x1", "1x2"))
    rounds = [
        {
            speed.HAPROXY: result(8000, 100),
            few: result(4000, 150),
            many: result(2000, 100),
            one: result(1000, 120),
        },
        {few: result(1, 1), many: result(1, 1)},
    ]
    return speed._tabulate(contenders, rounds, "cubic", section(2))


def test_speed_is_compared_in_the_same_round() -> None:
    rows = {row["through"]: row for row in speed_tables()[0].rows}
    assert [row["to_haproxy"] for row in rows.values()] == [1, 0.5, 0.25, 0.125]
    assert rows["1000 stripes, 1 worker"]["to_few"] == 0.75
    assert rows["10 stripes, 1 worker"]["to_few"] is None


def test_round_trips_are_compared_in_the_same_round() -> None:
    rows = speed_tables()[1].rows
    assert [(row["through"], row["idle_to_haproxy"]) for row in rows] == [
        (speed.HAPROXY, 1),
        ("10 stripes, 1 worker", 1.5),
        ("1000 stripes, 1 worker", 1),
        ("1 stripe, 2 workers", 1.2),
    ]
    assert rows[0]["loaded_p50_us"] == 200


def datagram_result(mbit_s: float, loss: float | None) -> datagrams.Result:
    return datagrams.Result(mbit_s * 1e6, loss, 100, 2.0, 0.0)


def test_datagrams_are_compared_to_the_bare_way_of_the_same_round() -> None:
    contenders = [each for each in datagrams.contenders() if each.row.split("-")[-1] in ("direct", "2", "kcptun")]
    bare, udp, tcp, kcptun = (each.name for each in contenders)
    rounds = [
        {bare: datagram_result(2000, 0.0), udp: datagram_result(1500, 0.02), kcptun: datagram_result(500, None)},
        {udp: datagram_result(500, 0.01)},
    ]
    rows = {row["through"]: row for row in datagrams._tabulate(contenders, rounds, section(2)).rows}
    assert [row["ratio"] for row in rows.values()] == [1, 0.75, None, 1]
    assert (rows[udp]["mbit_s"], rows[udp]["loss_percent"]) == (1000, 1.5)
    assert (rows[bare]["cpu_s_per_gb"], rows[kcptun]["loss_percent"]) == (None, None)
    assert "mbit_s" in rows[tcp] and rows[tcp]["mbit_s"] is None


def test_way_of_datagrams_without_its_program_is_left_out() -> None:
    contender = datagrams.Contender("a", "a", datagrams.direct, programs=("no-such-program",))
    part = section(rounds=0)
    assert datagrams.table([contender], part).rows == []
    assert part.left_out == ["Left out: a: no no-such-program here."]


def table(left_out: list[str], others_cores: float) -> Table:
    columns = [Column("name", "name"), Column("value", "value", 1)]
    rows: list[Row] = [{"name": "a", "value": 1.25}, {"name": "b"}]
    return Table("short", "Title", "Conditions.", columns, rows, left_out, others_cores)


def test_markdown_has_every_cell_and_note(tmp_path: Path) -> None:
    write_markdown(tmp_path / "a.md", "a machine", [table(["Left out: c."], 2 * BUSY_CORES)])
    lines = (tmp_path / "a.md").read_text().splitlines()
    assert lines[0] == "Measured on a machine." and lines[2] == "## Title"
    assert lines[6:10] == ["| name | value |", "| --- | ---: |", "| a | 1.2 |", "| b |  |"]
    assert "Left out: c." in lines and any("0.6 cores" in line for line in lines)
    assert table([], BUSY_CORES).notes == []


def test_figures_are_read_back_on_the_same_machine_only(tmp_path: Path) -> None:
    tables = [table(["Left out: c."], 0.5), *speed_tables()]
    write_json(tmp_path / "a.json", "a machine", tables)
    assert read_json(tmp_path / "a.json", "a machine") == tables
    with pytest.raises(BenchError, match="another machine"):
        read_json(tmp_path / "a.json", "another")
    (tmp_path / "a.json").write_text('{"machine": "a machine", "tables": [{}]}')
    with pytest.raises(BenchError, match=r"a\.json"):
        read_json(tmp_path / "a.json", "a machine")


def test_readme_changes_between_the_markers_only(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.fill(file, "a machine", [table([], 0.0)], plot=True)
    text = file.read_text()
    assert text.startswith(f"before\n{readme.BEGIN}\n") and text.endswith(f"{readme.END}\nafter\n")
    assert "old" not in text and "### Title" in text and "a machine" in text and f"]({readme.PLOT})" in text
    readme.fill(file, "a machine", [table([], 0.0)], plot=True)
    assert file.read_text() == text
    file.write_text(f"{readme.END}{readme.BEGIN}")
    with pytest.raises(BenchError, match=r"README\.md"):
        readme.fill(file, "a machine", [], plot=False)


def test_readme_of_the_project_has_the_markers() -> None:
    text = readme.README.read_text()
    assert 0 < text.index(readme.BEGIN) < text.index(readme.END)


def test_plot_shows_every_row_and_is_the_same_again(tmp_path: Path) -> None:
    if not plot.AVAILABLE:
        pytest.skip("no matplotlib here")
    rounds: list[limited.Round] = [{(10, 0): flow(100), (10, 1): flow(90), (None, 2): flow(80, 9)}]
    lossy: list[loss.Round] = [{("bbr", 1, 0): flow(2), ("bbr", 10, 1): flow(20)}]
    tables = [limited._tabulate([10, None], rounds, section()), loss._tabulate(["bbr"], lossy, section())]
    for name in ("a.svg", "b.svg"):
        assert plot.draw([*tables, *speed_tables()], tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for label in ("iperf3 -P", "auto", "bbr, one connection", "1000 stripes, 1 worker", speed.HAPROXY, "8.0"):
        assert label in text
    assert len(text) < 100_000 and "<dc:date>" not in text


def test_plot_of_nothing_is_not_written(tmp_path: Path) -> None:
    if not plot.AVAILABLE:
        pytest.skip("no matplotlib here")
    assert not plot.draw([table([], 0.0)], tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


def test_machine_is_told_without_its_name() -> None:
    name = Path("/proc/sys/kernel/hostname").read_text().strip()
    assert "Python 3." in machine() and "gevent " in machine() and "core" in machine()
    assert "/" not in machine() and (not name or name not in machine().split())


@pytest.fixture
def service() -> Iterator[int]:
    """The port of `ends serve` on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    with subprocess.Popen([*ENDS, "serve", str(port)]) as process:
        try:
            deadline = time.monotonic() + 10
            while not _accepts(port) and time.monotonic() < deadline:
                assert process.poll() is None
            yield port
        finally:
            process.kill()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_ends_ask_beside_what_another_sends(service: int) -> None:
    target = ["127.0.0.1", str(service)]
    with subprocess.Popen([*ENDS, "send", *target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdin is not None and sender.stdout is not None
        sender.stdin.write("connect\n")
        sender.stdin.flush()
        assert sender.stdout.readline() == "connected\n"
        sender.stdin.write("go\n")
        sender.stdin.flush()
        asked = subprocess.run(
            [*ENDS, "ask", *target, "0.1"],
            input="connect\ngo\n",
            timeout=20,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        sender.terminate()
        assert json.loads(sender.communicate(timeout=20)[0])["bytes"] > 1_000_000
    connected, figures = asked.stdout.splitlines()
    trip = json.loads(figures)
    assert connected == "connected" and 0 < trip["p50_us"] <= trip["p99_us"]


@pytest.fixture
def port() -> int:
    """One of UDP that is free."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_datagram_end(*words: object) -> dict[str, float]:
    argv = [*DATAGRAM_ENDS, *map(str, words)]
    found: dict[str, float] = json.loads(subprocess.run(argv, timeout=20, check=True, stdout=subprocess.PIPE).stdout)
    return found


def test_datagrams_are_counted_at_both_ends(port: int) -> None:
    argv = [*DATAGRAM_ENDS, "take", str(port)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as taker:
        assert taker.stdout is not None and taker.stdout.readline() == "ready\n"
        sent = run_datagram_end("send", "127.0.0.1", port, 0.3, 20e6)["datagrams"]
        came = json.loads(taker.communicate(timeout=20)[0])
    assert came["datagrams"] == sent and 0.1 < came["seconds"] < 5
    assert 100 < sent <= 20e6 * 0.3 / 8 / 1300 + 64


def test_datagrams_are_asked_and_answered(port: int) -> None:
    with subprocess.Popen([*DATAGRAM_ENDS, "echo", str(port)]) as server:
        try:
            deadline = time.monotonic() + 10
            while f":{port:04X} " not in Path("/proc/net/udp").read_text() and time.monotonic() < deadline:
                assert server.poll() is None
            trip = run_datagram_end("ask", "127.0.0.1", port, 0.1)
        finally:
            server.kill()
    assert 0 < trip["p50_us"] <= trip["p99_us"] and trip["lost"] == 0


def test_warm_up_and_last_second_do_not_count() -> None:
    seconds = [{"sum": {"bytes": 1000 * n, "seconds": 1.0}} for n in (1, 5, 7, 2)]
    assert _received({"intervals": seconds}, 1, 2) == (8 * 6000, 15000)
    with pytest.raises(BenchError, match="4 s"):
        _received({"intervals": seconds}, 2, 3)
    with pytest.raises(BenchError, match="refused"):
        _received({"error": "refused", "intervals": []}, 1, 2)


def test_meter_counts_children_that_have_ended() -> None:
    child = "sum(range(20_000_000))"
    parent = f"""
import subprocess, sys
sys.stdin.readline()
subprocess.run([sys.executable, "-c", {child!r}])
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        meter = Meter([process.pid])
        with meter.running():
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
        process.communicate()
    assert meter.cpu_s > 0.03


def test_congestion_control_is_one_that_the_kernel_has() -> None:
    assert ways.best_congestion() in ways.congestions()
