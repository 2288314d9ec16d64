"""Fuzzing: every parser under a coverage-guided fuzzer, and the inputs that it found worth keeping.

- A target (`targets/`) is a function of some bytes that returns if all is well and raises if not; `SEEDS` are small
  valid inputs for it.
- `corpus/TARGET/` holds the seeds and what runs have added to them. The ordinary tests replay it all
  (`test_corpus.py`), which takes nothing but pytest.
- `make fuzz` runs targets under Atheris (libFuzzer), each in a process of its own, bounded in time, memory and size
  of input (`__main__.py`, `engine.py`).
"""
