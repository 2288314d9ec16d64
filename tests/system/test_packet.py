"""Packet ports: what one sees, what it can be told to send, its device, and the route that names it."""

import errno
import select
import socket
import sys
from pathlib import Path

import pytest

from tests.netlab import Lab
from tests.system.fake_tcp_ends import PORT, Ends, first_byte, next_frame, packet_port, pattern, received
from tests.system.segments import EVERYTHING, SEGMENT, read, send
from tests.system.tun import joined_tun
from workers.core.bpf import capture
from workers.io.packet import FRAME_BYTES_MAX, RECEIVE_BUFFER_BYTES, find_device
from workers.io.route import neighbour, route_to

ROOT = Path(__file__).parents[2]

versions = pytest.mark.parametrize("version", [4, 6])


@versions
def test_device_without_link_header_carries_runs_as_well(lab: Lab, version: int) -> None:
    payload = pattern(20 * SEGMENT)
    with joined_tun(lab), Ends(lab, version, device="tun0") as ends:
        assert ends.client_port.device.link_bytes == 0
        for sender, template, receiver in (ends.up, ends.down):
            send(sender, template, first_byte(template), payload)
            assert received(receiver, len(payload))[0] == payload


def test_port_sees_nothing_of_other_connections_nor_what_it_sends(lab: Lab) -> None:
    with Ends(lab, 4) as ends, lab.listen("server", lab.server_ip4, PORT + 1) as listener:
        with lab.connect("client", lab.server_ip4, PORT + 1) as other:
            other.sendall(b"something else")
            listener.accept()[0].close()
        client, template, server = ends.up
        send(client, template, template.sequence, b"the only one")
        assert next_frame(server).payload == b"the only one"
        assert read(client, 0.1) is None


def test_filter_can_be_changed_while_the_port_is_used(lab: Lab) -> None:
    with Ends(lab, 4) as ends:
        client, template, server = ends.up
        server.set_filter(capture("server", [], link_bytes=14))
        send(client, template, template.sequence, b"unseen")
        server.set_filter(capture("server", range(400, 500), link_bytes=14, hosts=[socket.inet_aton(lab.client_ip4)]))
        send(client, template, template.sequence, b"seen")
        assert next_frame(server).payload == b"seen"


def test_frames_that_are_cut_and_those_that_found_no_room_are_counted(lab: Lab) -> None:
    payload = pattern(40 * SEGMENT)
    with Ends(lab, 4) as ends:
        client, template, server = ends.up
        send(client, template, template.sequence, payload)
        select.select([server], [], [], 5)
        assert server.receive_into(memoryview(bytearray(1000))) == 1000
        assert server.truncated == 1
        assert server.receive_into(memoryview(bytearray(1000))) == 0
        assert server.take_dropped() == 0
        for _ in range(600):
            send(client, template, template.sequence, payload)
        assert 0 < server.take_dropped() < 500
        assert server.take_dropped() == 0


@pytest.mark.parametrize("queue_bytes", [300_000, 20_000_000])  # the queue is full first, or the socket's buffer
def test_run_that_must_wait_is_not_lost(queue_bytes: int) -> None:
    payload = pattern(40 * SEGMENT)
    with Lab(emulate=False) as lab:
        shape = f"tc qdisc add dev eth0 root tbf rate 200mbit burst 130000 limit {queue_bytes}"
        lab.run("client", shape.split())
        with Ends(lab, 4) as ends:
            client, template, server = ends.up
            waited = sum(send(client, template, number, payload) for number in range(100))
            crossed = [next_frame(server) for _ in range(100)]
    assert waited > 0
    assert [frame.sequence for frame in crossed] == list(range(100))
    assert all(frame.payload == payload for frame in crossed)


def test_segment_above_the_mtu_is_an_error(lab: Lab) -> None:
    with Ends(lab, 4) as ends, pytest.raises(OSError, match="too long") as raised:
        client, template, _ = ends.up
        send(client, template, template.sequence, pattern(1460), segment=65_000)
    assert raised.value.errno == errno.EMSGSIZE


