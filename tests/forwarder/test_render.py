"""`status` for people."""

import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from forwarder.render import FEW_CARRIERS, NOTICED_MAX, Paper, print_status

ROOT = Path(__file__).parents[2]

CARRIER: dict[str, Any] = {
    "id": 1,
    "worker": 0,
    "kind": "stripe",
    "local": "10.0.0.1:40000",
    "peer": "[2001:db8::1]:9000",
    "state": "up",
    "rtt_ms": 12.34,
    "loss": 0.01,
    "rate_bps": 1e7,
    "in_flight_bytes": 1000,
    "age_s": 3.0,
    "bytes_in": 1,
    "bytes_out": 2,
}
ANSWER: dict[str, Any] = {
    "role": "client",
    "version": "0.1.0",
    "pid": 4242,
    "uptime_s": 3725.5,
    "workers": [
        {
            "id": 0,
            "serial": 7,
            "pid": 4243,
            "state": "up",
            "streams": 3,
            "conversations": 0,
            "carriers": 2,
            "restarts": 5,
            "arena_used_bytes": 1 << 20,
            "arena_bytes": 64 << 20,
        }
    ],
    "tunnels": [
        {
            "name": "web",
            "mode": "stripe",
            "state": "degraded",
            "bytes_in": 1500,
            "bytes_out": 0,
            "flows_open": 3,
            "flows_total": 17,
            "flows_reset": 1,
            "sessions": [
                {
                    "id": "0123456789abcdef",
                    "key_id": "laptop",
                    "peer": "[2001:db8::1]:9000",
                    "carriers_up": 2,
                    "carriers_wanted": 10,
                    "reinjected_bytes": 5 << 30,
                    "duplicate_bytes": 0,
                    "resumes": 4,
                    "carriers": [
                        CARRIER,
                        CARRIER | {"id": 2, "rtt_ms": 50.0, "bytes_out": 1_000_000},
                        CARRIER | {"id": 3, "rtt_ms": 999.0, "state": "down"},
                    ],
                }
            ],
        }
    ],
}


SPRAY_TUNNEL: dict[str, Any] = ANSWER["tunnels"][0] | {
    "name": "kcp",
    "mode": "spray",
    "sessions": [
        ANSWER["tunnels"][0]["sessions"][0]
        | {
            "carriers_up": 3,
            "carriers": [
                CARRIER | {"kind": "tcp"},
                CARRIER | {"kind": "tcp"},
                CARRIER | {"kind": "udp"},
                CARRIER | {"kind": "udp", "state": "down"},
            ],
        }
    ],
}
SPRAY_WORKER = ANSWER["workers"][0] | {"conversations": 7, "streams": 0}


def rendered(
    answer: dict[str, Any], width: int = 120, *, terminal: bool = False, every: bool = False, folds: bool = True
) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width if folds else 10_000,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        markup=False,
        highlight=False,
    )
    print_status(answer, Paper(console, width, folds), every)
    return stream.getvalue()


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def with_carriers(*carriers: dict[str, Any], sessions: int = 1) -> dict[str, Any]:
    """The answer of an instance that has these carriers in each of its sessions."""
    session = ANSWER["tunnels"][0]["sessions"][0] | {"carriers": list(carriers), "carriers_up": len(carriers)}
    several = [session | {"id": f"{number:016x}", "key_id": f"client{number}"} for number in range(sessions)]
    return ANSWER | {"tunnels": [ANSWER["tunnels"][0] | {"sessions": several}]}


