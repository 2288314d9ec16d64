"""Scraping an instance in a lab's namespaces, or on this host."""

import socket
from collections.abc import Callable
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families


class Reply(NamedTuple):
    status: int
    body: str


def get(connect: Callable[[], socket.socket], path: str = "/metrics") -> Reply:
    """A GET over the connection that `connect` makes. Raises OSError."""
    with connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: forwarder\r\n\r\n".encode())
        received = b""
        while data := sock.recv(1 << 16):
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    return Reply(int(head.split()[1]), body.decode())


def samples(connect: Callable[[], socket.socket]) -> dict[str, float]:
    """Every sample of a scrape, by its name with its labels: `forwarder_flows_total tunnel=web`."""
    return {
        " ".join([sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(get(connect).body)
        for sample in family.samples
    }
