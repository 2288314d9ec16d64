from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from tests.io.spray_world import World, received
from workers.io.session import Session
from workers.io.tally import add_session
from workers.shm.totals import CarrierTotals, TunnelTotals

Make = Callable[..., World]


def stripe(rtt_us: int, loss: float, unacked_bytes: int) -> Any:
    return SimpleNamespace(info=SimpleNamespace(rtt_us=rtt_us, loss=loss, unacked_bytes=unacked_bytes))


def session(stripes: list[Any], streams: int) -> Session:
    share = SimpleNamespace(
        bytes_in=10,
        bytes_out=20,
        total_streams=7,
        refused_streams=2,
        reset_streams=1,
        streams=dict.fromkeys(range(streams)),
        reinjected_bytes=3,
        duplicate_bytes=4,
    )
    made = SimpleNamespace(
        share=share,
        liveness=SimpleNamespace(resumes=5),
        joined_stripes=9,
        lost_stripes=6,
        stripes=dict(enumerate(stripes)),
    )
    return cast(Session, made)


def test_session_over_stripes_adds_what_it_has_counted_and_what_is_there() -> None:
    totals = TunnelTotals("web", "stripe")
    unmeasured = SimpleNamespace(info=None)
    add_session(totals, session([stripe(3000, 0.1, 100), stripe(1000, 0.0, 50), unmeasured], 3))
    assert totals == TunnelTotals(
        "web",
        "stripe",
        bytes_in=10,
        bytes_out=20,
        flows_total=9,
        flows_reset=3,
        flows_refused=2,
        reinjected_bytes=3,
        duplicate_bytes=4,
        resumes=5,
        sessions=1,
        flows_open=3,
        carriers=[CarrierTotals("stripe", 9, 0, 6, 3, 0, 150, 2, 4000, 1000, 3000, 0.1, 0.1)],
    )
    add_session(totals, session([], 0))
    past = totals.past()
    assert (past.bytes_in, past.flows_total, past.sessions, past.flows_open) == (20, 18, 0, 0)
    assert past.carriers == [CarrierTotals("stripe", 18, 0, 12)]


def test_ends_of_a_spray_tunnel_say_the_same(make: Make) -> None:
    world = make(ports=4)
    for _ in range(3):
        world.app.send(b"question")
        world.settle()
    _, source = world.target.recvfrom(100)
    world.target.sendto(b"answer", source)
    world.settle()
    assert received(world.app) == [b"answer"]
    client, server = world.client.totals(), world.server.totals()
    assert (client.bytes_out, client.bytes_in) == (server.bytes_in, server.bytes_out) == (24, 6)
    assert (client.flows_open, client.flows_total, client.sessions) == (1, 1, 1)
    assert (server.flows_open, server.flows_total, server.sessions) == (1, 1, 1)
    for end in (client, server):
        (ports,) = end.carriers
        assert (ports.dialled, ports.failed, ports.lost, ports.up) == (4, 0, 0, 4)
        assert not sum(end.dropped.values())
    assert (client.carriers[0].wanted, server.carriers[0].wanted) == (4, 0)


def test_lost_ports_and_ended_sessions_stay_counted(make: Make) -> None:
    world = make(ports=4)
    world.app.send(b"question")
    world.settle()
    carrier = next(iter(world.server_carriers().values()))
    carrier.refused_bytes += 77
    session = next(world.server.sessions())
    session.remove(carrier, world.now_us)
    before = world.server.totals()
    assert (before.carriers[0].lost, before.carriers[0].up, before.unopened_bytes) == (1, 3, 77)
    world.server.close()
    after = world.server.totals()
    assert (after.bytes_in, after.unopened_bytes, after.flows_total) == (8, 77, 1)
    assert (after.sessions, after.carriers[0].up, after.carriers[0].lost) == (0, 0, 4)


def test_datagrams_that_nobody_takes_are_counted_by_reason(make_unmet: Make) -> None:
    world = make_unmet(ports=4)
    world.app.send(b"too early")
    world.settle()
    assert world.client.totals().dropped["no_port"] == 1
