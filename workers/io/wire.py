"""A wire: how one port's payload travels, be it UDP datagrams or fake TCP segments.

A wire knows neither keys nor records: it moves payload, whole runs at a time. Its owner is the port's carrier, or, at a
server, nobody until the other end has proven itself: what comes by then goes to the tunnel's `Door`.
"""

from typing import Protocol

from workers.core.cuts import Records
from workers.settings import Kind


class WireOwner(Protocol):
    """The carrier of a wire."""

    def on_payload(self, wire: "Wire", records: Records, start: int, end: int, hint: int, now_us: int) -> None:
        """Payload came: `records.view[start:end]`, valid until this returns. `hint`: the size of the segments that were
        merged to this, 0 if unknown. If a record in it opens, `wire.on_opened` is called before this returns."""

    def on_writable(self, wire: "Wire") -> None:
        """The wire, which took less than it was given, takes more again."""

    def on_reset(self, wire: "Wire") -> None:
        """A RST, a FIN or an ICMP error came. It may be forged."""


class Wire(Protocol):
    """One port's way to the other end. It belongs to one worker.

    local, peer: the addresses for status, such as "198.18.1.1:40000".
    most_bytes: the largest record that the own link lets through. run_max_bytes: the most that `send_run` takes at
    once. rtt_us: of the kernel's handshake, 0 if there was none.
    """

    kind: Kind
    local: str
    peer: str
    most_bytes: int
    run_max_bytes: int
    rtt_us: int
    owner: WireOwner | None

    def send_run(self, view: memoryview, size: int, now_us: int) -> int:
        """Send records of `size` bytes back to back, of which the last may be shorter: how many bytes were taken, whole
        records only. Fewer than there are: the wire would block, and `WireOwner.on_writable` follows."""

    def send_one(self, record: bytes | memoryview, now_us: int) -> bool:
        """Send one record or handshake message that must not wait for the other end to allow more; False if it could
        not be sent at the moment, which is as if it were lost."""

    def on_opened(self, now_us: int) -> None:
        """A record of the payload at hand has opened, or it was an authentic handshake message."""

    def on_proven(self) -> None:
        """The other end has proven itself: its records are believed, and the kernel is not asked any more. Once."""

    def keep(self) -> None:
        """At a server: this wire is worth remembering until `close`. Other strangers' wires are forgotten."""

    def close(self) -> None:
        """Let go of everything, without a word to the other end (a sealed CLOSE was sent before, if any)."""


class Door(Protocol):
    """A server's tunnel, for whoever has not proven himself."""

    def on_stranger(self, wire: Wire, carrier: int, records: Records, start: int, end: int, now_us: int) -> None:
        """Payload of a wire that has no owner. `carrier`: the index of its port in the tunnel's `carriers`."""


class DialOwner(Protocol):
    """Who has dialled."""

    def on_wire(self, carrier: int, wire: Wire) -> None:
        """The wire of that carrier is there: handshake messages may travel. Set its `owner` at once."""

    def on_no_wire(self, carrier: int, why: str) -> None:
        """There will be none."""


class Diallers(Protocol):
    """The client's part of one kind of wires for one tunnel in one worker."""

    def dial(self, carrier: int, address: tuple[str, int], source: str | None, owner: DialOwner) -> None:
        """Begin to make a wire to a numeric address. Not more than one at a time for one carrier."""

    def cancel(self, carrier: int) -> None:
        """Nobody waits for that wire any more."""

    @property
    def lost(self) -> int:
        """Frames and datagrams that the own host refused."""

    def close(self) -> None:
        """Close what is under way. Wires that were handed over belong to their owners."""
