"""Fake TCP between two namespaces: the kernels shake hands and fall silent, and runs of segments cross beside them."""

import errno
import select
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.netlab import Lab
from tests.system.fake_tcp_ends import PORT, Ends, first_byte, pattern, received, wire
from tests.system.segments import ACK, FIN, RST, SEGMENT, SYN, send
from workers.core.bpf import socket_choice
from workers.io import fake_handshake
from workers.io.fake_handshake import Muted, close_silently, mute, tcp_facts
from workers.io.socket_filter import attach_socket_choice, has_filter

ROOT = Path(__file__).parents[2]

versions = pytest.mark.parametrize("version", [4, 6])
repairs = pytest.mark.parametrize("repair", [False, True])


def refuse_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(fake_handshake, "attach_filter", refuse)


def refuse_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_handshake, "TCP_REPAIR", 9999)


# The handshake, and what passes beside it


@versions
def test_each_end_sees_its_template_and_what_comes_in(lab: Lab, version: int) -> None:
    with Ends(lab, version) as ends:
        assert [frame.flags for frame in ends.seen_by_client] == [SYN | ACK, ACK]
        assert [frame.flags for frame in ends.seen_by_server] == [SYN, SYN | ACK, ACK]
        assert all(has_filter(sock) for sock in (ends.client, ends.server))
        assert ends.seen_by_client[1].target_port == ends.seen_by_server[1].source_port == PORT


@versions
@pytest.mark.parametrize("muted", [False, True])
def test_runs_cross_both_ways_and_no_kernel_says_a_word(lab: Lab, version: int, muted: bool) -> None:
    payload = pattern(40 * SEGMENT + 7)
    with Ends(lab, version) as ends:
        if muted:
            assert [mute(ends.client), mute(ends.server)] == [Muted.FILTER] * 2
        with wire(lab) as seen:
            for sender, template, receiver in (ends.up, ends.down):
                send(sender, template, first_byte(template), payload)
                crossed, frames = received(receiver, len(payload))
                assert crossed == payload
                assert all(frame.gso_size == SEGMENT for frame in frames)
                send(sender, template, first_byte(template) + len(payload), payload[:SEGMENT])
                crossed, (single,) = received(receiver, SEGMENT)
                assert (crossed, single.gso_size) == (payload[:SEGMENT], 0)
        assert sum(len(segment.payload) for segment in seen) == 2 * (len(payload) + SEGMENT)
        assert all(segment.payload for segment in seen)
        for sock in (ends.client, ends.server):
            assert tcp_facts(sock).established
            with pytest.raises(BlockingIOError):
                sock.recv(1)


@versions
def test_facts_are_those_of_the_handshake(lab: Lab, version: int) -> None:
    with Ends(lab, version) as ends:
        both = [tcp_facts(ends.client), tcp_facts(ends.server)]
        for facts, template in zip(both, (ends.seen_by_client[1], ends.seen_by_server[1]), strict=True):
            assert facts.established
            assert facts.timestamps
            assert -5 < (facts.timestamp - template.timestamp + 2**31) % 2**32 - 2**31 < 2000
            assert facts.send_mss == facts.receive_mss == 1500 - template.ip_bytes - 32
            assert facts.path_mtu == 1500
            assert 0 < facts.rtt_us < 1_000_000
        announced = [frame.scale for frame in ends.seen_by_server[:2]]
        assert [facts.receive_scale for facts in both] == announced
        assert [facts.send_scale for facts in both] == announced[::-1]
        assert min(announced) >= 10


def test_facts_say_so_where_timestamps_and_scales_are_not_spoken() -> None:
    with Lab(emulate=False) as lab:
        lab.run("server", ["sysctl", "-qw", "net.ipv4.tcp_timestamps=0", "net.ipv4.tcp_window_scaling=0"])
        with lab.listen("server", lab.server_ip4, PORT), lab.connect("client", lab.server_ip4, PORT) as client:
            facts = tcp_facts(client)
    assert (facts.timestamps, facts.timestamp, facts.send_scale, facts.receive_scale) == (False, 0, 0, 0)
    assert facts.send_mss == 1460


@versions
def test_socket_that_is_not_muted_takes_a_reset_and_repeats_a_lost_handshake_ack(lab: Lab, version: int) -> None:
    with Ends(lab, version) as ends:
        with wire(lab) as seen:
            server, answer, _ = ends.down
            send(server, answer, answer.sequence, b"", flags=SYN | ACK)
        assert [segment.flags for segment in seen] == [SYN | ACK, ACK]
        client, template, _ = ends.up
        send(client, template, template.sequence, b"", flags=RST)
        assert not tcp_facts(ends.server).established


# Muted


