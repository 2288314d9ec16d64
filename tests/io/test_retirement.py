"""When a worker that is followed by another may go."""

from types import SimpleNamespace
from typing import Any, cast

from workers.core import frame
from workers.io.retirement import LINGER_US, Retirement
from workers.io.session import Session

TICK_US = 100_000


class Place:
    """A worker with one session and one tunnel, as far as a retirement asks for them."""

    def __init__(self) -> None:
        self.streams: dict[int, object] = {}
        self.connections: list[object] = []
        self.tunnel = SimpleNamespace(is_busy=False)
        share = SimpleNamespace(streams=self.streams, end=frame.SERVER)
        session: Any = SimpleNamespace(share=share, stripes={}, parting=[])
        self.now_us = 0
        sessions = [cast(Session, session)]
        self.retirement = Retirement(lambda: sessions, lambda: [self.tunnel], self.connections, 0)

    def goes_within(self, time_us: int) -> bool:
        for _ in range(time_us // TICK_US):
            self.now_us += TICK_US
            if self.retirement.is_over(self.now_us):
                return True
        return False


def test_idle_worker_goes_when_nothing_more_can_be_under_way() -> None:
    place = Place()
    assert not place.goes_within(LINGER_US)
    assert place.goes_within(TICK_US)


def test_worker_stays_for_streams_connections_and_tunnels() -> None:
    place = Place()
    place.streams[1] = place
    assert not place.goes_within(3 * LINGER_US)
    place.connections.append(place.streams.pop(1))
    assert not place.goes_within(3 * LINGER_US), "the stream has ended, and its application has not read all"
    place.connections.clear()
    place.tunnel.is_busy = True
    assert not place.goes_within(3 * LINGER_US)
    place.tunnel.is_busy = False
    assert not place.goes_within(LINGER_US)
    assert place.goes_within(TICK_US)