def test_status_shows_instance_tunnels_sessions_carriers_and_workers() -> None:
    text = rendered(ANSWER)
    assert text.startswith("forwarder 0.1.0 client, pid 4242, up 1 h 2 min\n")
    assert "web stripe degraded 1 3 17 1 1.50 kB 0 B" in rows(text)
    assert "web laptop [2001:db8::1]:9000 2/10 12.3 ms 50.0 ms 1.0 % 10.0 Mbit/s 5.37 GB 0 B 4" in rows(text)
    assert "stripe 1 web up 12.3 ms 1.0 % - 3 s 1 B 2 B [2001:db8::1]:9000" in rows(text)
    assert "stripe 2 web up 50.0 ms 1.0 % 10.0 Mbit/s 3 s 1 B 1.00 MB [2001:db8::1]:9000" in rows(text)
    assert "stripe 3 web down - - - 3 s 1 B 2 B [2001:db8::1]:9000" in rows(text)
    assert "0 up 4243 3 2 5 1.00 MiB of 64.0 MiB" in rows(text)


def test_spray_tunnel_shows_ports_and_conversations() -> None:
    text = rendered(ANSWER | {"tunnels": [SPRAY_TUNNEL], "workers": [SPRAY_WORKER]}, 200)
    assert "kcp spray degraded 1 3 17 1 1.50 kB 0 B" in rows(text)
    assert "kcp laptop [2001:db8::1]:9000 3/10 12.3 ms 12.3 ms 1.0 % - 5.37 GB 0 B 4 2 tcp, 1 udp" in rows(text)
    assert "0 up 4243 7 2 5 1.00 MiB of 64.0 MiB" in rows(text)
    assert "conversations" in text and "streams" not in text


def test_both_modes_show_both_kinds_of_flows() -> None:
    worker = ANSWER["workers"][0] | {"conversations": 7}
    answer = ANSWER | {"tunnels": [ANSWER["tunnels"][0], SPRAY_TUNNEL], "workers": [worker]}
    assert "0 up 4243 3 7 2 5 1.00 MiB of 64.0 MiB" in rows(rendered(answer))
    for width in (40, 50, 60, 70, 80, 90, 100):
        assert max(map(len, rendered(answer, width).splitlines())) <= width


def test_status_without_sessions_has_no_table_of_them() -> None:
    tunnel = ANSWER["tunnels"][0] | {"sessions": []}
    text = rendered(ANSWER | {"tunnels": [tunnel]}, 80)
    assert "tunnel" in text and "session" not in text and "loss" not in text


def test_session_without_a_carrier_has_no_figures_of_them() -> None:
    text = rendered(with_carriers())
    assert "web client0 [2001:db8::1]:9000 0/10 - - - - 5.37 GB 0 B 4" in rows(text)
    assert "rtt p50" in text and "age" not in text


def test_few_carriers_are_listed_and_many_when_asked_for() -> None:
    few = [CARRIER | {"id": number} for number in range(FEW_CARRIERS)]
    assert f"stripe {FEW_CARRIERS - 1} " in rendered(with_carriers(*few))
    many = [CARRIER | {"id": number, "loss": 0.0} for number in range(300)]
    summary = rendered(with_carriers(*many), 80)
    assert "300 carriers, none stands out; --carriers lists all" in rows(summary)
    assert len(summary.splitlines()) < 24 and "stripe 1" not in summary
    assert "stripe 299 " in rendered(with_carriers(*many), 80, every=True)


def test_of_many_carriers_the_worst_are_shown() -> None:
    many = [CARRIER | {"id": number, "loss": 0.0} for number in range(100)]
    many[7] |= {"loss": 0.02}
    many[8] |= {"loss": 0.3}
    many[9] |= {"rtt_ms": 99.0}
    many[10] |= {"state": "down"}
    text = rendered(with_carriers(*many))
    shown = [line.split()[1] for line in text.splitlines() if line.startswith("stripe ")]
    assert shown == ["10", "8", "7", "9"]
    assert "100 carriers, 4 stand out by loss, round trip or state; --carriers lists all" in rows(text)


def test_fifty_sessions_are_a_line_each_and_the_worst_carriers_stay_few() -> None:
    lossy = [CARRIER | {"id": number, "loss": 0.5} for number in range(20)]
    text = rendered(with_carriers(*lossy, sessions=50), 80)
    assert sum(line.startswith("web") and "client" in line for line in text.splitlines()) == 50
    assert sum(line.startswith("stripe ") for line in text.splitlines()) == NOTICED_MAX
    assert "1000 carriers, 1000 stand out" in text


