"""A worker whose peer is authenticated and hostile: any frames on any stripes, cut anywhere, to the real session.

It raises nothing, every frame that it sends is a valid one, and at the end nothing is left: no slot, credit or socket.
"""

from tests.fuzz.source import Source
from tests.fuzz.world import CLIENT, FAR_SERIAL, OTHER_SLOT, SERIAL, SERVER, SLOT, World, world
from workers.core import frame
from workers.io.server import ServerTunnel

STEPS_MAX = 120
KINDS = (frame.OPEN, frame.DATA, frame.DATA, frame.DATA, frame.FIN, frame.RESET, frame.ACK, frame.GONE, frame.PING,
         frame.PONG, frame.DRAIN, frame.MOVE)  # fmt: skip
BURST = 8


def run(data: bytes) -> None:
    """First byte: server or client; then steps."""
    source = Source(data)
    with world(source.choose((SERVER, CLIENT)), source) as here:
        for _ in range(STEPS_MAX):
            if not len(source):
                break
            source.choose(STEPS)(here)
            here.turn()
            here.check()


def _connect(here: World) -> None:
    if len(here.carriers) < 8:
        here.connect(2 * (here.source.number() & 7))


def _shake_hands(here: World) -> None:
    """From the first byte on, in pieces."""
    if isinstance(here.tunnel, ServerTunnel) and len(here.carriers) < 8:
        first = frame.pack(frame.PING, 0, 0, 0, 1) if here.source.flag() else _frame(here)
        here.shake_hands(here.source.number(), first, here.source.pieces)


def _hear(here: World) -> None:
    """Some frames on one stripe, in one piece or in several."""
    source = here.source
    if not here.carriers:
        here.connect(0)
    carrier = source.choose(here.carriers)
    records = b"".join(carrier.record(_frame(here)) for _ in range(1 + source.number() % BURST))
    if source.flag():
        for piece in source.pieces(records):
            here.deliver(carrier, piece)
    else:
        here.deliver(carrier, records)


def _frame(here: World) -> bytes:
    source = here.source
    kind, flags, counter = source.choose(KINDS), source.number(), source.number()
    if flags >= 248:
        return source.block()
    worker = OTHER_SLOT if flags & 64 else SLOT
    end = here.session().share.end
    slots = (counter & 1, worker) if end == frame.SERVER else (worker, counter & 1)
    flow = frame.flow_id(frame.CLIENT, *slots, FAR_SERIAL if end == frame.SERVER else SERIAL, counter >> 1)
    offset, size = _place(here, flow), 0
    serial = source.number(4) if flags & 128 else SERIAL
    if kind == frame.DATA:
        size = source.number(source.choose((1, 1, 2)))
    if kind == frame.ACK:
        ranges = tuple((offset + 1 + 20 * n, offset + 10 + 20 * n) for n in range(flags >> 2 & 7))
        ack = frame.Ack(offset, offset + source.number(3), source.number(2), ranges)
        return frame.pack_ack(flags & 1, serial, flow, ack)
    return frame.pack(kind, flags & (3 if kind == frame.DATA else 1), serial, flow, offset) + bytes(size)


def _place(here: World, flow: int) -> int:
    """Where the stream is, near that, or anywhere below 2^64 with room for ranges."""
    how = here.source.number()
    stream = here.session().share.streams.get(flow)
    if stream is None or how >= 240:
        return here.source.number(1 if how < 252 else 4)
    edges = (stream.received.next_offset, stream.highest, stream.sent.next_offset, stream.sent.acknowledged)
    return edges[how & 3] + (how >> 2 & 7) * (how >> 5)


def _garbage(here: World) -> None:
    if here.carriers:
        here.deliver(here.source.choose(here.carriers), here.source.block())


def _end(here: World) -> None:
    if here.carriers:
        here.end(here.source.choose(here.carriers))


def _make_room(here: World) -> None:
    if here.carriers:
        here.make_room(here.source.choose(here.carriers), here.source.choose((0, 1, 100, 1 << 30)))


