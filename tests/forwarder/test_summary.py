"""What many carriers come to."""

from typing import Any

import pytest

from forwarder.errors import WrongUsage
from forwarder.summary import Summary, keep_tunnel, measured_bps, noticeable, summarise
from workers.status import CarrierStatus, SessionStatus


def carrier(number: int, **values: Any) -> CarrierStatus:
    defaults: dict[str, Any] = {"state": "up", "rtt_ms": 10.0, "loss": 0.0, "rate_bps": 1e6, "bytes_out": 1_000_000}
    values = defaults | values
    return CarrierStatus(
        id=number, worker=0, kind="tcp", local="", peer="", in_flight_bytes=0, age_s=1.0, bytes_in=0, **values
    )


def session(*carriers: CarrierStatus) -> SessionStatus:
    return SessionStatus("a", "laptop", "", len(carriers), len(carriers), 0, 0, 0, list(carriers))


def test_summary_is_of_the_carriers_that_are_up() -> None:
    carriers = [carrier(number, rtt_ms=float(number), loss=number / 1000) for number in range(1, 101)]
    carriers[99].state = "degraded"
    down = carrier(0, state="connecting", rtt_ms=1e9, loss=1.0)
    assert summarise([down, *reversed(carriers)]) == Summary(50.0, 95.0, pytest.approx(0.0505), 100e6)
    assert summarise([carrier(1)]) == Summary(10.0, 10.0, 0.0, 1e6)
    assert summarise([down]) == summarise([]) == Summary(None, None, None, None)


def test_rate_needs_something_that_was_sent() -> None:
    assert measured_bps(carrier(1)) == 1e6
    assert measured_bps(carrier(1, bytes_out=99_999)) is None
    assert measured_bps(carrier(1, rate_bps=0.0)) is None
    assert summarise([carrier(1), carrier(2, bytes_out=0)]).measured_bps == 1e6
    assert summarise([carrier(1, bytes_out=0)]).measured_bps is None


def test_noticeable_carriers_come_worst_first() -> None:
    good = [carrier(number) for number in range(10)]
    bad = [
        carrier(20, loss=0.01),
        carrier(21, rtt_ms=31.0),
        carrier(22, state="connecting"),
        carrier(23, loss=0.2),
        carrier(24, rtt_ms=29.0),  # more than usual, but not by much
    ]
    assert [each.id for each in noticeable(session(*good, *bad))] == [22, 23, 20, 21]
    assert noticeable(session(*good)) == noticeable(session()) == []


def test_tunnel_that_is_not_there_is_wrong_usage() -> None:
    answer = {"role": "client", "tunnels": [{"name": "web"}, {"name": "ssh"}]}
    assert keep_tunnel(answer, "ssh") == {"role": "client", "tunnels": [{"name": "ssh"}]}
    with pytest.raises(WrongUsage, match="expected one of web, ssh, found kcp"):
        keep_tunnel(answer, "kcp")
