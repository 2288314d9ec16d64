"""What a classic BPF program returns for a packet: an interpreter of the instructions as linux/filter.h has them."""

import operator
from collections.abc import Callable
from functools import lru_cache
from struct import iter_unpack

WORD = 2**32
PACKET_TYPE, NETWORK = WORD - 0x1000 + 4, WORD - 0x100000

LD, LDX, ST, STX, ALU, JUMP, RETURN, MISC = range(8)
SIZES = {0x00: 4, 0x08: 2, 0x10: 1}
CALCULATIONS: dict[int, Callable[[int, int], int]] = {
    0x00: operator.add,
    0x10: operator.sub,
    0x20: operator.mul,
    0x30: operator.floordiv,
    0x40: operator.or_,
    0x50: operator.and_,
    0x60: lambda a, b: a << b if b < 32 else 0,
    0x70: operator.rshift,
    0x90: operator.mod,
}
COMPARISONS: dict[int, Callable[[int, int], bool]] = {
    0x10: operator.eq,
    0x20: operator.gt,
    0x30: operator.ge,
    0x40: lambda a, b: bool(a & b),
}


class OutsideError(Exception):
    """A load from outside the packet, which drops it."""


def run(program: bytes, packet: bytes, *, packet_type: int = 0, network: bytes = b"") -> int:
    """What the program returns. network: from the IP header on, for loads relative to it."""
    return _Machine(packet, packet_type, network).run(_decoded(program))


@lru_cache(maxsize=16)
def _decoded(program: bytes) -> list[tuple[int, int, int, int]]:
    return list(iter_unpack("=HBBI", program))


class _Machine:
    def __init__(self, packet: bytes, packet_type: int, network: bytes) -> None:
        self.packet, self.packet_type, self.network = packet, packet_type, network
        self.a = self.x = 0
        self.memory = [0] * 16

    def run(self, program: list[tuple[int, int, int, int]]) -> int:
        assert 0 < len(program) <= 4096
        at = 0
        try:
            while True:
                code, true, false, k = program[at]
                at += 1
                if code & 7 == RETURN:
                    return self.a if code & 0x18 else k
                if code == JUMP:
                    at += k
                elif code & 7 == JUMP:
                    at += true if COMPARISONS[code & 0xF0](self.a, self.x if code & 8 else k) else false
                else:
                    self._step(code, k)
        except OutsideError:
            return 0

    def _step(self, code: int, k: int) -> None:
        match code & 7:
            case 0:
                self.a = self._load(code, k)
            case 1:
                self.x = 4 * (self._bytes(k, 1) & 15) if code == 0xB1 else self._load(code, k)
            case 2:
                self.memory[k] = self.a
            case 3:
                self.memory[k] = self.x
            case 4:
                self.a = CALCULATIONS[code & 0xF0](self.a, self.x if code & 8 else k) % WORD
            case _:
                self.a, self.x = (self.x, self.x) if code & 0x80 else (self.a, self.a)

    def _load(self, code: int, k: int) -> int:
        match code & 0xE0:
            case 0x00:
                return k
            case 0x20 if k == PACKET_TYPE:
                return self.packet_type
            case 0x20:
                return self._bytes(k, SIZES[code & 0x18])
            case 0x40:
                return self._bytes((self.x + k) % WORD, SIZES[code & 0x18])
            case 0x60:
                return self.memory[k]
            case 0x80:
                return len(self.packet)
        raise AssertionError(hex(code))

    def _bytes(self, at: int, size: int) -> int:
        data = self.packet
        if at >= NETWORK:
            at, data = at - NETWORK, self.network
        if at + size > len(data):
            raise OutsideError
        return int.from_bytes(data[at : at + size], "big")
