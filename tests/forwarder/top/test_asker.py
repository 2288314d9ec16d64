"""One question to a control socket, without waiting."""

import json
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from forwarder.top.asker import TIMEOUT_S, Answer, Asker
from tests.forwarder.test_render import ANSWER


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        yield sock


def answered(asker: Asker) -> Answer:
    """What comes of a question that is under way."""
    while True:
        assert asker.socket is not None and select.select([asker.socket], [], [], 5)[0]
        answer = asker.on_readable()
        if answer is not None:
            assert asker.socket is None
            return answer


def test_question_is_answered_in_parts(path: Path, listener: socket.socket) -> None:
    asker = Asker(path)
    for _ in range(2):
        assert asker.ask(100.0) is None and asker.deadline_s == 100.0 + TIMEOUT_S
        peer, _ = listener.accept()
        assert json.loads(peer.recv(1000)) == {"command": "status"}
        assert asker.on_readable() is None
        line = json.dumps(ANSWER).encode() + b"\n"
        peer.sendall(line[:50])
        assert select.select([asker.socket], [], [], 5)[0] and asker.on_readable() is None
        peer.sendall(line[50:])
        status = answered(asker).status
        assert status is not None and status.pid == 4242
        peer.close()


@pytest.mark.parametrize(
    ("sent", "silence"),
    [
        (b"", "the instance gave no answer"),
        (b'{"workers": 1}\n', "the answer is not one of this version"),
        (b"\xff\n", "the answer is not one of this version"),
        (b'{"role": "cl', "the answer is not one of this version"),
    ],
)
def test_what_is_no_answer_is_told(path: Path, listener: socket.socket, sent: bytes, silence: str) -> None:
    asker = Asker(path)
    assert asker.ask(0.0) is None
    peer, _ = listener.accept()
    peer.recv(1000)
    peer.sendall(sent)
    peer.close()
    status, said = answered(asker)
    assert status is None and said.startswith(silence) and said.isprintable()


def test_nobody_is_there(path: Path, listener: socket.socket) -> None:
    assert Asker(path.with_name("none.sock")).ask(0.0) == Answer(
        None, f"no instance is running (control socket {path.with_name('none.sock')})"
    )
    listener.close()
    asker = Asker(path)
    assert asker.ask(0.0) == Answer(None, f"no instance is running (control socket {path})")
    assert asker.socket is None
    path.unlink()
    path.write_text("")
    assert asker.ask(0.0) is not None


def test_nothing_comes_for_too_long(path: Path, listener: socket.socket) -> None:
    asker = Asker(path)
    asker.ask(0.0)
    assert asker.on_time() == Answer(None, f"no answer within 10 s (control socket {path})")
    assert asker.socket is None
    asker.close()
