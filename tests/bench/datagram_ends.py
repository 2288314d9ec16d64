"""Both ends of a flow of datagrams, on loopback or in a namespace; figures are printed as JSON:

echo PORT                           sends each datagram back to where it came from
ask HOST PORT SECONDS               round trips of 1200 bytes, one after the other: quantiles, and how many were lost
take PORT [RUN]                     says `ready`; counts what comes, from the first datagram until nothing more comes
send HOST PORT SECONDS [BPS [RUN]]  sends as fast as it can, or at that rate; how many left
RUN above 1: datagrams go out (UDP_SEGMENT) and come in (UDP_GRO) so many at a time.
"""

import contextlib
import json
import socket
import sys
import time

SIZE = 1300
SMALL = 1200
WARM_UP_S = 0.3
FIRST_S, QUIET_S = 20.0, 0.7
ANSWER_S = 0.5
_BURST = 32
_BUFFER_BYTES = 8 << 20
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_UDP_SEGMENT, _UDP_GRO = 103, 104  # linux/udp.h


def _bound(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    sock.bind(("0.0.0.0", port))
    return sock


def _connected(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((host, port))
    return sock


def echo(port: int) -> None:
    """Until it is killed."""
    sock = _bound(port)
    while True:
        datagram, source = sock.recvfrom(65536)
        sock.sendto(datagram, source)


def ask(host: str, port: int, seconds: float) -> dict[str, float]:
    """Quantiles of the round trip in microseconds."""
    took: list[float] = []
    lost = number = 0
    with _connected(host, port) as sock:
        sock.settimeout(ANSWER_S)
        start = time.monotonic()
        while (now := time.monotonic()) < start + WARM_UP_S + seconds:
            number += 1
            question = number.to_bytes(SMALL, "big")
            before = time.perf_counter_ns()
            sock.send(question)
            try:
                while sock.recv(65536) != question:
                    pass
            except (TimeoutError, ConnectionRefusedError):
                lost += 1
                continue
            if now >= start + WARM_UP_S:
                took.append((time.perf_counter_ns() - before) / 1000)
    if not took:
        raise SystemExit(f"{lost} datagrams and no answer")
    took.sort()
    return {"p50_us": took[len(took) // 2], "p99_us": took[len(took) * 99 // 100], "lost": lost}


def take(port: int, run: int = 1) -> dict[str, float]:
    """How many datagrams came, and seconds from the first to the last."""
    place = bytearray(65536)
    with _bound(port) as sock:
        if run > 1:
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
        print("ready", flush=True)
        sock.settimeout(FIRST_S)
        try:
            came = sock.recv_into(place)
        except TimeoutError:
            raise SystemExit("not one datagram came") from None
        first = last = time.perf_counter()
        reads, every = 1, 64 // run or 1
        sock.settimeout(QUIET_S)
        with contextlib.suppress(TimeoutError):
            while length := sock.recv_into(place):
                came += length
                reads += 1
                if not reads % every:
                    last = time.perf_counter()
    return {"datagrams": came // SIZE, "seconds": last - first}


def send(host: str, port: int, seconds: float, bits_per_s: float, run: int = 1) -> dict[str, int]:
    """How many datagrams left; one that the kernel refuses did not."""
    content = bytes(SIZE * run)
    sent = 0
    with _connected(host, port) as sock:
        if run > 1:
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, SIZE)
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            for _ in range(_BURST // run or 1):
                with contextlib.suppress(OSError):
                    sock.send(content)
                    sent += run
            if bits_per_s:
                time.sleep(max(start + sent * SIZE * 8 / bits_per_s - time.monotonic(), 0))
    return {"datagrams": sent}


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "echo":
        echo(int(arguments[0]))
    elif what == "ask":
        print(json.dumps(ask(arguments[0], int(arguments[1]), float(arguments[2]))))
    elif what == "take":
        print(json.dumps(take(*map(int, arguments))))
    else:
        host, port, seconds, *rest = arguments
        rate, run = float(rest[0]) if rest else 0.0, int(rest[1]) if len(rest) > 1 else 1
        print(json.dumps(send(host, int(port), float(seconds), rate, run)))
