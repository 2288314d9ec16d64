"""Both ends of connections, on loopback or in a namespace:

    serve PORT                answers each connection as its first byte asks: ECHO, or TAKE whatever comes
    ask HOST PORT SECONDS     round trips of 64 bytes, one after the other; prints quantiles as JSON
    send HOST PORT            sends as fast as it can until SIGTERM; prints how many bytes as JSON

`ask` and `send` do what lines of standard input say: `connect` (which they answer by `connected`), and `go`.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from types import FrameType

ECHO, TAKE = b"e", b"t"
SIZE = 64
WARM_UP_S = 0.3
_PIECE = 256 << 10


def serve(port: int) -> None:
    """Each connection in a process of its own."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.create_server(("0.0.0.0", port)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    with contextlib.suppress(ConnectionError):
                        _answer(connection)
                    os._exit(0)


def _answer(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if connection.recv(1) == TAKE:
        place = bytearray(_PIECE)
        while connection.recv_into(place):
            pass
    else:
        while data := connection.recv(65536):
            connection.sendall(data)


def _connect(host: str, port: int) -> socket.socket:
    """A connection, once that is wanted, and what is to be done with it is wanted, too."""
    sys.stdin.readline()
    connection = socket.create_connection((host, port), timeout=10)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print("connected", flush=True)
    sys.stdin.readline()
    return connection


def ask(host: str, port: int, seconds: float) -> dict[str, float]:
    """Quantiles of the round trip in microseconds."""
    question = bytes(SIZE)
    took: list[float] = []
    with _connect(host, port) as connection:
        connection.sendall(ECHO)
        start = time.monotonic()
        while (now := time.monotonic()) < start + WARM_UP_S + seconds or not took:
            before = time.perf_counter_ns()
            connection.sendall(question)
            missing = SIZE
            while missing:
                data = connection.recv(missing)
                if not data:
                    raise SystemExit("the connection ended")
                missing -= len(data)
            if now >= start + WARM_UP_S:
                took.append((time.perf_counter_ns() - before) / 1000)
    took.sort()
    return {"p50_us": took[len(took) // 2], "p99_us": took[len(took) * 99 // 100]}


def send(host: str, port: int) -> dict[str, int]:
    """How many bytes went out until SIGTERM."""
    sent = 0

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    piece = bytes(_PIECE)
    try:
        with _connect(host, port) as connection:
            connection.sendall(TAKE)
            while True:
                sent += connection.send(piece)
    except KeyboardInterrupt:
        return {"bytes": sent}


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "serve":
        serve(int(arguments[0]))
    elif what == "ask":
        print(json.dumps(ask(arguments[0], int(arguments[1]), float(arguments[2]))))
    else:
        print(json.dumps(send(arguments[0], int(arguments[1]))))