@versions
@pytest.mark.parametrize("signed", [False, True])
def test_muted_socket_neither_hears_nor_answers(
    lab: Lab, version: int, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if signed:
        refuse_filters(monkeypatch)
    with Ends(lab, version, filtered=not signed) as ends:
        assert has_filter(ends.server) is not signed
        assert mute(ends.server) is (Muted.SIGNATURE if signed else Muted.FILTER)
        client, template, _ = ends.up
        with wire(lab) as seen:
            send(client, template, template.sequence + 10_000_000, b"")  # outside the window: an ACK would be due
            send(client, template, template.sequence, b"", answered=template.acknowledged + 9)  # of what was never sent
            send(client, template, template.sequence, pattern(SEGMENT))
            send(client, template, template.sequence, b"", flags=RST)
            send(client, template, template.sequence, b"", flags=FIN | ACK)
        assert len(seen) == 5
        assert tcp_facts(ends.server).established


@versions
def test_payload_gets_no_answer_before_muting_where_filters_are_refused(
    lab: Lab, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_filters(monkeypatch)
    payload = pattern(10 * SEGMENT)
    with Ends(lab, version, filtered=False) as ends, wire(lab) as seen:
        for sender, template, receiver in (ends.up, ends.down):
            send(sender, template, first_byte(template), payload)
            assert received(receiver, len(payload))[0] == payload
    assert all(segment.payload for segment in seen)


# The end


@versions
@pytest.mark.parametrize("muted", [False, True])
@repairs
def test_closing_puts_nothing_on_the_wire(
    lab: Lab, version: int, repair: bool, muted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not repair:
        refuse_repair(monkeypatch)
    with Ends(lab, version) as ends, wire(lab) as seen:
        for sock in (ends.client, ends.server):
            if muted:
                mute(sock)
            close_silently(sock)
            assert sock.fileno() == -1
            close_silently(sock)
    assert seen == []


@repairs
def test_closing_a_signed_socket_puts_nothing_on_the_wire(
    lab: Lab, repair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_filters(monkeypatch)
    if not repair:
        refuse_repair(monkeypatch)
    with Ends(lab, 4, filtered=False) as ends, wire(lab) as seen:
        close_silently(ends.client)
        close_silently(ends.server)
    assert seen == []


def test_muted_socket_that_just_dies_sends_one_reset(lab: Lab) -> None:
    with Ends(lab, 4) as ends, wire(lab) as seen:
        mute(ends.server)
        ends.server.close()
    assert [segment.flags & ~ACK for segment in seen] == [RST]


# Opened and dialled inside the namespace, with the rights there are

PROGRAM = """
import select, socket, sys
from workers.io.fake_handshake import close_silently, dial, handshake_error, mute, open_listener, settle, tcp_facts

for family, listen, connect in (
    (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
    (socket.AF_INET6, "::1", "::1"),
    (socket.AF_INET6, "::", "127.0.0.1"),
):
    listener = open_listener(family, listen, 0, reuse_port=True)
    port = listener.getsockname()[1]
    family = socket.AF_INET6 if ":" in connect else socket.AF_INET
    dialled = dial(family, (connect, port), device="lo", source=connect)
    select.select([], [dialled], [], 5)
    assert handshake_error(dialled) == 0
    select.select([listener], [], [], 5)
    accepted, _ = listener.accept()
    for sock in (dialled, accepted):
        settle(sock)
        assert not sock.getblocking()
    dialled.send(b"never to be heard")
    assert select.select([accepted], [], [], 0.2)[0] == []
    print(mute(dialled).name, mute(accepted).name, tcp_facts(accepted).established)
    close_silently(dialled)
    close_silently(accepted)
    listener.close()
    try:
        refused = dial(family, (connect, port))
        select.select([], [refused], [], 5)
        print(handshake_error(refused))
    except ConnectionRefusedError as error:
        print(error.errno)
print("gevent" in sys.modules)
"""


@pytest.mark.parametrize(
    ("rights", "how"),
    [
        ([], "FILTER"),
        (["setpriv", "--bounding-set", "-net_admin"], "SIGNATURE"),
        (["setpriv", "--bounding-set", "-net_admin,-net_raw"], "SIGNATURE"),
    ],
)
def test_listener_and_dial_work_with_the_rights_there_are(lab: Lab, rights: list[str], how: str) -> None:
    done = lab.run("server", [*rights, sys.executable, "-c", PROGRAM], cwd=ROOT, timeout=60, check=False)
    once = [f"{how} {how} True", str(errno.ECONNREFUSED)]
    assert (done.stdout.splitlines(), done.stderr) == ([*once * 3, "False"], "")


@versions
def test_listeners_of_one_port_are_chosen_by_half_the_source_port(lab: Lab, version: int) -> None:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    address = lab.server_ip4 if version == 4 else lab.server_ip6
    with ExitStack() as stack:
        listeners = [stack.enter_context(lab.socket("server", socket.AF_INET6)) for _ in range(3)]
        for listener in listeners:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("::", PORT))
            listener.listen()
        attach_socket_choice(listeners[0], socket_choice(len(listeners)))
        for port in range(30_000, 30_024):
            with lab.socket("client", family) as client:
                client.bind(("", port))
                client.settimeout(5)
                client.connect((address, PORT))
                ready = select.select(listeners, [], [], 5)[0]
                assert ready == [listeners[port // 2 % 3]]
                accepted, (_, there, *_) = ready[0].accept()
                assert there == port
                close_silently(accepted)
                close_silently(client)
