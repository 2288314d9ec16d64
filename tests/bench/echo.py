"""Both ends of a round-trip measurement: `serve PORT` on loopback, `ask HOST PORT SECONDS`, which prints JSON."""

import json
import socket
import sys
import time

SIZE = 64
WARM_UP = 500


def serve(port: int) -> None:
    """Answer one connection after the other with what it sends."""
    with socket.create_server(("0.0.0.0", port)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while data := connection.recv(65536):
                    connection.sendall(data)


def ask(host: str, port: int, seconds: float) -> dict[str, float]:
    """Quantiles of the round trip in microseconds."""
    question = bytes(SIZE)
    took: list[float] = []
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until = time.monotonic() + seconds
        while time.monotonic() < until or len(took) <= WARM_UP:
            start = time.perf_counter_ns()
            connection.sendall(question)
            missing = SIZE
            while missing:
                data = connection.recv(missing)
                if not data:
                    raise SystemExit("the connection ended")
                missing -= len(data)
            took.append((time.perf_counter_ns() - start) / 1000)
    took = sorted(took[WARM_UP:])
    return {"p50_us": took[len(took) // 2], "p99_us": took[len(took) * 99 // 100]}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(json.dumps(ask(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))))
