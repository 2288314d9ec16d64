"""Which sessions a server takes in."""

from types import SimpleNamespace
from typing import Any

import pytest

from workers.io import server
from workers.io.server import ServerTunnel


class Session:
    def __init__(self, context: Any, tunnel: Any, end: int, number: int, key_index: int, *, max_streams: int) -> None:
        self.key_index = key_index


def tunnel(monkeypatch: pytest.MonkeyPatch, *, keys: int, max_sessions: int) -> ServerTunnel:
    monkeypatch.setattr(server, "ServerSession", Session)
    context: Any = SimpleNamespace(
        loop=None, draining=False, retiring=False, is_leaving=False, settings=SimpleNamespace(keys=[None] * keys)
    )
    settings: Any = SimpleNamespace(name="web", handshake_timeout_s=1.0, max_sessions=max_sessions, max_streams=10)
    return ServerTunnel(context, settings, [], {})


def fill(made: ServerTunnel, key_index: int) -> int:
    """How many sessions that key gets when it wants as many as it can get."""
    first = len(made.by_number)
    while made.create(len(made.by_number), key_index) is not None:
        assert len(made.by_number) <= made.tunnel.max_sessions
    return len(made.by_number) - first


def test_only_key_may_have_all_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fill(tunnel(monkeypatch, keys=1, max_sessions=9), 0) == 9


def test_no_key_takes_all_sessions_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tunnel(monkeypatch, keys=4, max_sessions=1000)
    assert [fill(made, key) for key in range(4)] == [500, 250, 125, 63]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_few_sessions_are_used_all_the_same(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    made = tunnel(monkeypatch, keys=3, max_sessions=most)
    assert sum(fill(made, key) for key in range(3)) == most


def test_session_that_is_there_is_found_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tunnel(monkeypatch, keys=2, max_sessions=4)
    fill(made, 0)
    assert made.create(0, 0) is made.by_number[0]
