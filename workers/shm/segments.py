"""Making the memory and the eventfds; the supervisor does this and hands them to the workers.

Every error is the kernel's OSError as it came (EMFILE, ENFILE, ENOMEM, EFBIG under RLIMIT_FSIZE).
"""

import fcntl
import os

from workers.boot import RingFds
from workers.shm.layout import DESCRIPTOR, RING_CAPACITY


def create_arena(size_bytes: int) -> int:
    """A sealed, sparse memfd for one worker's arena; `arena_size` says how large. The caller owns the descriptor."""
    return _create_memory("forwarder-arena", size_bytes)


def create_ring(capacity: int = RING_CAPACITY) -> RingFds:
    """The three descriptors of one ring, both eventfds at 0: the producer is born with all the space."""
    opened: list[int] = []
    try:
        opened.append(_create_memory("forwarder-ring", capacity * DESCRIPTOR.size))
        for _ in range(2):
            opened.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    except OSError:
        for descriptor in opened:
            os.close(descriptor)
        raise
    memory, published, freed = opened
    return RingFds(memory, published, freed)


def close_ring(fds: RingFds) -> None:
    """Close this process's three descriptors; mappings stay."""
    for descriptor in (fds.memory, fds.published, fds.freed):
        os.close(descriptor)


def _create_memory(name: str, size_bytes: int) -> int:
    memory = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, size_bytes)
        # Nobody can shrink it afterwards, so touching a mapping never ends in SIGBUS.
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(memory)
        raise
    return memory
