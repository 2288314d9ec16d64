"""A whole session, recorded on its way and sent again: nothing comes of it, at the server that it was meant for and at
one that was started anew."""

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.netlab import Lab
from tests.system.pair import Pair
from tests.system.traffic import WHOLE, Traffic

PORT = 9000
STRIPES = 2
DEADLINE_S = 1
SECRET = b"transfer 1000 to Mallory"


class Recorder:
    """A relay that the client takes for its server. `recorded`: what each stripe sent, in the pieces that came."""

    def __init__(self, lab: Lab) -> None:
        self.recorded: list[list[bytes]] = []
        self._lab = lab
        self._listener = lab.listen("client", lab.client_ip4s[1], PORT)
        self._socks = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = self._lab.connect("client", self._lab.server_ip4, PORT)
                server.settimeout(None)
                self._socks += [client, server]
                self.recorded.append([])
                for way in ((client, server, self.recorded[-1]), (server, client, [])):
                    threading.Thread(target=self._relay, args=way, daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, record: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                record.append(data)
                sink.sendall(data)

    def close(self) -> None:
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(emulate=False, addresses=2) as made:
        yield made


def record(lab: Lab, pair: Pair) -> list[list[bytes]]:
    """A session of one connection that carries something, and one that moves much."""
    recorder = Recorder(lab)
    try:
        pair.start("server")
        pair.start("client")
        pair.wait_carriers(STRIPES)
        with Traffic(pair) as traffic:
            with pair.connect() as application, traffic.listener.accept()[0] as target:
                application.sendall(SECRET)
                assert target.recv(1000) == SECRET
            exchange = traffic.open(1, total_bytes=1 << 20)
            traffic.wait(exchange, 20)
            assert exchange[0].outcome == WHOLE
        pair.stop("client", signal.SIGQUIT)
    finally:
        recorder.close()
    return recorder.recorded


def replay(lab: Lab, pieces: list[bytes]) -> tuple[bytes, str]:
    """All that the server answers, and how it ends."""
    answer = b""
    with lab.connect("client", lab.server_ip4, PORT) as sock:
        sock.settimeout(0.3)
        sock.sendall(pieces[0])
        with contextlib.suppress(TimeoutError):
            answer = sock.recv(4096)
        with contextlib.suppress(OSError):
            for piece in pieces[1:]:
                sock.sendall(piece)
        sock.settimeout(DEADLINE_S + 3)
        try:
            while data := sock.recv(4096):
                answer += data
        except ConnectionResetError:
            return answer, "reset"
        except TimeoutError:
            return answer, "open"
    return answer, "end of stream"


def test_recorded_session_is_worth_nothing(lab: Lab) -> None:
    options = f'handshake_timeout = "{DEADLINE_S}s"\nresume_timeout = "1s"'
    pair = Pair(lab, workers=(1, 2), somaxconn=STRIPES, address=lab.client_ip4s[1], server_tunnel=options, start=False)
    with pair:
        recorded = record(lab, pair)
        assert len(recorded) >= STRIPES and sum(map(len, map(b"".join, recorded))) > 1 << 20
        pair.wait(lambda: not pair.tunnel("server")["sessions"], "end of the session", 10)
        flows = pair.tunnel("server")["flows_total"]
        with pair.listen() as listener:
            for again in (False, True):
                if again:
                    pair.stop("server", signal.SIGQUIT)
                    pair.start("server")
                    flows = 0
                with ThreadPoolExecutor(len(recorded)) as pool:
                    outcomes = list(pool.map(lambda pieces: replay(lab, pieces), recorded))
                assert {how for _, how in outcomes} == {"reset"}
                answered = [bool(answer) for answer, _ in outcomes]
                assert answered == [again] * len(recorded), "message 1 is remembered, while the server lives"
                tunnel = pair.tunnel("server")
                assert (tunnel["sessions"], tunnel["flows_total"]) == ([], flows)
                listener.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    listener.accept()