@pytest.mark.parametrize(("name", "number"), [("eth7", errno.ENODEV), ("", errno.ENODEV), ("a" * 16, errno.ENODEV)])
def test_device_that_is_not_there_is_told_by_name(lab: Lab, name: str, number: int) -> None:
    with lab.socket("client", socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        with pytest.raises(OSError, match=f"device {name}") as raised:
            find_device(sock, name)
        assert raised.value.errno == number
        assert find_device(sock, "lo").link_bytes == 14
        assert find_device(sock, "eth0")[2:] == (1500, 14)


def test_port_goes_on_when_its_device_is_up_again() -> None:
    blank = bytes(10 + 60)
    with Lab(emulate=False) as lab, packet_port(lab, "client", program=EVERYTHING) as port:
        view = memoryview(bytearray(FRAME_BYTES_MAX))
        lab.run("client", ["ip", "link", "set", "eth0", "down"])
        with lab.socket("client", socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
            with pytest.raises(OSError, match="eth0 is down") as raised:
                find_device(sock, "eth0")
            assert raised.value.errno == errno.ENETDOWN
        with pytest.raises(OSError, match="down") as raised:
            while True:
                port.receive_into(view)
        assert raised.value.errno == errno.ENETDOWN
        with pytest.raises(OSError, match="down") as raised:
            port.send(blank, b"")
        assert raised.value.errno == errno.ENETDOWN
        assert port.receive_into(view) == 0
        lab.run("client", ["ip", "link", "set", "eth0", "up"])
        assert port.send(blank, b"") == 0
        with lab.listen("server", lab.server_ip4, PORT), lab.connect("client", lab.server_ip4, PORT):
            assert port.receive_into(view) > 0


def test_port_goes_over_to_a_device_that_was_made_anew() -> None:
    with Lab(emulate=False) as lab, packet_port(lab, "client") as port:
        make = "link add pair0 type veth peer name pair1", "link set pair0 up", "link set pair1 up"
        lab.run("client", ["ip", "-batch", "-"], input="\n".join(make))
        with lab.socket("client", socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
            first = find_device(sock, "pair0")
            port.bind(first, EVERYTHING)
            lab.run("client", ["ip", "link", "del", "pair0"])
            with pytest.raises(OSError, match="No such device"):
                port.send(bytes(10 + 60), b"")
            lab.run("client", ["ip", "-batch", "-"], input="\n".join(make))
            again = find_device(sock, "pair0")
        assert again.number != first.number
        port.bind(again, EVERYTHING)
        with packet_port(lab, "client", "pair1", EVERYTHING) as other:
            assert port.send(bytes(10) + b"\x02" * 60, b"there") == 5
            view = memoryview(bytearray(FRAME_BYTES_MAX))
            frames = []
            while b"there" not in frames:
                assert select.select([other], [], [], 5)[0]
                frames.append(bytes(view[: other.receive_into(view)])[-5:])


UNPRIVILEGED = """
import os, socket
from workers.core.bpf import capture
from workers.io.packet import FRAME_BYTES_MAX, PacketPort, find_device, open_socket

sock = open_socket()
os.setresuid(65534, 65534, 65534)
port = PacketPort(sock, find_device(sock, "lo"), capture("server", [443], link_bytes=14))
print(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), port.receive_into(memoryview(bytearray(FRAME_BYTES_MAX))))
port.set_filter(capture("server", [444], link_bytes=14))
port.send(bytes(10 + 60), b"")
try:
    open_socket()
except PermissionError:
    print("dropped")
"""


def test_port_needs_no_right_once_its_socket_is_open(lab: Lab) -> None:
    done = lab.run("server", [sys.executable, "-c", UNPRIVILEGED], cwd=ROOT, timeout=60, check=False)
    if "Invalid argument" in done.stderr:
        pytest.skip("only one user in this namespace")
    assert (done.stdout.split(), done.stderr) == ([str(2 * RECEIVE_BUFFER_BYTES), "0", "dropped"], "")


def test_route_names_device_source_gateway_and_mtu() -> None:
    with Lab(emulate=False) as lab, lab.socket("client", socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        lines = [
            "route add default via 198.18.2.9",
            "route add 198.51.100.0/24 via 198.18.2.9 mtu 1400",
            "route add 2000::/3 via 2001:2::9",
            "route add unreachable 203.0.113.0/24",
        ]
        lab.run("client", ["ip", "-batch", "-"], input="\n".join(lines))
        here4, here6 = lab.client_ip4, lab.client_ip6
        assert route_to(netlink, lab.server_ip4) == ("eth0", 0, here4, "")
        assert route_to(netlink, lab.server_ip6) == ("eth0", 0, here6, "")
        assert route_to(netlink, "192.0.2.1") == ("eth0", 0, here4, "198.18.2.9")
        assert route_to(netlink, "2001:db8::1") == ("eth0", 0, here6, "2001:2::9")
        assert route_to(netlink, "198.51.100.7") == ("eth0", 1400, here4, "198.18.2.9")
        assert route_to(netlink, here4).device == "lo"
        assert neighbour(netlink, 1, lab.server_ip4) == b""
        with lab.socket("client", socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
            number = find_device(sock, "eth0").number
        for address in (lab.server_ip4, lab.server_ip6):
            assert neighbour(netlink, number, address) == bytes([2, 0, 0, 0, 0, 2])
        with pytest.raises(OSError, match=r"no route to 203\.0\.113\.1") as raised:
            route_to(netlink, "203.0.113.1")
        assert raised.value.errno == errno.EHOSTUNREACH


PROGRAM = """
import select, subprocess
from workers.io.route import drain, open_netlink, route_to

with open_netlink(watch=True) as watching, open_netlink() as asking:
    print(drain(watching), route_to(asking, "2001:2::2:1%eth0").device)
    subprocess.run(["ip", "route", "add", "192.0.2.0/24", "dev", "eth0"], check=True)
    print(bool(select.select([watching], [], [], 5)[0]), drain(watching), drain(watching))
    lines = [f"route add 10.{n // 250}.{n % 250}.0/24 dev eth0" for n in range(5000)]
    subprocess.run(["ip", "-batch", "-"], input="\\n".join(lines), text=True, check=True)
    print(drain(watching), drain(watching))
"""


def test_watch_tells_that_routes_changed_however_many() -> None:
    with Lab(emulate=False) as lab:
        done = lab.run("client", [sys.executable, "-c", PROGRAM], cwd=ROOT, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == (["False", "eth0", "True", "True", "False", "True", "False"], "")
