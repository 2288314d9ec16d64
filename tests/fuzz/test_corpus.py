"""Replays the corpus: what a fuzzer found once stays found."""

import pytest

from tests.fuzz import corpus, targets


@pytest.mark.parametrize("name", targets.NAMES)
def test_corpus_replays(name: str) -> None:
    target = targets.load(name)
    files = sorted(corpus.directory(target).iterdir())
    assert files
    for file in files:
        try:
            target.run(file.read_bytes())
        except Exception as error:
            error.add_note(f"input: {file}")
            raise


@pytest.mark.parametrize("name", targets.NAMES)
def test_corpus_holds_the_seeds_and_is_small(name: str) -> None:
    target = targets.load(name)
    held = {file.name: file.read_bytes() for file in corpus.directory(target).iterdir()}
    assert target.seeds.items() <= held.items(), "make fuzz ARGS=--seeds writes them"
    assert len(held) <= corpus.KEPT_MAX + len(target.seeds)
    assert all(len(data) <= corpus.KEPT_BYTES_MAX for data in held.values())
