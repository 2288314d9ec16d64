"""One target under Atheris, in a process to itself: `python -m tests.fuzz.engine TARGET [OPTION...] [CORPUS...]`.

What is to be covered is instrumented while it is imported, so nothing of it may be imported before.
"""

import gc
import logging
import sys

import atheris

INSTRUMENTED = ["forwarder", "workers", "tomllib"]


def main() -> None:
    """Ends with the run: 0, or libFuzzer's code for what it found."""
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        from tests.fuzz import targets  # noqa: PLC0415

        target = targets.load(sys.argv[1])
    gc.freeze()
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
