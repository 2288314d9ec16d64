"""Large transfers over a bad link, and the ways to name ends: families, names, tunnels, clients and sessions.

FORWARDER_TEST_BYTES is how many bytes go each way in the transfers (default 64 MiB).
"""

import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain

import pytest

from tests.netlab import Lab, Link
from tests.system.instances import Instances
from tests.system.pair import ENDS, Pair
from tests.system.payload import congestion_control, exchange, together

TOTAL_BYTES = int(os.environ.get("FORWARDER_TEST_BYTES", "0")) or 64 << 20
STRIPES = 10
LOSS = Link(delay_ms=25, loss=0.01)
EVERYTHING = Link(delay_ms=25, loss=0.01, reorder=0.01, duplicate=0.01, corrupt=0.01)
OPERATION_S = 30.0
"""How long a single read or write of an application may take: no stall is longer."""

Ends = tuple[socket.socket, socket.socket]


@pytest.mark.deadline(60 + 60 * TOTAL_BYTES / (256 << 20))
@pytest.mark.parametrize(
    ("link", "family", "workers"),
    [
        pytest.param(LOSS, 4, (1, 1), id="loss-ipv4-1x1"),
        pytest.param(LOSS, 6, (1, 2), id="loss-ipv6-1x2"),
        pytest.param(LOSS, 4, (3, 2), id="loss-ipv4-3x2"),
        pytest.param(EVERYTHING, 6, (1, 1), id="everything-ipv6-1x1"),
        pytest.param(EVERYTHING, 4, (1, 2), id="everything-ipv4-1x2"),
        pytest.param(EVERYTHING, 6, (3, 2), id="everything-ipv6-3x2"),
    ],
)
def test_transfer_both_ways_over_a_bad_link_is_whole(link: Link, family: int, workers: tuple[int, int]) -> None:
    with Lab(link, seed=family + workers[0]) as lab:
        address = lab.server_ip4 if family == 4 else lab.server_ip6
        with (
            Pair(lab, workers=workers, somaxconn=STRIPES, congestion=congestion_control(), address=address) as pair,
            pair.listen() as listener,
            pair.connect(timeout=OPERATION_S) as application,
        ):
            service, _ = listener.accept()
            with service:
                service.settimeout(OPERATION_S)
                exchange(application, service, TOTAL_BYTES)
            carriers = pair.status("client")["tunnels"][0]["sessions"][0]["carriers"]
        report = lab.report()
    assert len(carriers) == STRIPES
    carried = [carrier["bytes_in"] + carrier["bytes_out"] for carrier in carriers]
    assert sum(each > TOTAL_BYTES // 100 for each in carried) > STRIPES / 2, carried
    for way in (report.up, report.down):
        assert way.dropped["lost"]
        if link is EVERYTHING:
            assert way.reordered
            assert way.duplicated
            assert way.corrupted


def connect_before_the_stripe(pair: Pair, stack: ExitStack) -> list[Ends]:
    """Connections from before there was a stripe, of which one worker gets the only one: some are the other's, who
    accepts no more from then on. `pair` is not started yet."""
    listener = stack.enter_context(pair.listen())
    pair.start("client")
    applications: list[socket.socket] = []
    while len(applications) < 4 or not all(worker["waiting"] for worker in pair.open_counts("client")):
        assert len(applications) < 50, "one worker gets all the connections"
        applications.append(stack.enter_context(pair.connect(timeout=OPERATION_S)))
        time.sleep(0.05)
    pair.start("server")
    ends: list[Ends] = []
    for application in applications:
        application.sendall(b"%02d" % len(ends))
        ends.append((application, application))
    for _ in applications:
        service = stack.enter_context(listener.accept()[0])
        service.settimeout(OPERATION_S)
        place = int(service.recv(2, socket.MSG_WAITALL))
        ends[place] = applications[place], service
    return ends


def test_worker_without_stripes_is_as_fast_as_its_neighbour() -> None:
    """One stripe, two workers: the window grows also in the worker that has no stripe and measures no round trip."""
    with (
        Lab(Link(delay_ms=25)) as lab,
        Pair(lab, workers=(2, 2), somaxconn=1, start=False) as pair,
        ExitStack() as stack,
    ):
        ends = connect_before_the_stripe(pair, stack)
        start = time.monotonic()
        together(*(partial(exchange, *each, 5 << 20) for each in ends))
        took_s = time.monotonic() - start
    assert took_s < 10, "the window stayed small: 16 KiB a round trip would take 16 s"


def test_connections_go_to_a_worker_that_has_a_stripe() -> None:
    with Lab(emulate=False) as lab, Pair(lab, workers=(3, 3), somaxconn=1) as pair, ExitStack() as stack:
        listener = stack.enter_context(pair.listen())
        time.sleep(0.5)
        for _ in range(30):
            stack.enter_context(pair.connect(timeout=OPERATION_S))
            stack.enter_context(listener.accept()[0])
        (session,) = pair.tunnel("client")["sessions"]
        owner = session["carriers"][0]["worker"]
        workers = {worker["id"]: worker["streams"] for worker in pair.status("client")["workers"]}
    assert workers == {number: 30 * (number == owner) for number in workers}


@pytest.fixture
def instances(lab: Lab) -> Iterator[Instances]:
    with Instances(lab) as instances:
        yield instances


@pytest.mark.parametrize(
    ("client", "server"),
    [
        ('frame_max = "4KiB"\nwindow_max = "16KiB"\n', 'frame_max = "4KiB"\nwindow_max = "16KiB"\n'),
        ('frame_max = "4KiB"\n', ""),
        ("", 'frame_max = "4KiB"\nwindow_max = "64KiB"\n'),
    ],
    ids=["small", "small-client", "small-server"],
)
def test_smallest_frames_and_windows_pass_whatever_the_other_end_has(lab: Lab, client: str, server: str) -> None:
    """One stripe and two workers: the frames of some connections cross the mesh."""
    with (
        Pair(lab, workers=(2, 2), somaxconn=1, client_tunnel=client, server_tunnel=server, start=False) as pair,
        ExitStack() as stack,
    ):
        for seed, (application, service) in enumerate(connect_before_the_stripe(pair, stack)):
            exchange(application, service, 1 << 19, seed)
        for end in ENDS:
            (session,) = pair.status(end)["tunnels"][0]["sessions"]
            assert session["resumes"] == session["reinjected_bytes"] == 0, "a stripe was lost"


def client_text(key: str, *tunnels: str, workers: int = 1) -> str:
    return f'role = "client"\nworkers = {workers}\n[auth]\n{key}\n' + tunnel_tables(tunnels)


def server_text(clients: list[str], *tunnels: str, workers: int = 1) -> str:
    tables = "".join(f"[[client]]\n{client}\n" for client in clients)
    return f'role = "server"\nworkers = {workers}\n{tables}' + tunnel_tables(tunnels)


def tunnel_tables(tunnels: Iterable[str]) -> str:
    return "".join(f'[[tunnel]]\nmode = "stripe"\n{tunnel}\n' for tunnel in tunnels)


def check_leads(lab: Lab, local: tuple[str, int], target: tuple[str, int], server: str = "server") -> None:
    """What connects to `local` in the client's namespace reaches the service at `target` in the server's."""
    with lab.listen(server, *target) as listener:
        listener.settimeout(OPERATION_S)
        with lab.connect("client", *local, timeout=OPERATION_S) as application:
            service, _ = listener.accept()
            with service:
                service.settimeout(OPERATION_S)
                exchange(application, service, 1 << 20, seed=local[1])


def test_several_tunnels_in_one_file_lead_to_their_own_targets(lab: Lab, instances: Instances) -> None:
    """All forms of `host`, `listen`, `local` and `remote`."""
    key = instances.key("laptop")
    server = instances.start(
        "server",
        "server",
        server_text(
            [key],
            'name = "ports"\nhost_port = 9001\nremote_port = 8001',
            f'name = "addresses"\nlisten = "{lab.server_ip6}"\nhost_port = 9002\nremote = "[::1]:8002"',
            f'name = "crossed"\nlisten = "{lab.server_ip4}"\nhost_port = 9003\nremote = "{lab.server_ip4}:8003"',
            workers=2,
        ),
    )
    client = instances.start(
        "client",
        "client",
        client_text(
            key,
            f'name = "ports"\nhost = "{lab.server_ip4}"\nhost_port = 9001\nlocal_port = 8081\nsomaxconn = 3',
            f'name = "addresses"\nhost = "{lab.server_ip6}"\nhost_port = 9002\nlocal = "[::1]:8082"\nsomaxconn = 1',
            f'name = "crossed"\nhost = "{lab.server_ip4}"\nhost_port = 9003\nlocal = "{lab.client_ip4}:8083"',
            workers=2,
        ),
    )
    for name, stripes in (("ports", 3), ("addresses", 1), ("crossed", 10)):
        client.wait_carriers(name, stripes)
        server.wait_carriers(name, stripes)
    check_leads(lab, ("127.0.0.1", 8081), ("127.0.0.1", 8001))
    check_leads(lab, ("::1", 8082), ("::1", 8002))
    check_leads(lab, (lab.client_ip4, 8083), (lab.server_ip4, 8003))
    assert [client.carriers_up(name) for name in ("ports", "addresses", "crossed")] == [3, 1, 10]
    assert [client.tunnel(name)["flows_total"] for name in ("ports", "addresses", "crossed")] == [1, 1, 1]


def test_names_as_hosts_are_looked_up(lab: Lab, instances: Instances) -> None:
    """Both ends in one namespace: there is no name of another."""
    key = instances.key("laptop")
    instances.start(
        "client",
        "server",
        server_text([key], 'name = "web"\nlisten = "localhost"\nhost_port = 9000\nremote = "localhost:8000"'),
    )
    client = instances.start(
        "client",
        "client",
        client_text(key, 'name = "web"\nhost = "localhost"\nhost_port = 9000\nlocal = "localhost:8080"'),
    )
    client.wait_carriers("web", STRIPES)
    check_leads(lab, ("127.0.0.1", 8080), ("127.0.0.1", 8000), server="client")


def test_clients_reach_only_the_tunnels_of_their_key(lab: Lab, instances: Instances) -> None:
    keys = {name: instances.key(name) for name in ("alice", "bob", "carol")}
    server = instances.start(
        "server",
        "server",
        server_text(
            [keys["alice"] + 'tunnels = ["one"]', keys["bob"] + 'tunnels = ["two"]', keys["carol"]],
            *(
                f'name = "{name}"\nhost_port = {9000 + number}\nremote_port = {8000 + number}\nhandshake_timeout = "1s"'
                for number, name in enumerate(("one", "two"), 1)
            ),
        ),
    )
    clients = {
        name: instances.start(
            "client",
            name,
            client_text(
                key,
                *(
                    f'name = "{tunnel}"\nhost = "{lab.server_ip4}"\nhost_port = {9000 + number}\n'
                    f'local_port = {port + number}\nsomaxconn = 2\nconnect_timeout = "2s"'
                    for number, tunnel in enumerate(("one", "two"), 1)
                ),
            ),
        )
        for port, (name, key) in zip((8100, 8200, 8300), keys.items(), strict=True)
    }
    for name, tunnel in (("alice", "one"), ("bob", "two"), ("carol", "one"), ("carol", "two")):
        clients[name].wait_carriers(tunnel, 2)
    for local_port, target_port in ((8101, 8001), (8202, 8002), (8301, 8001), (8302, 8002)):
        check_leads(lab, ("127.0.0.1", local_port), ("127.0.0.1", target_port))
    for local_port in (8102, 8201):
        with lab.connect("client", "127.0.0.1", local_port) as application, pytest.raises(ConnectionResetError):
            application.recv(1)
    assert clients["alice"].carriers_up("two") == clients["bob"].carriers_up("one") == 0
    for tunnel, allowed in (("one", ["alice", "carol"]), ("two", ["bob", "carol"])):
        assert sorted(session["key_id"] for session in server.tunnel(tunnel)["sessions"]) == allowed
    check_leads(lab, ("127.0.0.1", 8101), ("127.0.0.1", 8001))


@pytest.mark.parametrize("workers", [1, 2])
def test_sessions_of_one_key_are_apart(lab: Lab, instances: Instances, workers: int) -> None:
    """Three processes of one client: each has its stripes and streams, and the end of one does not touch the others."""
    key = instances.key("laptop")
    server = instances.start(
        "server", "server", server_text([key], 'name = "web"\nhost_port = 9000\nremote_port = 8000', workers=workers)
    )
    ports = (8081, 8082, 8083)
    clients = [
        instances.start(
            "client",
            f"client-{port}",
            client_text(
                key,
                f'name = "web"\nhost = "{lab.server_ip4}"\nhost_port = 9000\nlocal_port = {port}\nsomaxconn = 4',
                workers=workers,
            ),
        )
        for port in ports
    ]
    server.wait_carriers("web", 4 * len(clients))
    sessions = server.tunnel("web")["sessions"]
    assert [(session["key_id"], session["carriers_up"]) for session in sessions] == [("laptop", 4)] * len(clients)
    with lab.listen("server", "127.0.0.1", 8000) as listener:
        listener.settimeout(OPERATION_S)
        pairs: list[Ends] = []
        for port in ports:
            application = lab.connect("client", "127.0.0.1", port, timeout=OPERATION_S)
            service, _ = listener.accept()
            service.settimeout(OPERATION_S)
            pairs.append((application, service))
        clients[0].process.send_signal(signal.SIGQUIT)
        clients[0].process.wait(10)
        for end in pairs.pop(0):
            with end, pytest.raises(ConnectionResetError):
                end.recv(1)
        together(*(partial(exchange, *ends, 4 << 20, seed) for seed, ends in enumerate(pairs)))
        for end in chain.from_iterable(pairs):
            end.close()
