"""Log lines: text and JSON, always one line, never overwritten by what they tell."""

import errno
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from forwarder.errors import BootError
from forwarder.logs import (
    FileOutput,
    LineFormatter,
    LineHandler,
    Output,
    WorkerLines,
    WorkerOutput,
    _may_block,
    set_up,
)
from workers.settings import LogSettings


def record(message: str, *args: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("any", level, "file.py", 1, message, args, None)


def text(message: str, *args: object) -> str:
    line = LineFormatter("worker 1", json_lines=False).format(record(message, *args))
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO worker 1: ", line), line
    return line.split(": ", 1)[1]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), "a sentence"),
        (({"worker": 1, "serial": 7},), "a sentence worker=1 serial=7"),
        (({"error": "no such host", "host": ""},), 'a sentence error="no such host" host=""'),
        (({"odd": 'a="b"', "line": "1\n2"},), r'a sentence odd="a=\"b\"" line="1\n2"'),
        (({"peer": "[::1]:80", "name": "düne"},), "a sentence peer=[::1]:80 name=düne"),
    ],
)
def test_text_is_a_sentence_and_its_values(args: tuple[object, ...], expected: str) -> None:
    assert text("a sentence", *args) == expected


def test_text_stays_on_one_line() -> None:
    assert text("first\nsecond %d", 3) == "first\\nsecond 3"


def test_percent_in_a_sentence_with_values_is_just_that() -> None:
    assert text("100% of it", {"a": 1}) == "100% of it a=1"


def test_pairs_in_the_sentence_are_values_too() -> None:
    sentence = "cannot accept tunnel=%s reason=%s"
    assert text(sentence, "web", "no route to host") == 'cannot accept tunnel=web reason="no route to host"'
    parsed = json.loads(LineFormatter("worker 1", json_lines=True).format(record(sentence, "web", "a=b")))
    assert (parsed["message"], parsed["tunnel"], parsed["reason"]) == ("cannot accept", "web", "a=b")


def test_json_has_values_and_cannot_be_overwritten_by_them() -> None:
    values = {"worker": 1, "level": "mine", "path": Path("/x"), "text": "a\nb"}
    line = LineFormatter("supervisor", json_lines=True).format(record("a sentence", values))
    parsed = json.loads(line)
    assert "\n" not in line
    assert parsed.pop("time").endswith("Z")
    assert parsed == {
        "level": "info",
        "process": "supervisor",
        "message": "a sentence",
        "worker": 1,
        "path": "/x",
        "text": "a\nb",
    }


def test_traceback_is_one_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError as error:
        failed = record("it failed")
        failed.exc_info = (ValueError, error, error.__traceback__)
    line = LineFormatter("worker 1", json_lines=False).format(failed)
    assert "\n" not in line and line.endswith('ValueError: broken"')


class Flaky(Output):
    """Takes a line only while `open`."""

    def __init__(self) -> None:
        super().__init__()
        self.open = True
        self.lines: list[bytes] = []

    def _put(self, line: bytes) -> bool:
        if self.open:
            self.lines.append(line)
        return self.open


def test_lost_lines_are_counted_and_owned_up_to() -> None:
    output = Flaky()
    output.open = False
    for _ in range(3):
        output.write(b"lost\n")
    output.open = True
    output.write(b"back\n")
    output.write(b"again\n")
    assert output.lines == [b"(3 log lines were lost here)\nback\n", b"again\n"]


@pytest.mark.parametrize("style", ["text", "json"])
def test_lost_lines_are_told_in_the_log_s_own_form(style: Any) -> None:
    output = Flaky()
    before = logging.getLogger().handlers[:]
    try:
        set_up(LogSettings(format=style), output, "supervisor")
    finally:
        logging.getLogger().handlers[:] = before
    output.open = False
    output.write(b"lost\n")
    output.open = True
    output.write(b"back\n")
    told, back = output.lines[0].decode().splitlines()
    assert back == "back"
    if style == "json":
        assert {"level": "warning", "message": "log lines were lost", "lines": 1}.items() <= json.loads(told).items()
    else:
        assert told.endswith(" WARNING supervisor: log lines were lost lines=1")