STEPS = (
    _hear,
    _connect,
    _shake_hands,
    _garbage,
    _end,
    _make_room,
    World.pass_time,
    World.run_greenlets,
    World.touch_application,
    World.open,
)
HEAR, CONNECT, HANDS, GARBAGE, END, ROOM, TIME, GREEN, APPLICATION, OPEN = range(len(STEPS))
_K_OPEN, _K_DATA, _K_FIN, _K_RESET, _K_ACK, _K_GONE, _K_PING, _K_PONG, _K_DRAIN, _K_MOVE = (
    0,
    1,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
)

_CONNECT = bytes((CONNECT, 0))
_OPEN = bytes((HEAR, 0, 0, _K_OPEN, 1, 0, 0, 0, 0))
_ATTACH = bytes((GREEN, 1))
_DATA = bytes((HEAR, 0, 0, _K_DATA, 1, 0, 0, 0, 200, 0))
_FIN = bytes((HEAR, 0, 0, _K_FIN, 1, 0, 0, 0))
_ACK = bytes((HEAR, 0, 0, _K_ACK, 0, 0, 2, 0, 255, 255, 1, 0, 0))
SEEDS = {
    "server-conversation": b"\0"
    + _CONNECT
    + _OPEN
    + _ATTACH
    + _DATA * 2
    + bytes((APPLICATION, 0, 1, 20))
    + _ACK
    + _FIN,
    "server-refused": b"\0" + _CONNECT + _OPEN + bytes((GREEN, 0)) + _DATA,
    "server-before-target": b"\0" + _CONNECT + _OPEN + _DATA + _FIN + _ATTACH + bytes((APPLICATION, 0, 2)),
    "server-handshake": b"\0" + bytes((HANDS, 1, 0, 20, 200, 30)) + _OPEN + _ATTACH,
    "server-handshake-open": b"\0" + bytes((HANDS, 0, _K_OPEN, 1, 0, 0, 0)) + _ATTACH + _DATA,
    "server-handshake-others": b"\0" + bytes((HANDS, 1, 1)),
    "server-garbage": b"\0" + _CONNECT + _OPEN + bytes((GARBAGE, 0, 24)) + bytes(24),
    "server-stripes-end": b"\0" + _CONNECT + bytes((CONNECT, 1)) + _OPEN + bytes((END, 0)) + _DATA + bytes((END, 0)),
    "server-deaf-peer": b"\0" + _CONNECT + bytes((ROOM, 0, 0)) + (_OPEN + _FIN) * 3 + bytes((ROOM, 0, 3)),
    "server-others-flow": b"\0" + _CONNECT + bytes((HEAR, 0, 0, _K_OPEN, 65, 0, 0, 0, 0)) + bytes((TIME, 2)),
    "server-carrier-frames": b"\0"
    + _CONNECT
    + b"".join(bytes((HEAR, 0, 0, kind, 0, 0, 0, 0)) for kind in (_K_GONE, _K_PING, _K_PONG, _K_DRAIN)),
    "server-times": b"\0" + _CONNECT + _OPEN + _ATTACH + bytes((TIME, 1, TIME, 2, TIME, 4, TIME, 4, TIME, 4)),
    "client-conversation": b"\1" + _CONNECT + bytes((OPEN, APPLICATION, 0, 1, 20)) + _ACK + _DATA + _FIN,
    "client-opened-to": b"\1" + _CONNECT + _OPEN + _DATA,
    **{
        f"{end}-moves": bytes((first,))
        + _CONNECT
        + bytes((CONNECT, 1, HEAR, 0, 0, _K_MOVE, 0, 0, 0, 0, TIME, 1, CONNECT, 0, TIME, 2, END, 0, TIME, 3))
        for first, end in enumerate(("server", "client"))
    },
    "client-roams": b"\1" + _CONNECT + bytes((OPEN, APPLICATION, 0, 1, 200, END, 0, CONNECT, 1, TIME, 3)) + _ACK,
}