@pytest.mark.parametrize("width", [40, 50, 60, 70, 80, 90, 200])
def test_status_fits_the_width_and_cuts_no_value(width: int) -> None:
    text = rendered(ANSWER, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert all(word in text.split() for word in ("web", "degraded", "4243", "2/10"))
    spray = rendered(ANSWER | {"tunnels": [SPRAY_TUNNEL], "workers": [SPRAY_WORKER]}, width)
    assert max(map(len, spray.splitlines())) <= width
    assert all(word in spray.split() for word in ("kcp", "degraded", "4243", "3/10", "conversations"))


def test_wide_values_fit_too() -> None:
    tunnel = ANSWER["tunnels"][0] | {"name": "a-name-of-40-characters-" + "x" * 16, "state": "connecting"}
    tunnel |= {"bytes_in": 10**15 - 1, "bytes_out": 999 * 10**12, "flows_total": 123456}
    for width in (46, 60, 70, 80):
        text = rendered(ANSWER | {"tunnels": [tunnel]}, width)
        assert max(map(len, text.splitlines())) <= width
        assert "1.00 PB" in text and "999 TB" in text and "connecting" in text


def test_rows_stay_whole_where_nothing_is_folded() -> None:
    name = "a-name-of-40-characters-" + "x" * 16
    tunnel = ANSWER["tunnels"][0] | {"name": name}
    lines = rows(rendered(ANSWER | {"tunnels": [tunnel]}, 80, folds=False))
    assert f"{name} stripe degraded 3 17 1 1.50 kB 0 B" in lines
    assert any(line.startswith(f"{name} laptop [2001:db8::1]:9000 2/10") for line in lines)


def test_columns_for_wide_terminals_go_before_a_usual_name_is_folded() -> None:
    peer = "[2001:db8:24::d81f]:55731"
    tunnel = ANSWER["tunnels"][0]
    session = tunnel["sessions"][0] | {"peer": peer, "key_id": "branch-44", "carriers_up": 10}
    text = rendered(ANSWER | {"tunnels": [tunnel | {"sessions": [session]}]}, 80)
    assert f"web branch-44 {peer} 10/10 12.3 ms 1.0 %" in rows(text)
    assert "p95" not in text


def test_colours_are_for_terminals_only() -> None:
    assert "\x1b" not in rendered(ANSWER)
    assert "\x1b" in rendered(ANSWER, terminal=True)


PRINT = "import json, sys; from forwarder.render import print_status; print_status(json.loads(sys.argv[1]))"


@pytest.mark.parametrize(("columns", "widest"), [("60", 60), (None, 100)])
def test_through_a_pipe_columns_are_of_the_near_terminal(columns: str | None, widest: int) -> None:
    """COLUMNS, which `watch` sets, goes before the terminal that is still there as standard error, as with a pager."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    termios_size(slave, 100)
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    env |= {"TERM": "xterm"} | ({"COLUMNS": columns} if columns else {})
    try:
        done = subprocess.run(
            [sys.executable, "-c", PRINT, json.dumps(ANSWER)],
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=slave,
            env=env,
            cwd=ROOT,
            timeout=60,
            check=True,
            text=True,
        )
    finally:
        os.close(slave)
        os.close(master)
    assert "\x1b" not in done.stdout
    assert 50 < max(map(len, done.stdout.splitlines())) <= widest


def termios_size(terminal: int, columns: int) -> None:
    """Tell a terminal how wide it is."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def test_key_of_a_later_version_is_ignored() -> None:
    assert rendered(ANSWER | {"novelty": 1}) == rendered(ANSWER)


def test_answer_without_what_it_needs_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        rendered({"role": "client"})
