"""A worker beside another of its end that has gone wrong: any descriptors, that name any slots, flows and sessions.

They are used, answered or dropped; nothing is raised, and at the end nothing is left.
"""

import os
import struct

from tests.fuzz.source import Source
from tests.fuzz.targets import session as streams
from tests.fuzz.world import CLIENT, FAR_BOOT, FAR_SERIAL, OTHER_SLOT, SERIAL, SERVER, SLOT, World, world
from workers.core import frame
from workers.io import mesh

STEPS_MAX = 120
DESCRIPTOR_KINDS = (
    mesh.OUT, mesh.BOUND, mesh.IN, mesh.FREE, mesh.CARRIERS, mesh.LOST, mesh.GONE, mesh.ROSTER, mesh.DRAIN, mesh.IDLE,
    mesh.STALLED, mesh.BROKEN, mesh.LOAD, mesh.POOL,
    mesh.REPLACED, mesh.SEATS, mesh.RELEASED, mesh.STARTED, mesh.TRAFFIC,
)  # fmt: skip


def run(data: bytes) -> None:
    """First byte: server or client; then steps."""
    source = Source(data)
    with world(source.choose((SERVER, CLIENT)), source, honest=False) as here:
        for _ in range(STEPS_MAX):
            if not len(source):
                break
            source.choose(STEPS)(here)
            here.turn()
            here.check()


def _flow(here: World) -> int:
    """One that there may be, or any."""
    source = here.source
    how = source.number()
    if how >= 240:
        return source.number(8)
    if how < 128 and here.session().share.streams:
        return source.choose(list(here.session().share.streams))
    end = here.session().share.end
    own, far = (SLOT, how & 1) if how & 2 else (OTHER_SLOT, how & 1)
    slots = (far, own) if end == frame.SERVER else (own, far)
    return frame.flow_id(frame.CLIENT, *slots, FAR_SERIAL if end == frame.SERVER else SERIAL, how >> 2 & 7)


def _describe(here: World) -> None:
    """A descriptor of any kind with fields that mean something, or any."""
    source = here.source
    if not here.alive:
        return
    kind = source.choose(DESCRIPTOR_KINDS)
    flags, how, slot = source.number() & 1, source.number(), source.number()
    number = source.number(8) if how & 7 == 7 else here.session().number + (how & 7 == 6)
    offset = source.number(1 if how & 24 else 8)
    length = source.number(2 if how & 32 else 1)
    carrier = source.number(1 if how & 64 else 4)
    if kind in (mesh.GONE, mesh.ROSTER, mesh.CARRIERS):
        value = (source.number() & 1) << 32 | FAR_SERIAL + source.number()
        flow = FAR_BOOT if how & 128 else source.number(8)
    else:
        value, flow = source.number(1 if how & 128 else 8), _flow(here)
    borrowed = here.borrowed()
    if kind in (mesh.BOUND, mesh.FREE) and borrowed and slot < 200:
        slot = source.choose(borrowed)
    elif slot >= 250:
        slot = source.number(4)
    _push(here, kind, flags, int(how == 255), slot, number, flow, offset, length, carrier, value, source.number())


def _push(here: World, *fields: int) -> None:
    here.producer.push(*fields)
    here.producer.flush()


def _bind(here: World) -> None:
    """The answer to one of our OUT, as a good worker gives it."""
    source = here.source
    outs = [each for each in here.heard if each[0] == mesh.OUT]
    if not outs or not here.alive:
        return
    out = source.choose(outs)
    here.heard.remove(out)
    _, _, tunnel, slot, number, flow, offset, _, _, kind, _ = out
    flags, index = source.number() & 1, 1 + 2 * (source.number() & 3)
    _push(here, mesh.BOUND, flags, tunnel, slot, number, flow, offset, 1 << 14, index, source.number() & 3, kind)


def _free(here: World) -> None:
    """A good worker returns a frame that was handed in to it."""
    ins = [each for each in here.heard if each[0] == mesh.IN]
    if ins and here.alive:
        handed = here.source.choose(ins)
        here.heard.remove(handed)
        _push(here, mesh.FREE, 0, 0, handed[3], 0, 0, 0, 0, 0, 0, 0)


def _hand_in(here: World) -> None:
    """A frame in the other worker's arena, with a descriptor that names it."""
    source = here.source
    if not here.alive:
        return
    content, slot = streams._frame(here), source.number() & 15
    os.pwrite(here.other_arena, content, slot * 4096)
    length = len(content) if source.flag() else source.number(2)
    kind = source.choose((mesh.IN, mesh.IN, mesh.OUT))
    _push(here, kind, 0, 0, slot, here.session().number, _flow(here), 0, length, 0, content[0] if content else 0, 0)


def _scribble(here: World) -> None:
    """Any bytes as descriptors."""
    if not here.alive:
        return
    raw = here.source.take(56).ljust(56, b"\0")
    _push(here, *struct.unpack("=BBHIQQQIIQQ", raw))


STEPS = (*streams.STEPS, _describe, _describe, _bind, _hand_in, _free, _scribble, World.lose_worker)
DESCRIBE, _, BIND, HAND_IN, FREE, SCRIBBLE, LOSE_WORKER = range(len(streams.STEPS), len(STEPS))

_CARRIERS = bytes((DESCRIBE, 4, 0, 0x88, 0, 0, 0, 0, 0, 0, 2, 0, 0, 2))
_OPEN_IN = bytes((HAND_IN, 0, 1, 0, 0, 0, 0, 1, 0, 0))
SEEDS = {
    "server-handed-in": b"\0" + _OPEN_IN + bytes((streams.GREEN, 1)) + bytes((HAND_IN, 1, 1, 0, 0, 0, 99, 2, 1, 0, 0)),
    "server-answers-elsewhere": b"\0" + _CARRIERS + _OPEN_IN + bytes((BIND, 0, 1, 0)),
    "server-guest": b"\0" + streams._CONNECT + bytes((HAND_IN, 0, 1, 0, 0, 0, 0, 1, 2, 200)),
    "server-hands-on": b"\0" + streams.SEEDS["server-others-flow"][1:] + bytes((FREE, 0)),
    "client-out": b"\1"
    + _CARRIERS
    + bytes((streams.OPEN, streams.APPLICATION, 0, 1, 50, BIND, 0, 1, 0, BIND, 0, 0, 0)),
    "client-worker-lost": b"\1" + _CARRIERS + bytes((streams.OPEN, streams.APPLICATION, 0, 1, 50, LOSE_WORKER)),
    "every-kind": b"\0"
    + streams._CONNECT
    + streams._OPEN
    + b"".join(bytes((DESCRIBE, kind, 1, 0xF8, 0, 1, 0, 1, 0, 1, 200, 1)) for kind in range(len(DESCRIPTOR_KINDS))),
    "session-of-no-key": b"\0" + bytes((DESCRIBE, 4, 0, 0xCE, 0, 0, 9, 2, 0, 0, 2)),
    "guest-of-one-byte": b"\0" + streams._CONNECT + bytes((DESCRIBE, 0, 0, 0xC8, 0, 0, 1, 0, 0, 4, 0)),
    "scribble": b"\0" + bytes((SCRIBBLE,)) + bytes(range(56)),
}
