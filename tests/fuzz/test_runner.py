"""What decides which inputs are kept, and how a run is judged."""

from pathlib import Path

import pytest

from tests.fuzz import __main__ as runner
from tests.fuzz import corpus, targets
from tests.fuzz.source import Source
from workers.core import frame


def test_source_gives_zeros_and_nothing_at_its_end() -> None:
    source = Source(b"\2ab\7")
    assert (source.block(), source.number(), len(source)) == (b"ab", 7, 0)
    assert (source.number(4), source.block(), source.flag(), source.choose("xyz")) == (0, b"", False, "x")
    assert list(source.pieces(b"abc")) == [b"abc"]
    assert list(Source(b"\0\1").pieces(b"abcdef")) == [b"a", b"bc", b"def"]


def test_of_the_found_inputs_those_are_kept_that_do_something_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "ROOT", tmp_path / "corpus")
    (tmp_path / "corpus" / "frame").mkdir(parents=True)
    ack = frame.pack_ack(0, 0, 1, frame.Ack(1, 2, 3, ((5, 6),)))
    found = []
    for number, data in enumerate((b"", ack, ack[:-1] + b"\xff", b"x" * 10, ack + bytes(5000))):
        found.append(tmp_path / str(number))
        found[-1].write_bytes(data)
    target = targets.load("frame")
    assert corpus.keep(target, found) == 2
    kept = {file.read_bytes() for file in corpus.directory(target).iterdir()}
    assert ack in kept and kept & {b"", b"x" * 10}
    assert corpus.keep(target, found) == 0


def test_outcome_is_read_from_what_libfuzzer_says() -> None:
    said = (
        "#2\tINITED cov: 5 ft: 7 corp: 1/1b exec/s: 0 rss: 40Mb\n#4096\tpulse  cov: 30 ft: 42 corp: 22/1210b lim: 4\n"
        "stat::number_of_executed_units: 5000\nstat::peak_rss_mb:              41\n"
    )
    assert runner._outcome(said, "") == runner.Outcome(5000, 30, 42, 41, "")
    crash = " === Uncaught Python exception: ===\nKeyError: 1\n==7== ERROR: libFuzzer: fuzz target exited\n"
    assert runner._problem(said + crash, 77).startswith(" === Uncaught Python exception")
    assert "exit code 70" in runner._problem(said, 70)
