"""The supervisor's rings and arenas: who holds which descriptors, and that none is left over."""

import contextlib
import os
from collections.abc import Iterator

import pytest

from forwarder.mesh import Mesh, joined_fds
from workers.shm.segments import create_ring


@contextlib.contextmanager
def memory(content: bytes) -> Iterator[int]:
    """A memfd that was just written, as a worker sends it."""
    fd = os.memfd_create("test")
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    before = count_fds()
    made = Mesh(1 << 20)
    yield made
    made.close()
    assert count_fds() == before


def test_both_ends_of_a_ring_are_the_same_ring(mesh: Mesh) -> None:
    for slot in range(3):
        mesh.add(slot, 100 + slot)
    assert [(peer.slot, peer.serial) for peer in mesh.peers(1)] == [(0, 100), (2, 102)]
    near, far = mesh.peer(0, 2), mesh.peer(2, 0)
    assert near.to_peer == far.from_peer and near.from_peer == far.to_peer and near.to_peer != near.from_peer
    assert near.arena == mesh.arena(2)


def test_a_dead_workers_memory_is_closed_and_its_successors_is_new(mesh: Mesh) -> None:
    for slot in range(3):
        mesh.add(slot, 100 + slot)
    kept, before = mesh.peer(0, 2), count_fds()
    inode = os.fstat(mesh.arena(1)).st_ino
    mesh.remove(1)
    assert count_fds() == before - 1 - 4 * 3
    assert [peer.slot for peer in mesh.peers(0)] == [2]
    mesh.add(1, 200)
    assert count_fds() == before and os.fstat(mesh.arena(1)).st_ino != inode
    assert mesh.peer(0, 1).serial == 200 and mesh.peer(0, 2) == kept


def test_failure_half_way_leaves_nothing(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh.add(0, 1)
    mesh.add(1, 2)
    left = iter(range(3))

    def fail_at_the_last() -> object:
        if next(left, None) is None:
            raise OSError(24, "Too many open files")
        return create_ring()

    monkeypatch.setattr("forwarder.mesh.create_ring", fail_at_the_last)
    before = count_fds()
    with pytest.raises(OSError):
        mesh.add(2, 3)
    assert count_fds() == before and [peer.slot for peer in mesh.peers(0)] == [1]


def test_a_child_keeps_its_own_rings_and_every_arena(mesh: Mesh) -> None:
    for slot in range(4):
        mesh.add(slot, slot + 1)
    before = count_fds()
    mesh.close_in_child(0)
    assert count_fds() == before - 6 * 3  # both directions between 1, 2 and 3
    for peer in mesh.peers(0):
        for fd in joined_fds(peer):
            os.fstat(fd)
