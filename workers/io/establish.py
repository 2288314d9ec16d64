"""From a finished handshake to a stripe: the same at both ends."""

import socket

from workers.core import frame
from workers.core.noise import Suite
from workers.core.record import Opener, Sealer
from workers.io import sockets
from workers.io.context import Context, clock_us
from workers.io.stripe import Stripe
from workers.settings import StripeTunnel

SUITES = {"aes256gcm": Suite.AES256GCM, "chacha20poly1305": Suite.CHACHA20POLY1305}


def record_keys(context: Context, split: tuple[bytes, bytes]) -> tuple[Sealer, Opener]:
    """The record layers of a carrier. `split`: (key to send with, key to receive with) of its handshake."""
    suite = SUITES[context.settings.suite]
    send_key, receive_key = split
    return Sealer(send_key, suite), Opener(receive_key, suite, frame.MAX_PAYLOAD_BYTES + frame.HEADER_BYTES)


def make_stripe(
    context: Context, tunnel: StripeTunnel, sock: socket.socket, index: int, keys: tuple[Sealer, Opener]
) -> Stripe:
    """The stripe that owns `sock` from now on. Raises OSError if the socket is broken already."""
    sockets.prepare_stripe(sock, tunnel.congestion)
    return Stripe(
        context.loop,
        sock,
        index,
        keys,
        context.memory,
        context.staging,
        frame_max_bytes=tunnel.frame_max_bytes,
        now_us=clock_us(),
    )
