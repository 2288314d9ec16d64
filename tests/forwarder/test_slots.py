"""What the supervisor makes of a worker's packets."""

import os
import socket

import msgspec
import pytest

from forwarder.slots import Worker
from workers.boot import Ready

DEEP = b"\x82\xa4type\xa5ready\xa1x" + b"\x91" * 9999 + b"\xc0"
NO_TEXT = msgspec.msgpack.encode(Ready()).replace(b"ready", b"r\xffady")


@pytest.mark.parametrize("packet", [b"\xc1", NO_TEXT, DEEP], ids=["no msgpack", "no text", "nested"])
def test_packet_that_is_no_message_is_an_error_and_leaves_no_descriptor(packet: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        socket.send_fds(theirs, [packet], [theirs.fileno()])
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ValueError):
            next(Worker(0, 1, -1, ours).receive())
        assert os.listdir("/proc/self/fd") == before
