"""The assembler of classic BPF programs, as bytes that SO_ATTACH_FILTER takes.

A program is an array of `struct sock_filter` (linux/filter.h), in the byte order of this machine:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-------------------------------+---------------+---------------+
    |             code              |  skip if true | skip if false |
    +-------------------------------+---------------+---------------+
    |                               k                               |
    +---------------------------------------------------------------+

It returns how many bytes of the packet to keep; 0 drops it. A load outside the packet drops it too. Jumps lead forward
only, and a conditional one over at most 255 instructions. A program has at most 4096 instructions.
"""

from collections.abc import Iterator
from struct import Struct

INSTRUCTION = Struct("=HBBI")
INSTRUCTIONS_MAX = 4096

# Codes: linux/bpf_common.h.
LD_WORD, LD_HALF, LD_BYTE = 0x20, 0x28, 0x30
LD_HALF_X, LD_BYTE_X = 0x48, 0x50
LD_CONSTANT, LD_LENGTH, LD_MEMORY = 0x00, 0x80, 0x60
LDX_CONSTANT, LDX_MEMORY, LDX_HEADER_LENGTH = 0x01, 0x61, 0xB1
ST, STX, TAX, TXA = 0x02, 0x03, 0x07, 0x87
ADD, ADD_X, AND, LSH_X, RSH, MOD = 0x04, 0x0C, 0x54, 0x6C, 0x74, 0x94
JUMP, JUMP_EQ, JUMP_EQ_X, JUMP_GT, JUMP_GE, JUMP_SET = 0x05, 0x15, 0x1D, 0x25, 0x35, 0x45
RETURN, RETURN_A = 0x06, 0x16

# Negative offsets with a meaning of their own: linux/filter.h. The first stands for skb->pkt_type.
PACKET_TYPE = 2**32 - 0x1000 + 4
NETWORK_HEADER = 2**32 - 0x100000
PACKET_HOST, PACKET_OUTGOING = 0, 4  # linux/if_packet.h

KEEP_ALL = 2**32 - 1


class Code:
    """An assembler: instructions in order, with named places for jumps to lead to."""

    __slots__ = ("_instructions", "_places", "_serial")

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, str, str]] = []
        self._places: dict[str, int] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._instructions)

    def do(self, code: int, k: int = 0) -> None:
        self._instructions.append((code, k, "", ""))

    def jump(self, code: int, k: int = 0, *, true: str = "", false: str = "") -> None:
        """A jump; an empty place is the next instruction."""
        self._instructions.append((code, k, true, false))

    def place(self, name: str) -> None:
        assert name not in self._places, name
        self._places[name] = len(self._instructions)

    def new_place(self) -> str:
        """A name that is not in use."""
        self._serial += 1
        return f"#{self._serial}"

    def assemble(self) -> bytes:
        """The program. Raises ValueError when it is too long."""
        if len(self._instructions) > INSTRUCTIONS_MAX:
            raise ValueError(f"{len(self._instructions)} instructions")
        return b"".join(self._encoded())

    def _encoded(self) -> Iterator[bytes]:
        for at, (code, k, true, false) in enumerate(self._instructions, 1):
            if code == JUMP:
                yield INSTRUCTION.pack(code, 0, 0, self._places[true] - at)
            else:
                skip_true, skip_false = (self._places[name] - at if name else 0 for name in (true, false))
                yield INSTRUCTION.pack(code, skip_true, skip_false, k)