def test_line_that_found_room_in_part_does_not_spoil_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = FileOutput(str(tmp_path / "log"))
    with monkeypatch.context() as patch:
        write = os.write
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        output.write(b"first\n")
    output.write(b"second\n")
    output.write(b"third\n")
    assert (tmp_path / "log").read_bytes() == b"fir\n(1 log lines were lost here)\nsecond\nthird\n"
    output.close()


def test_log_that_takes_nothing_is_told_once_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    output = FileOutput("/dev/full")
    for _ in range(3):
        output.write(b"line\n")
    output.close()
    told = "log file /dev/full: no space left on device: lines are lost until it takes them again\n"
    assert capfd.readouterr().err == told and output.lost == 3


def test_record_that_cannot_be_formatted_is_counted_not_raised() -> None:
    output = Flaky()
    handler = LineHandler(output)
    handler.setFormatter(LineFormatter("supervisor", json_lines=False))
    handler.emit(record("%d sentences", "no number"))
    assert output.lost == 1 and output.lines == []


def test_full_device_loses_lines_and_raises_nothing() -> None:
    output = FileOutput("/dev/full")
    output.write(b"line\n")
    assert output.lost == 1
    output.close()


def test_pipe_that_nobody_reads_does_not_block(tmp_path: Path) -> None:
    """A blocking descriptor, as standard error is."""
    reading, writing = os.pipe()
    output = FileOutput(None)
    output._fd, output._may_block = writing, _may_block(writing)
    for _ in range(1000):
        output.write(b"x" * 5000 + b"\n")
    assert output.lost > 900
    taken = os.read(reading, 1 << 20)
    assert len(taken) % 4096 == 0 and taken.count(b"\n") == len(taken) // 4096
    output.close()
    os.close(reading)


def test_rotated_file_is_reopened(tmp_path: Path) -> None:
    output = FileOutput(str(tmp_path / "log"))
    output.write(b"1\n")
    (tmp_path / "log").rename(tmp_path / "log.1")
    output.write(b"2\n")
    output.reopen()
    output.write(b"3\n")
    assert (tmp_path / "log.1").read_bytes() == b"1\n2\n" and (tmp_path / "log").read_bytes() == b"3\n"
    output.close()


def test_standard_error_goes_where_the_log_goes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    before = os.dup(2)
    output = FileOutput(str(path))
    try:
        output.take_standard_error()
        os.write(2, b"last words\n")
        rotated = path.rename(tmp_path / "log.1")
        output.reopen()
        os.write(2, b"more of them\n")
    finally:
        os.dup2(before, 2)
        os.close(before)
        output.close()
    assert (rotated.read_bytes(), path.read_bytes()) == (b"last words\n", b"more of them\n")


def test_reopen_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    output = FileOutput(str(tmp_path / "dir" / "log"))
    (tmp_path / "dir").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        output.reopen()
    output.write(b"still\n")
    assert (tmp_path / "moved" / "log").read_bytes() == b"still\n"
    output.close()


def test_log_file_that_cannot_be_opened_is_a_boot_error(tmp_path: Path) -> None:
    with pytest.raises(BootError, match="cannot open") as refused:
        FileOutput(str(tmp_path / "no" / "log"))
    assert refused.value.code == 78


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 77), (errno.EPERM, 77), (errno.ENOSPC, 69), (errno.EROFS, 69), (errno.EISDIR, 78)],
)
def test_exit_code_says_why_the_log_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BootError) as refused:
        FileOutput("log")
    assert refused.value.code == code


def test_workers_lines_arrive_whole_and_a_flood_is_counted() -> None:
    lines, output = WorkerLines(), Flaky()
    sender = WorkerOutput(lines.sender)
    sender.write(b"x" * 100_000)
    sender.write(b"short\n")
    for _ in range(10_000):
        sender.write(b"flood\n")
    assert sender.lost > 1000
    lines.pass_on(output, lines_max=2)
    assert len(output.lines[0]) == 32768 and output.lines[0].endswith(b"x\n")
    assert output.lines[1:] == [b"short\n"]
    lines.pass_on(output, lines_max=100_000)
    assert set(output.lines[2:]) == {b"flood\n"}
    lines.close()
