"""Workers' reports become one status."""

from typing import Literal

import msgspec
import pytest

from forwarder.status import merge_tunnels, read_report
from tests.forwarder.test_mesh import memory
from workers.settings import Address, Settings, SprayClientTunnel, StripeClientTunnel, StripeServerTunnel
from workers.status import CarrierStatus, SessionStatus, TunnelStatus, WorkerReport, WorkerStatus


def settings(role: Literal["client", "server"]) -> Settings:
    here, there = Address("127.0.0.1", 1), Address("server", 2)
    if role == "client":
        tunnels = tuple(
            StripeClientTunnel(name=name, index=index, local=here, remote_end=there)
            for name, index in (("web", 1), ("ssh", 0))
        )
        return Settings(role=role, workers=2, keys=(), client_tunnels=tunnels)
    tunnel = StripeServerTunnel(name="web", index=0, listen=here, target=there)
    return Settings(role=role, workers=2, keys=(), server_tunnels=(tunnel,))


def session(id_: str, up: int, wanted: int, worker: int = 0) -> SessionStatus:
    carriers = [
        CarrierStatus(number, worker, "stripe", "", "", "up", 1.0, 0.0, 1.0, 0, 1.0, 10, 20) for number in range(up)
    ]
    return SessionStatus(id_, "laptop", "198.51.100.1:5", up, wanted, 1, 2, 3, carriers)


def report(worker: int, *sessions: SessionStatus) -> WorkerReport:
    tunnel = TunnelStatus("web", "stripe", "up", 100, 200, 1, 10, 5, list(sessions))
    return WorkerReport(WorkerStatus(worker, 1, 1, "up", 0, 0, 0, 0, 0, 0), [tunnel], {})


def test_shares_of_a_session_become_one() -> None:
    reports = [report(0, session("a", 2, 5)), report(1, session("b", 1, 5, 1), session("a", 3, 5, 1))]
    (web,) = merge_tunnels(settings("server"), reports, "up")
    assert (web["bytes_in"], web["bytes_out"], web["flows_open"], web["flows_total"]) == (200, 400, 2, 20)
    assert web["flows_reset"] == 10
    first, second = web["sessions"]
    assert (first["id"], first["carriers_up"], first["carriers_wanted"], first["resumes"]) == ("a", 5, 5, 6)
    assert (first["reinjected_bytes"], first["duplicate_bytes"]) == (2, 4)
    assert [carrier["worker"] for carrier in first["carriers"]] == [0, 0, 1, 1, 1]
    assert (second["id"], second["carriers_up"]) == ("b", 1)


def test_every_configured_tunnel_is_there_in_the_order_of_the_file() -> None:
    tunnels = merge_tunnels(settings("client"), [report(0)], "up")
    assert [(tunnel["name"], tunnel["mode"], tunnel["flows_total"]) for tunnel in tunnels] == [
        ("ssh", "stripe", 0),
        ("web", "stripe", 10),
    ]


def test_tunnels_have_their_modes() -> None:
    spray = SprayClientTunnel(name="kcp", index=2, ports=(80,), local=Address("127.0.0.1", 1), hosts=("server",))
    both = msgspec.structs.replace(settings("client"), spray_client_tunnels=(spray,))
    share = TunnelStatus("kcp", "spray", "up", 100, 200, 1, 10, 0, [session("a", 1, 1)])
    reports = [WorkerReport(WorkerStatus(0, 1, 1, "up", 0, 1, 1, 0, 0, 0), [share], {})]
    tunnels = merge_tunnels(both, reports, "up")
    assert [(tunnel["name"], tunnel["mode"]) for tunnel in tunnels] == [
        ("ssh", "stripe"),
        ("web", "stripe"),
        ("kcp", "spray"),
    ]
    assert (tunnels[2]["state"], tunnels[2]["flows_open"], tunnels[2]["flows_total"]) == ("up", 1, 10)


@pytest.mark.parametrize(
    ("role", "phase", "up", "state"),
    [
        ("client", "up", 0, "connecting"),
        ("client", "up", 4, "degraded"),
        ("client", "up", 5, "up"),
        ("client", "draining", 5, "draining"),
        ("client", "starting", 0, "starting"),
        ("server", "up", 0, "up"),
        ("server", "draining", 5, "draining"),
    ],
)
def test_state_of_a_tunnel(role: Literal["client", "server"], phase: str, up: int, state: str) -> None:
    tunnels = merge_tunnels(settings(role), [report(0, session("a", up, 5)), report(1, session("a", 0, 5))], phase)
    assert tunnels[-1]["state"] == state


def test_without_any_worker_a_tunnel_is_down() -> None:
    assert merge_tunnels(settings("server"), [], "up")[0]["state"] == "down"


def test_report_is_read_from_its_start_whatever_its_position() -> None:
    written = report(1, session("a", 1, 5))
    with memory(msgspec.json.encode(written)) as fd:
        assert read_report(fd) == written


@pytest.mark.parametrize("content", [b"", b"{}", b'{"worker":', b"\xff"])
def test_report_that_is_none_is_refused(content: bytes) -> None:
    with memory(content) as fd, pytest.raises(ValueError):
        read_report(fd)
