"""What records of a port carry: bytes, round trips, and everything that is rejected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core.inner import (
    CLOSE,
    CLOSE_INNER,
    COPY,
    DATA,
    FRAGMENT,
    PING,
    PONG,
    Fragment,
    Gathered,
    Opened,
    Pong,
    data_prefix,
    is_well_formed,
    opened_of,
    pack_copy,
    pack_fragment,
    pack_ping,
    pack_pong,
    unpack_copy,
    unpack_fragment,
    unpack_ping,
    unpack_pong,
)

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))


def test_inners_have_the_bytes_of_the_specification() -> None:
    assert data_prefix(0x0A0B0C0D).hex() == "010a0b0c0d"
    assert pack_fragment(1, Fragment(2, 3, 4, b"hi")).hex() == "02000000010000000203046869"
    assert pack_copy(1, 2, b"hi").hex() == "0300000001000000026869"
    assert pack_ping(5, 12).hex() == "040000000000000005000000"
    assert pack_pong(Pong(1, 2, 3, 4)).hex() == "05" + "0000000000000001000000000000000200000000000000030004"
    assert CLOSE_INNER.hex() == "06"


def opened(inner: bytes) -> Opened:
    item = opened_of(inner, 99)
    assert item is not None
    return item


@given(u32, u32, st.integers(2, 255), st.binary(min_size=1), st.data())
def test_fragment_comes_back(
    conversation: int, datagram: int, pieces: int, payload: bytes, data: st.DataObject
) -> None:
    fragment = Fragment(datagram, data.draw(st.integers(0, pieces - 1)), pieces, payload)
    item = opened(pack_fragment(conversation, fragment))
    assert item[:3] == (FRAGMENT, conversation, 99)
    assert unpack_fragment(item.payload) == fragment


@given(u32, u32, st.binary())
def test_copy_comes_back(conversation: int, sequence: int, payload: bytes) -> None:
    item = opened(pack_copy(conversation, sequence, payload))
    assert item[:3] == (COPY, conversation, 99)
    assert unpack_copy(item.payload) == (sequence, payload)


@given(u64, st.integers(0, 1400), u64, u64, u16)
def test_ping_and_pong_come_back(clock: int, padded: int, received: int, highest: int, size: int) -> None:
    inner = pack_ping(clock, padded)
    assert len(inner) == max(padded, 9)
    item = opened(inner)
    assert item[:3] == (PING, 0, 99)
    assert unpack_ping(item.payload) == clock
    pong = Pong(clock, received, highest, size)
    item = opened(pack_pong(pong))
    assert item[:3] == (PONG, 0, 99)
    assert unpack_pong(item.payload) == pong


def test_data_and_close_come_back() -> None:
    assert opened_of(data_prefix(7) + b"abc", 99) == Opened(DATA, 7, 3, b"abc")
    assert opened_of(data_prefix(7), 99) == Opened(DATA, 7, 0, b"")
    assert opened_of(CLOSE_INNER, 99) == Opened(CLOSE, 0, 99, b"")


WHOLE = {
    DATA: data_prefix(1),
    FRAGMENT: pack_fragment(1, Fragment(2, 0, 2, b"x")),
    COPY: pack_copy(1, 2, b""),
    PING: pack_ping(1),
    PONG: pack_pong(Pong(1, 2, 3, 4)),
    CLOSE: CLOSE_INNER,
}


@pytest.mark.parametrize("kind", WHOLE)
def test_every_truncation_is_malformed_and_a_tail_where_the_kind_has_no_payload(kind: int) -> None:
    whole = WHOLE[kind]
    assert is_well_formed(whole)
    assert not any(is_well_formed(whole[:end]) or opened_of(whole[:end], 99) for end in range(1, len(whole)))
    assert is_well_formed(whole + b"x") == (kind not in (PONG, CLOSE))


@pytest.mark.parametrize("kind", [0, 7, 255])
def test_unknown_kind_is_malformed(kind: int) -> None:
    assert opened_of(bytes([kind]) * 40, 99) is None


@pytest.mark.parametrize(("piece", "pieces"), [(0, 0), (0, 1), (2, 2), (255, 255), (3, 2)])
def test_fragment_out_of_range_is_malformed(piece: int, pieces: int) -> None:
    assert opened_of(pack_fragment(1, Fragment(2, piece, pieces, b"x")), 99) is None


def gather(inners: list[bytes], run_max: int = 64) -> list[Opened]:
    gathered = Gathered(run_max)
    assert all(gathered.take(inner, 99) for inner in inners)
    gathered.flush()
    return gathered.opened


@given(st.lists(st.tuples(st.integers(1, 2), st.sampled_from((0, 1, 2, 3))), max_size=30), st.integers(1, 6))
def test_gathered_datagrams_come_out_in_order_and_cut_at_their_size(
    datagrams: list[tuple[int, int]], run_max: int
) -> None:
    sent = [(conversation, bytes([number]) * size) for number, (conversation, size) in enumerate(datagrams)]
    out = []
    for kind, conversation, size, payload in gather([data_prefix(c) + data for c, data in sent], run_max):
        assert kind == DATA
        cut = [payload[at : at + size] for at in range(0, len(payload), size)] if size else [payload]
        assert len(cut) <= run_max
        out += [(conversation, piece) for piece in cut]
    assert out == sent
