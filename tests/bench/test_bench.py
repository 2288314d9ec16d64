"""How figures become a table. Measurements themselves are made by tests/system/test_throughput.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import limited, speed, ways
from tests.bench.measure import BUSY_CORES, BenchError, Echo, Flow, Meter, _received
from tests.bench.table import Column, Table, number, write


def flow(mbit_s: float) -> Flow:
    return Flow(mbit_s * 1e6, 1.0, 0, 0.0)


def test_ratio_is_the_median_of_ratios_within_a_round() -> None:
    rounds = [
        {(10, 0): flow(100), (10, 1): flow(90)},
        {(10, 0): flow(10), (10, 1): flow(8)},
        {(10, 0): flow(100)},
        {(10, 0): flow(50), (10, 1): flow(50)},
    ]
    (row,) = limited._tabulate([10], rounds, 20, [], 0.0).rows
    assert (row["stripes"], row["iperf3"], row["speed_1"], row["ratio_1"]) == (10, 75, 50, 0.9)
    assert "speed_2" not in row


def test_speed_is_compared_in_the_same_round() -> None:
    contenders = [each for each in speed.contenders("cubic") if each.row in ("haproxy", "10x1", "1000x1")]
    few, many = contenders[1].name, contenders[2].name
    echo = Echo(100.0, 200.0)
    rounds = [
        {speed.HAPROXY: (flow(8000), echo), few: (flow(4000), echo), many: (flow(2000), echo)},
        {few: (flow(1), echo), many: (flow(1), echo)},
    ]
    rows = speed._rows(contenders, rounds)
    assert [row["to_haproxy"] for row in rows] == [1, 0.5, 0.25]
    assert [row["to_few"] for row in rows] == [None, None, 0.75]


def table(left_out: list[str], others_cores: float) -> Table:
    columns = [Column("name", "name"), Column("value", "value", number(1))]
    return Table(
        "short", "Title", "Conditions.", columns, [{"name": "a", "value": 1.25}, {"name": "b"}], left_out, others_cores
    )


def test_markdown_has_every_cell_and_note() -> None:
    lines = table(["Left out: c."], 2 * BUSY_CORES).markdown().splitlines()
    assert lines[4:8] == ["| name | value |", "| --- | ---: |", "| a | 1.2 |", "| b |  |"]
    assert "Left out: c." in lines and any("0.6 cores" in line for line in lines)
    assert table([], BUSY_CORES).notes == []


def test_files_are_written_when_asked_for(tmp_path: Path) -> None:
    write([table([], 0.0)], markdown=tmp_path / "a.md", as_json=tmp_path / "a.json")
    assert (tmp_path / "a.md").read_text().startswith("## Title\n")
    assert '"value": 1.25' in (tmp_path / "a.json").read_text()


def test_warm_up_and_last_second_do_not_count() -> None:
    seconds = [{"sum": {"bytes": 1000 * n, "seconds": 1.0}} for n in (1, 5, 7, 2)]
    assert _received({"intervals": seconds}, 1, 2) == (8 * 6000, 15000)
    with pytest.raises(BenchError, match="4 s"):
        _received({"intervals": seconds}, 2, 3)
    with pytest.raises(BenchError, match="refused"):
        _received({"error": "refused", "intervals": []}, 1, 2)


def test_meter_counts_children_that_have_ended() -> None:
    child = "sum(range(5_000_000))"
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
    assert ways.best_congestion() in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
