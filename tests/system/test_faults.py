"""What breaks, and what applications see of it: stripes, workers, whole instances and the link."""

import signal
import socket
import time

import pytest

from tests.netlab import Lab
from tests.system.pair import ENDS, Pair
from tests.system.processes import is_alive, kill_worker, settled_levels, wait_level, wait_serving, workers
from tests.system.traffic import RESET, WHOLE, Traffic

SOON_S = 5.0
"""How long it may take until the far end of a dead worker's streams reads a reset."""
BACK_S = 3.0
"""How long until new connections work again."""


def await_reset(sock: socket.socket, timeout_s: float) -> float:
    """Reads to the end, which has to be a reset and not an end of stream; returns when it came."""
    sock.settimeout(timeout_s)
    with pytest.raises(ConnectionResetError):
        while sock.recv(65536):
            pass
        pytest.fail("the stream ended as if it were complete")
    return time.monotonic()


# Workers


@pytest.mark.parametrize("count", [2, 1])
@pytest.mark.parametrize("end", ENDS)
def test_killed_worker_resets_both_ends_of_its_streams_and_no_other(lab: Lab, end: str, count: int) -> None:
    with Pair(lab, workers=(count, count)) as pair, Traffic(pair) as traffic:
        exchanges = traffic.open(12, total_bytes=3 << 20, rate_bps=4e6)
        while not all(worker["streams"] for worker in workers(pair, end)):
            assert len(exchanges) < 100, "all connections go to one worker"
            exchanges += traffic.open(4, total_bytes=3 << 20, rate_bps=4e6)
        traffic.wait_received(exchanges, 64 << 10)
        before = workers(pair, end)
        killed_s = kill_worker(pair, end, 0)
        new = traffic.open_again(1 << 20, BACK_S)
        opened_s = time.monotonic()
        traffic.wait([exchange for exchange in exchanges if exchange.outcome == RESET] + [new], 20)
        pair.wait(lambda: sum(each.outcome == RESET for each in exchanges) == before[0]["streams"], "resets", SOON_S)
        for exchange in exchanges:
            exchange.speed_up(1e12)
        traffic.wait(exchanges, 30)
        after = workers(pair, end)
    reset = [exchange for exchange in exchanges if exchange.outcome == RESET]
    assert len(reset) == before[0]["streams"], exchanges
    assert all(exchange.outcome in (WHOLE, RESET) for exchange in exchanges), exchanges
    assert max(each.ended_s for exchange in reset for each in exchange.ends) - killed_s < SOON_S
    assert new.outcome == WHOLE and opened_s - killed_s < BACK_S
    assert after[0]["serial"] != before[0]["serial"] and after[0]["restarts"] == before[0]["restarts"] + 1
    assert after[1:] == [] or after[1]["serial"] == before[1]["serial"]


def test_ten_workers_killed_in_a_row_leave_nothing_open(lab: Lab) -> None:
    with Pair(lab, workers=(2, 2)) as pair, Traffic(pair) as traffic:
        traffic.wait(traffic.open(8, total_bytes=1 << 20), 20)
        before = settled_levels(pair)
        for number in range(10):
            exchanges = traffic.open(4, total_bytes=16 << 20, rate_bps=8e6)
            kill_worker(pair, ENDS[number % 2], number // 2 % 2)
            wait_serving(pair)
            for exchange in exchanges:
                exchange.speed_up(1e12)
            traffic.wait(exchanges, 20)
            assert all(exchange.outcome in (WHOLE, RESET) for exchange in exchanges), exchanges
        exchanges = traffic.open(8, total_bytes=1 << 20)
        traffic.wait(exchanges, 20)
        assert all(exchange.outcome == WHOLE for exchange in exchanges), exchanges
        wait_level(pair, before)


# Whole instances


def test_application_that_comes_before_the_server_is_served_when_it_is_there(lab: Lab) -> None:
    with Pair(lab, workers=(2, 2), start=False) as pair, Traffic(pair) as traffic:
        pair.start("client")
        applications = [pair.connect() for _ in range(4)]
        for number, sock in enumerate(applications):
            sock.sendall(b"early %d" % number)
        pair.start("server")
        ready_s = time.monotonic()
        targets = [traffic.listener.accept()[0] for _ in applications]
        assert time.monotonic() - ready_s < BACK_S
        assert sorted(sock.recv(100) for sock in targets) == [b"early %d" % number for number in range(4)]
        for sock in targets + applications:
            sock.close()


def test_server_away_for_longer_than_the_connect_timeout_is_a_reset(lab: Lab) -> None:
    with Pair(lab, workers=(1, 1), start=False, client_tunnel='connect_timeout = "1s"') as pair:
        pair.start("client")
        with pair.connect() as application:
            began_s = time.monotonic()
            application.sendall(b"anybody there?")
            assert 0.9 < await_reset(application, 5) - began_s < 2.5


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM], ids=lambda sig: sig.name)
def test_restarted_server_resets_what_it_had_and_serves_again(lab: Lab, sig: signal.Signals) -> None:
    with Pair(lab, workers=(2, 2), server='drain_timeout = "1s"') as pair, Traffic(pair) as traffic:
        exchanges = traffic.open(6, total_bytes=16 << 20, rate_bps=2e6)
        traffic.wait_received(exchanges, 16 << 10)
        old = pair.worker_pids("server")
        stopped_s = time.monotonic()
        assert pair.stop("server", sig) == (-sig if sig == signal.SIGKILL else 0)
        while any(is_alive(pid) for pid in old):
            assert time.monotonic() - stopped_s < 2 + (sig != signal.SIGKILL), "workers survive their supervisor"
            time.sleep(0.02)
        pair.start("server")
        ready_s = time.monotonic()
        traffic.wait([new := traffic.open_again(1 << 20, BACK_S)], 10)
        assert new.outcome == WHOLE and time.monotonic() - ready_s < BACK_S + 1
        traffic.wait(exchanges, SOON_S)
        assert [exchange.outcome for exchange in exchanges] == [RESET] * 6, exchanges


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM], ids=lambda sig: sig.name)
def test_restarted_client_resets_what_it_had_and_serves_again(lab: Lab, sig: signal.Signals) -> None:
    options = {"client": 'drain_timeout = "1s"', "server_tunnel": 'resume_timeout = "3s"'}
    with Pair(lab, workers=(2, 2), **options) as pair, Traffic(pair) as traffic:  # type: ignore[arg-type]
        exchanges = traffic.open(6, total_bytes=16 << 20, rate_bps=2e6)
        traffic.wait_received(exchanges, 16 << 10)
        assert pair.stop("client", sig) == (-sig if sig == signal.SIGKILL else 0)
        pair.start("client")
        traffic.wait([new := traffic.open_again(1 << 20, BACK_S)], 10)
        assert new.outcome == WHOLE
        traffic.wait(exchanges, 3 + SOON_S)
        assert [exchange.outcome for exchange in exchanges] == [RESET] * 6, exchanges
        pair.wait(lambda: len(pair.tunnel("server")["sessions"]) == 1, "end of the old session", 5)


