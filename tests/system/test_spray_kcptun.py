"""kcptun through spray tunnels: whole transfers both ways over a link that loses, for every kind of port and IP.

FORWARDER_TEST_KCPTUN_BYTES is how many bytes go each way (default 16 MiB). Skipped where there is no kcptun.
FORWARDER_TEST_LONG=1 tries every combination.
"""

import hashlib
import os
import socket
import time

import pytest

from tests.netlab import Lab, Link
from tests.system.kcptun import Kcptun, is_missing
from tests.system.pair import ENDS
from tests.system.payload import PIECE_BYTES, pieces, together
from tests.system.spray_pair import LOCAL, TARGET, SprayPair

LONG = bool(os.environ.get("FORWARDER_TEST_LONG"))
TOTAL_BYTES = int(os.environ.get("FORWARDER_TEST_KCPTUN_BYTES", "0")) or 16 << 20
LOSS = Link(delay_ms=25, loss=0.01)

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(is_missing(), reason="no kcptun here (Debian: kcptun)"),
    pytest.mark.usefixtures("backend"),
]


def send(connection: socket.socket, seed: int) -> str:
    """Send that many bytes; their sha256. The direction stays open: kcptun ends both when one ends."""
    digest = hashlib.sha256()
    for piece in pieces(seed, TOTAL_BYTES):
        connection.sendall(piece)
        digest.update(piece)
    return digest.hexdigest()


def receive(connection: socket.socket) -> str:
    """Read that many bytes; their sha256."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE_BYTES))
    left = TOTAL_BYTES
    while left:
        count = connection.recv_into(buffer, min(left, PIECE_BYTES))
        assert count, f"it ended {left} bytes early"
        digest.update(buffer[:count])
        left -= count
    return digest.hexdigest()


@pytest.mark.deadline(60 + 60 * TOTAL_BYTES / (64 << 20))
@pytest.mark.parametrize(
    ("kind", "version"), [("tcp", 4), ("udp", 6), ("all", 4)] + LONG * [("tcp", 6), ("udp", 4), ("all", 6)]
)
def test_transfer_both_ways_is_whole(kind: str, version: int) -> None:
    workers = (1, 1) if version == 4 else (2, 2)
    with (
        Lab(LOSS, seed=version) as lab,
        SprayPair(lab, kind=kind, ports=6, version=version, workers=workers) as pair,
        Kcptun(lab, LOCAL, TARGET) as kcptun,
        kcptun.opened() as (application, service),
    ):
        start_s = time.monotonic()
        sent_up, sent_down, received_up, received_down = together(
            lambda: send(application, 1),
            lambda: send(service, 2),
            lambda: receive(service),
            lambda: receive(application),
        )
        took_s = time.monotonic() - start_s
        assert received_up == sent_up
        assert received_down == sent_down
        print(f"{TOTAL_BYTES * 16 / took_s / 1e6:.0f} Mbit/s both ways together")
        for end in ENDS:
            carried = [
                carrier["bytes_out"] for session in pair.tunnel(end)["sessions"] for carrier in session["carriers"]
            ]
            assert len(carried) == pair.carriers
            # A conversation's datagrams go through the ports of one worker.
            used = sorted(carried)[-pair.carriers // workers[0] :]
            # A port that came up last, or lost its first datagrams, has had less.
            assert used[0] > sum(used) / len(used) / 4, f"{end}: {carried}{pair.logs()}"
