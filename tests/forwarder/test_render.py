"""`status` for people."""

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from forwarder.render import amount, duration, print_status

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
                        CARRIER | {"id": 2, "rtt_ms": 50.0},
                        CARRIER | {"rtt_ms": 999.0, "state": "down"},
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


def rendered(answer: dict[str, Any], width: int = 120, terminal: bool = False) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=terminal, color_system="standard" if terminal else None, markup=False
    )
    print_status(answer, console)
    return stream.getvalue()


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_status_shows_instance_tunnels_sessions_and_workers() -> None:
    text = rendered(ANSWER)
    assert text.startswith("forwarder 0.1.0 client, pid 4242, up 1 h 2 min\n")
    assert "web stripe degraded 3 17 1 1.46 KiB 0 B" in rows(text)
    assert "web laptop [2001:db8::1]:9000 2/10 12.3-50 ms 5 GiB 0 B 4" in rows(text)
    assert "0 up 4243 3 2 5 1 MiB of 64 MiB" in rows(text)


def test_spray_tunnel_shows_ports_and_conversations() -> None:
    text = rendered(ANSWER | {"tunnels": [SPRAY_TUNNEL], "workers": [SPRAY_WORKER]})
    assert "kcp spray degraded 3 17 1 1.46 KiB 0 B" in rows(text)
    assert "kcp laptop [2001:db8::1]:9000 3/10 12.3 ms 5 GiB 0 B 4 2 tcp, 1 udp" in rows(text)
    assert "0 up 4243 7 2 5 1 MiB of 64 MiB" in rows(text)
    assert "conversations" in text and "streams" not in text


def test_both_modes_show_both_kinds_of_flows() -> None:
    worker = ANSWER["workers"][0] | {"conversations": 7}
    answer = ANSWER | {"tunnels": [ANSWER["tunnels"][0], SPRAY_TUNNEL], "workers": [worker]}
    text = rendered(answer)
    assert "0 up 4243 3 7 2 5 1 MiB of 64 MiB" in rows(text)
    assert "web laptop [2001:db8::1]:9000 2/10 12.3-50 ms 5 GiB 0 B 4 -" in rows(text)
    for width in (40, 50, 60, 70, 80, 90, 100):
        assert max(map(len, rendered(answer, width).splitlines())) <= width


def test_status_without_sessions_has_no_table_of_them() -> None:
    tunnel = ANSWER["tunnels"][0] | {"sessions": []}
    text = rendered(ANSWER | {"tunnels": [tunnel]})
    assert "tunnel" in text and "session" not in text


def test_session_without_a_carrier_has_no_round_trip_time() -> None:
    session = ANSWER["tunnels"][0]["sessions"][0] | {"carriers": []}
    text = rendered(ANSWER | {"tunnels": [ANSWER["tunnels"][0] | {"sessions": [session]}]})
    assert "web laptop [2001:db8::1]:9000 2/10 - 5 GiB 0 B 4" in rows(text)


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
    tunnel |= {"bytes_in": 1023 << 30, "bytes_out": 1023 << 30, "flows_total": 123456}
    for width in (46, 60, 70, 80):
        text = rendered(ANSWER | {"tunnels": [tunnel]}, width)
        assert max(map(len, text.splitlines())) <= width
        assert text.count("1023 GiB") == 2 and "connecting" in text


def test_colours_are_for_terminals_only() -> None:
    assert "\x1b" not in rendered(ANSWER)
    assert "\x1b" in rendered(ANSWER, terminal=True)


def test_key_of_a_later_version_is_ignored() -> None:
    assert rendered(ANSWER | {"novelty": 1}) == rendered(ANSWER)


def test_answer_without_what_it_needs_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        rendered({"role": "client"})


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1023 * 1024, "1023 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        (10 << 30, "10 GiB"),
        (3 << 60, "3072 PiB"),
    ],
)
def test_amount_has_three_figures(count_bytes: int, text: str) -> None:
    assert amount(count_bytes) == text


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3600, "1 h 0 min"),
        (90061, "1 d 1 h"),
        (86400 * 400, "400 d 0 h"),
    ],
)
def test_duration_has_two_units(time_s: float, text: str) -> None:
    assert duration(time_s) == text
