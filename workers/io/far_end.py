"""What one worker knows of a session's other end: its workers, which come, die and leave, and whether it drains."""

from workers.core.errors import RemoteProtocolError
from workers.core.session import SessionShare
from workers.io import mesh
from workers.io.exchange import Exchange

GONE_BURST = 64
"""Deaths of the other end's workers believed at once; ten a second after that."""


class FarEnd:
    """Tells `share` whose streams are lost, and the other workers of this end what is news."""

    def __init__(self, share: SessionShare, exchange: Exchange) -> None:
        self.draining = False
        self._share = share
        self._exchange = exchange
        self._roster: dict[int, int] = {}
        self._boot = 0
        self._gone: dict[int, int] = {}
        self._gone_left = GONE_BURST

    # From a stripe

    def on_drain(self) -> None:
        """It opens and takes no more streams."""
        if not self.draining:
            self.draining = True
            self._exchange.tell_all(mesh.DRAIN, flow=self._boot)

    def on_gone(self, slot: int, serial: int) -> None:
        """One of its workers is dead, as its others say. Raises RemoteProtocolError if too many are."""
        known = self._gone.get(slot)
        if known is not None and (known - serial) % (1 << 32) < 1 << 31:
            return  # the same or an older one
        if slot > 0xFF or not self._gone_left:
            raise RemoteProtocolError(f"worker {slot} of serial {serial} is gone, and too many before")
        self._gone_left -= 1
        self._gone[slot] = serial
        self._share.on_peer_gone(slot, serial)
        self._exchange.tell_all(mesh.GONE, value=slot << 32 | serial)

    def on_roster(self, roster: dict[int, int], boot_id: int, *, is_first: bool) -> None:
        """What a handshake said. `is_first`: there was no stripe before, of any worker."""
        if self.draining and is_first:  # the tunnel was taken away there, and is back
            self.draining = False
            self._exchange.tell_all(mesh.DRAIN)
        if boot_id == self._boot and roster == self._roster:
            return
        if boot_id != self._boot:
            self._gone.clear()
        self._boot, self._roster = boot_id, dict(roster)
        self.draining = False
        self._share.on_roster(roster, boot_id)
        for slot, serial in roster.items():
            self._exchange.tell_all(mesh.ROSTER, flow=boot_id, value=slot << 32 | serial)

    # From another worker of this end

    def on_descriptor(self, kind: int, boot_id: int, value: int) -> None:
        """GONE, ROSTER or DRAIN."""
        slot, serial = value >> 32, value & 0xFFFFFFFF
        if kind == mesh.GONE:
            self._share.on_peer_gone(slot, serial)
        elif kind == mesh.DRAIN:
            self.draining = boot_id == self._boot
        else:
            if boot_id != self._boot:
                self._boot, self._roster, self.draining = boot_id, {}, False
            self._share.on_roster({slot: serial}, boot_id)

    def on_time(self) -> None:
        """Every 100 ms."""
        self._gone_left = min(self._gone_left + 1, GONE_BURST)