def test_target_that_refuses_is_a_reset_and_no_empty_answer(lab: Lab) -> None:
    with Pair(lab, workers=(1, 2)) as pair:
        for sent in (b"", b"GET / HTTP/1.0\r\n\r\n"):
            for _ in range(4):
                with pair.connect() as application:
                    began_s = time.monotonic()
                    application.sendall(sent)
                    assert await_reset(application, 5) - began_s < 2
        pair.wait(lambda: not pair.flows_open("client") and not pair.flows_open("server"), "end of all streams")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("somaxconn", [10, 1])
def test_draining_finishes_what_is_open_and_refuses_what_is_new(lab: Lab, end: str, somaxconn: int) -> None:
    tunnel = 'connect_timeout = "1s"'
    with Pair(lab, workers=(2, 2), somaxconn=somaxconn, client_tunnel=tunnel) as pair, Traffic(pair) as traffic:
        exchanges = traffic.open(6, total_bytes=2 << 20, rate_bps=6e6)
        traffic.wait_received(exchanges, 64 << 10)
        pair.processes[end].send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(ConnectionError), pair.connect(5) as late:
            late.sendall(b"late")
            await_reset(late, 5)
            raise ConnectionResetError
        traffic.wait(exchanges, 20)
        assert [exchange.outcome for exchange in exchanges] == [WHOLE] * 6, exchanges
        assert pair.processes.pop(end).wait(5) == 0, pair.logs()


# The link


def stripes(link: Lab, pair: Pair) -> list[int]:
    """Open stripes, by the emulator's number."""
    return [each.index for each in link.connections() if each.server[1] == pair.host_port]


def test_stripe_reset_every_second_harms_no_byte(link: Lab) -> None:
    with Pair(link, workers=(2, 2)) as pair, Traffic(pair) as traffic:
        exchanges = traffic.open(2, total_bytes=24 << 20)
        resets = 0
        while any(exchange.outcome is None for exchange in exchanges):
            open_now = stripes(link, pair)
            resets += link.reset(open_now[resets * 3 % len(open_now)])
            time.sleep(1)
            assert resets < 40, f"too slow: {exchanges}{pair.logs()}"
        assert [exchange.outcome for exchange in exchanges] == [WHOLE] * 2, f"{exchanges}{pair.logs()}"
        assert resets >= 3


def test_link_black_for_five_seconds_harms_no_byte(link: Lab) -> None:
    with Pair(link, workers=(2, 2)) as pair, Traffic(pair) as traffic:
        exchanges = traffic.open(2, total_bytes=8 << 20)
        traffic.wait_received(exchanges, 1 << 20)
        try:
            assert link.blackhole() >= 10
            time.sleep(1)
            seen = [exchange.received for exchange in exchanges]
            time.sleep(4)
            assert [exchange.received for exchange in exchanges] == seen
        finally:
            link.restore()
        assert None in {exchange.outcome for exchange in exchanges}
        traffic.wait(exchanges, 30)
        assert [exchange.outcome for exchange in exchanges] == [WHOLE] * 2, f"{exchanges}{pair.logs()}"


def test_stripe_that_goes_black_for_good_harms_no_byte(link: Lab) -> None:
    with Pair(link, workers=(1, 2)) as pair, Traffic(pair) as traffic:
        exchanges = traffic.open(2, total_bytes=8 << 20)
        traffic.wait_received(exchanges, 1 << 20)
        began_s = time.monotonic()
        for index in stripes(link, pair)[:3]:
            assert link.blackhole(index) == 1
        traffic.wait(exchanges, 20)
        assert [exchange.outcome for exchange in exchanges] == [WHOLE] * 2, exchanges
        assert time.monotonic() - began_s < 10


def test_new_connections_find_the_stripes_that_work(link: Lab) -> None:
    with Pair(link, workers=(2, 2)) as pair, Traffic(pair) as traffic:
        traffic.wait(traffic.open(4, total_bytes=1 << 20), 20)
        for index in stripes(link, pair)[::2]:
            assert link.blackhole(index) == 1
        began_s = time.monotonic()
        exchanges = [traffic.open(1, total_bytes=100_000)[0] for _ in range(10)]
        traffic.wait(exchanges, SOON_S)
        assert [exchange.outcome for exchange in exchanges] == [WHOLE] * 10, exchanges
        assert time.monotonic() - began_s < SOON_S
