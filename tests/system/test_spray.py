"""Datagrams through spray tunnels between two real instances: sizes, sources, clients, conversations, restarts.

FORWARDER_TEST_IDLE_S is how long conversations are idle (default 2.5), and how long one-way flows last.
"""

import base64
import os
import random
import signal
import socket
import struct
import time
from contextlib import ExitStack
from typing import Any

import pytest

from tests.netlab import Lab, Link
from tests.system.instances import Instances
from tests.system.pair import ENDS
from tests.system.processes import settled_levels, wait_level
from tests.system.spray_pair import (
    DATAGRAM_MAX,
    TUNNEL,
    SprayPair,
    answering,
    ask,
    ask_until_answered,
    drain,
    flow,
    port_list,
)

IDLE_S = float(os.environ.get("FORWARDER_TEST_IDLE_S", "0")) or 2.5
SIZES = (0, 1, 100, 1399, 1472, 1473, 9000, 65_507)
TIMES = 5
SOURCES = 200
HEALS_S = 3.0
COPIED = 2000
_ETH_P_ALL = 0x0003

pytestmark = pytest.mark.usefixtures("backend")


# What arrives


@pytest.mark.pcap
@pytest.mark.parametrize(
    ("kind", "version", "workers"),
    [("tcp", 4, (1, 1)), ("tcp", 6, (2, 2)), ("udp", 4, (2, 1)), ("udp", 6, (1, 1)), ("all", 4, (2, 2))],
)
def test_datagram_of_any_size_arrives_as_it_was_sent(
    lab: Lab, kind: str, version: int, workers: tuple[int, int]
) -> None:
    contents = random.Random(version)
    with (
        SprayPair(lab, kind=kind, ports=4, version=version, workers=workers) as pair,
        pair.target() as target,
        answering(target),
    ):
        for _ in range(TIMES):
            with pair.application() as application:
                for size in SIZES:
                    try:
                        ask(application, contents.randbytes(size))
                    except TimeoutError:
                        pytest.fail(f"{size} bytes did not come back{pair.logs()}")


