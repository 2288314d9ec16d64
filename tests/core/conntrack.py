"""A model of Linux' conntrack in the middle: which segments of one connection it calls invalid.

After nf_conntrack_proto_tcp.c of Linux 6.12 (tcp_in_window, tcp_init_sender) with nf_conntrack_tcp_be_liberal=0, less
SACK, NAT and the states after the first FIN. Numbers are compared modulo 2^32, as there.
"""

from dataclasses import dataclass

from workers.core.tcp_header import ACK, FIN, SYN

MASK = 2**32 - 1
MAXACKWINCONST = 66_000


def before(one: int, other: int) -> bool:
    return (one - other) & MASK >= 2**31


def after(one: int, other: int) -> bool:
    return before(other, one)


@dataclass
class Side:
    """What was seen from one end (struct ip_ct_tcp_state)."""

    end: int = 0
    maxend: int = 0
    maxwin: int = 0
    scale: int = 0


class Conntrack:
    """Follows one connection. `invalid` lists why segments were called invalid; those would be dropped.

    With `scales` None, the two SYN carried no window scale option.
    """

    def __init__(self, scales: tuple[int, int] | None) -> None:
        self.sides = (Side(), Side())
        self.scales = scales
        self.invalid: list[str] = []

    def passes(self, way: int, sequence: int, length: int, ack: int, window: int, flags: int) -> bool:
        """Follow a segment sent by end `way` (0 the client); whether it goes on."""
        verdict = self._look(self.sides[way], self.sides[1 - way], way, sequence, length, ack, window, flags)
        if verdict:
            self.invalid.append(f"{verdict}: way={way} seq={sequence} length={length} ack={ack}")
        return not verdict

    def _look(
        self, sender: Side, receiver: Side, way: int, seq: int, length: int, ack: int, win: int, flags: int
    ) -> str:
        end = (seq + length + (flags & SYN != 0) + (flags & FIN != 0)) & MASK
        if sender.maxwin == 0:
            assert flags & SYN, "no connection is picked up in the middle here"
            sender.end = sender.maxend = end
            sender.maxwin = max(win, 1)
            sender.scale = self.scales[way] if self.scales else 0
        if not flags & ACK:
            ack = receiver.end
        if not before(seq, sender.maxend + 1):
            return "SEQ is over the upper bound"
        if not before(ack, receiver.end + 1):
            return "ACK is over the upper bound"
        if receiver.maxwin and not after(end, sender.end - receiver.maxwin - 1):
            return "SEQ is under the lower bound"
        if not after(ack, receiver.end - max(sender.maxwin, MAXACKWINCONST) - 1):
            return "ACK is under the lower bound"
        if not flags & SYN:
            win <<= sender.scale
        sender.maxwin = max(sender.maxwin, win)
        if after(end, sender.end):
            sender.end = end
        if receiver.maxwin and after(end, sender.maxend):
            receiver.maxwin += (end - sender.maxend) & MASK
        if after(ack + win, receiver.maxend - 1):
            receiver.maxend = (ack + win + (win == 0)) & MASK
        return ""
