"""What a peer can make a share keep while nothing can be sent to it."""

import pytest

from tests.core.transcript import CLIENT_SERIAL, Side, opening, reset, server
from workers.core import frame
from workers.core.closed import MAX_GAPS
from workers.core.errors import RemoteProtocolError
from workers.core.sending import MAX_ANSWERS


def test_streams_opened_and_reset_by_a_peer_that_reads_nothing_are_refused_at_last() -> None:
    side = Side(frame.SERVER, max_streams=100)
    for counter in range(2 * MAX_ANSWERS):
        flow = frame.flow_id(frame.CLIENT, 0, 0, CLIENT_SERIAL, counter)
        side.hears(opening(frame.OPEN, flow=flow), reset(flow=flow))
    assert len(side.share.acks) <= MAX_ANSWERS + 1
    assert len(side.share.answers) <= MAX_ANSWERS
    assert side.share.refused_streams
    side.says(most=10 * MAX_ANSWERS)
    side.hears(opening(frame.OPEN, flow=frame.flow_id(frame.CLIENT, 0, 0, CLIENT_SERIAL, 2 * MAX_ANSWERS)))
    assert side.share.streams, "a peer that reads again is served again"


def test_gaps_left_by_many_workers_count_together() -> None:
    """Each RESET that names every other stream of another worker leaves a gap to remember."""
    side = server()
    resets = 0
    with pytest.raises(RemoteProtocolError, match="gaps"):
        for counter in range(2 * MAX_GAPS):
            for slot in range(4):
                flow = frame.flow_id(frame.CLIENT, slot, 0, CLIENT_SERIAL, 5000 + 2 * counter)
                side.hears(reset(flow=flow))
                resets += 1
    assert MAX_GAPS <= resets <= MAX_GAPS + 4