def test_each_of_many_sources_is_a_conversation_with_its_own_answers(lab: Lab) -> None:
    with SprayPair(lab, kind="all", workers=(2, 2)) as pair, pair.target() as target, ExitStack() as stack:
        applications = [stack.enter_context(pair.application()) for _ in range(SOURCES)]
        for turn in range(3):
            for number, application in enumerate(applications):
                application.send(struct.pack("!HH", number, turn))
            sources = {}
            for _ in applications:
                datagram, source = target.recvfrom(DATAGRAM_MAX)
                sources[source] = datagram
            assert sorted(sources.values()) == [struct.pack("!HH", number, turn) for number in range(SOURCES)]
            for source, datagram in sources.items():
                target.sendto(b"to " + datagram, source)
            for number, application in enumerate(applications):
                assert application.recv(DATAGRAM_MAX) == b"to " + struct.pack("!HH", number, turn)
        for end in ENDS:
            tunnel = pair.tunnel(end)
            assert tunnel["flows_open"] == tunnel["flows_total"] == SOURCES, end
            workers = pair.status(end)["workers"]
            assert all(worker["conversations"] > SOURCES // 8 for worker in workers), workers


def test_two_clients_share_the_ports_of_one_server(lab: Lab) -> None:
    key = base64.b64encode(os.urandom(32)).decode()
    auth = f'key_id = "tablet"\nkey = "{key}"\n'
    second = (
        f'role = "client"\nworkers = 1\n[auth]\n{auth}[[tunnel]]\nname = "{TUNNEL}"\nmode = "spray"\n'
        f'host = "{lab.server_ip4}"\nports = "{port_list(4)}"\ntype = "all"\nludp = "127.0.0.1:30001"\n'
    )
    with (
        SprayPair(lab, kind="all", ports=4, workers=(1, 2), server=f"[[client]]\n{auth}") as pair,
        Instances(lab) as instances,
        pair.target() as target,
        answering(target),
        pair.application() as one,
        pair.application() as other,
    ):
        tablet = instances.start("client", "tablet", second)
        tablet.wait_carriers(TUNNEL, pair.carriers)
        other.connect(("127.0.0.1", 30001))
        for number in range(50):
            one.send(b"one %d" % number)
            other.send(b"other %d" % number)
        assert sorted(drain(one)) == sorted(b"one %d" % number for number in range(50))
        assert sorted(drain(other)) == sorted(b"other %d" % number for number in range(50))
        sessions = pair.tunnel("server")["sessions"]
        assert {session["key_id"]: session["carriers_up"] for session in sessions} == {"laptop": 8, "tablet": 8}
        tablet.process.send_signal(signal.SIGTERM)
        assert tablet.process.wait(10) == 0
        ask(one, b"still here")


# Conversations


def test_idle_conversation_is_closed_after_its_duration_and_leaves_nothing(lab: Lab) -> None:
    duration = 'duration = "1s"'
    with (
        SprayPair(lab, kind="all", ports=2, workers=(2, 2), client_tunnel=duration, server_tunnel=duration) as pair,
        pair.target() as target,
    ):
        for turn in range(2):
            with ExitStack() as stack:
                applications = [stack.enter_context(pair.application()) for _ in range(50)]
                with answering(target):
                    for application in applications:
                        ask(application, bytes(3000))
                assert max(pair.flows_open(end) for end in ENDS) > 0
                pair.wait_flows(0, 5)
                if turn == 0:
                    before = settled_levels(pair)
                    continue
                wait_level(pair, before)
                with answering(target):
                    ask(applications[0], b"a new conversation")
        assert [pair.tunnel(end)["flows_total"] for end in ENDS] == [101, 101]


def test_idle_conversation_goes_on_and_keeps_its_ports(lab: Lab) -> None:
    interval = 'keepalive = "1s"'
    with (
        SprayPair(lab, kind="all", ports=3, workers=(2, 2), client_tunnel=interval, server_tunnel=interval) as pair,
        pair.target() as target,
        pair.application() as application,
    ):
        sources = set()
        ages = dict(ages_s(pair))
        for pause_s in (IDLE_S, 0):
            application.send(b"hello")
            datagram, source = target.recvfrom(DATAGRAM_MAX)
            sources.add(source)
            target.sendto(datagram, source)
            assert application.recv(DATAGRAM_MAX) == b"hello"
            time.sleep(pause_s)
        assert len(sources) == 1
        for name, age_s in ages_s(pair).items():
            assert age_s > ages[name] + IDLE_S, f"{name} was lost{pair.logs()}"


def ages_s(pair: SprayPair) -> dict[tuple[str, str, int], float]:
    """How old each port is at each end."""
    return {
        (end, carrier["kind"], carrier["id"]): carrier["age_s"]
        for end in ENDS
        for session in pair.tunnel(end)["sessions"]
        for carrier in session["carriers"]
    }


@pytest.mark.parametrize(("way", "ports"), [("up", 1), ("up", 4), ("down", 4)])
def test_flow_of_one_direction_outlasts_the_duration(lab: Lab, way: str, ports: int) -> None:
    """With one port, the worker that owns the conversation need not have any."""
    duration = 'duration = "1s"'
    count = int(IDLE_S * 50)
    with (
        SprayPair(lab, kind="udp", ports=ports, workers=(2, 2), client_tunnel=duration, server_tunnel=duration) as pair,
        pair.target() as target,
        ExitStack() as stack,
    ):
        for _ in range(4):
            application = stack.enter_context(pair.application())
            application.send(b"first")
            _, source = target.recvfrom(DATAGRAM_MAX)
        datagrams = [b"%d" % number for number in range(count)]
        if way == "up":
            came = flow(application, target, datagrams, 50)
            assert {address for _, address in came} == {source}, pair.logs()
        else:
            came = flow(target, application, datagrams, 50, source)
        assert sorted(datagram for datagram, _ in came) == sorted(datagrams), pair.logs()
        for end in ENDS:
            assert pair.tunnel(end)["flows_open"] == 1, end
            assert pair.tunnel(end)["flows_total"] == 4, end


def test_worker_without_ports_keeps_its_conversations(lab: Lab) -> None:
    """One port and two workers at the server, which forgets sessions soon: half of the conversations are handed in."""
    with (
        SprayPair(lab, kind="udp", ports=1, workers=(1, 2), start=False) as pair,
        pair.target() as target,
        ExitStack() as stack,
    ):
        pair.modules["server"] = ["tests.system.forgetful", "0.5"]
        for end in reversed(ENDS):
            pair.start(end)
        pair.wait_carriers(1)
        applications = [stack.enter_context(pair.application()) for _ in range(8)]
        sources: list[Any] = []
        for turn in range(2):
            time.sleep(1.5)
            for application in applications:
                application.send(b"%d" % turn)
                datagram, source = target.recvfrom(DATAGRAM_MAX)
                sources.append(source)
                target.sendto(datagram, source)
                assert application.recv(DATAGRAM_MAX) == b"%d" % turn
        assert sources[:8] == sources[8:], pair.logs()


# Coming and going


def test_client_that_starts_first_finds_the_server_when_it_comes(lab: Lab) -> None:
    with (
        SprayPair(lab, kind="all", workers=(1, 2), start=False) as pair,
        pair.target() as target,
        answering(target),
        pair.application() as application,
    ):
        pair.start("client")
        for _ in range(20):
            application.send(b"nobody there")
            time.sleep(0.05)
        pair.start("server")
        healed_s = ask_until_answered(application, 2 * HEALS_S)
        print(f"first answer after {healed_s:.2f} s")
        assert healed_s < HEALS_S, pair.logs()
        pair.wait_carriers(pair.carriers)


@pytest.mark.parametrize(
    ("kind", "ports", "end", "how", "down_s"),
    [
        ("tcp", 6, "server", signal.SIGKILL, 0.0),
        ("udp", 6, "server", signal.SIGTERM, 0.0),
        ("tcp", 1, "server", signal.SIGKILL, 4.0),
        ("tcp", 6, "client", signal.SIGKILL, 0.0),
        ("udp", 6, "client", signal.SIGTERM, 0.0),
    ],
)
def test_restart_of_one_end_heals_soon(
    lab: Lab, kind: str, ports: int, end: str, how: signal.Signals, down_s: float
) -> None:
    with (
        SprayPair(lab, kind=kind, ports=ports, workers=(2, 2)) as pair,
        pair.target() as target,
        answering(target),
        pair.application() as application,
    ):
        ask(application, b"before")
        pair.stop(end, how)
        time.sleep(down_s)
        pair.start(end)
        drain(application, 0.01)
        healed_s = ask_until_answered(application, 2 * HEALS_S)
        print(f"first answer {healed_s:.2f} s after the {end} was ready")
        assert healed_s < HEALS_S, pair.logs()
        pair.wait_carriers(pair.carriers)
        drain(application, 0.3)
        for number in range(100):
            ask(application, b"after %d" % number)


# Strangers


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_client_with_a_wrong_key_gets_no_answer_and_nothing_through(lab: Lab, kind: str) -> None:
    with (
        SprayPair(lab, kind=kind, ports=3, start=False) as pair,
        pair.target() as target,
        pair.application() as application,
        lab.socket("client", socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as observer,
    ):
        wrong = base64.b64encode(os.urandom(32)).decode()
        text = pair.config("client").read_text()
        pair.config("client").write_text(text.replace('key_file = "laptop.key"', f'key = "{wrong}"'))
        pair.start("server")
        pair.start("client")
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            application.send(b"let me in")
            time.sleep(0.01)
        assert not drain(target, 0.1)
        assert not drain(application, 0.1)
        assert pair.carriers_up("client") == 0
        assert not pair.tunnel("server")["sessions"]
        assert sum(counts["spray_refused"] for counts in pair.open_counts("server")) >= 3
        observer.setblocking(False)
        knocked = answered = 0
        while True:
            try:
                frame, (device, _, direction, *_) = observer.recvfrom(65_536)
            except BlockingIOError:
                break
            port, length = payload_of(frame)
            if device == "eth0" and port in pair.ports and length:
                knocked += direction == socket.PACKET_OUTGOING
                answered += direction != socket.PACKET_OUTGOING
        assert knocked >= 3
        assert answered == 0, f"{answered} answers to {knocked} messages{pair.logs()}"


def payload_of(frame: bytes) -> tuple[int, int]:
    """The server's port and the length of the payload of an IPv4 frame, 0 and 0 of any other."""
    if len(frame) < 34 or frame[12:14] != b"\x08\x00" or frame[23] not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        return 0, 0
    start = 14 + (frame[14] & 15) * 4
    ports = struct.unpack_from("!HH", frame, start)
    header = 8 if frame[23] == socket.IPPROTO_UDP else (frame[start + 12] >> 4) * 4
    return min(ports), struct.unpack_from("!H", frame, 16)[0] - (start - 14) - header


# Copies


def test_two_copies_make_up_for_much_loss() -> None:
    copies = "copies = 2"
    datagrams = [struct.pack("!I", number) * 50 for number in range(COPIED)]
    with (
        Lab(Link(delay_ms=5, loss=0.1)) as lab,
        SprayPair(lab, kind="all", ports=3, workers=(2, 2), client_tunnel=copies, server_tunnel=copies) as pair,
        pair.target() as target,
        pair.application() as application,
    ):
        came: dict[str, list[tuple[bytes, Any]]] = {"up": flow(application, target, datagrams, 1000)}
        came["down"] = flow(target, application, datagrams, 2000, came["up"][-1][1])
        for way, found in came.items():
            missing = set(datagrams) - {datagram for datagram, _ in found}
            print(f"{way}: {len(missing) / COPIED:.2%} lost")
            assert len(found) == COPIED - len(missing), f"{way}: some came twice"
            assert len(missing) < COPIED * 0.02, f"{way}: {len(missing)} of {COPIED} lost{pair.logs()}"


def test_copies_travel_on_different_ports() -> None:
    """With one port of three silent, nothing is lost, also before anybody notices."""
    copies = "copies = 2"
    datagrams = [struct.pack("!I", number) * 50 for number in range(500)]
    with (
        Lab(Link(delay_ms=1)) as lab,
        SprayPair(lab, kind="udp", ports=3, client_tunnel=copies, server_tunnel=copies) as pair,
        pair.target() as target,
        pair.application() as application,
    ):
        assert len(flow(application, target, datagrams, 1000)) == len(datagrams)
        assert lab.blackhole(port=pair.ports[0])
        came = flow(application, target, datagrams, 1000)
        assert len(came) == len(datagrams), f"{len(datagrams) - len(came)} lost{pair.logs()}"
