"""`python -m tests.fuzz [--seconds N] [--keep] [TARGET...]`: fuzz the targets one after the other.

For each: executions, coverage (edges and features, as libFuzzer counts them) and findings. A finding is saved, its
traceback printed, and the exit code is 1.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz import corpus, targets

SECONDS = 60
RSS_MAX_MB = 1024
INPUT_MAX_BYTES = 4096
EXECUTION_MAX_S = 120
GRACE_S = 120
"""A run that goes on for so long after its time is stuck."""

_STATUS = re.compile(r"^#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)/\S+", re.MULTILINE)
_EXECUTED = re.compile(r"^stat::number_of_executed_units:\s+(\d+)", re.MULTILINE)
_PEAK = re.compile(r"^stat::peak_rss_mb:\s+(\d+)", re.MULTILINE)
_PROBLEM = re.compile(r"^ ?=== Uncaught Python exception.*|^==\d+== ?ERROR:.*", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a target's run went. `problem`: what libFuzzer or Python said, empty if there was no finding."""

    executions: int
    edges: int
    features: int
    peak_mb: int
    problem: str


def fuzz(name: str, seconds: int, found: Path, findings: Path) -> Outcome:
    """Run one target; what it finds worth keeping goes to `found`, an input that fails to `findings`."""
    command = [
        *(sys.executable, "-m", "tests.fuzz.engine", name),
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={RSS_MAX_MB}",
        f"-max_len={INPUT_MAX_BYTES}",
        f"-timeout={EXECUTION_MAX_S}",
        f"-artifact_prefix={findings}/{name}-",
        "-print_final_stats=1",
        *(str(found), str(corpus.ROOT / name)),
    ]
    try:
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", errors="replace", timeout=seconds + GRACE_S,
        )  # fmt: skip
        said, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return _outcome(said, f"did not end within {seconds + GRACE_S} s")
    return _outcome(said, _problem(said, code) if code else "")


def _problem(said: str, code: int) -> str:
    start = _PROBLEM.search(said)
    return said[start.start() :][:4000] if start else f"exit code {code}\n{said[-2000:]}"


def _outcome(said: str, problem: str) -> Outcome:
    status = _STATUS.findall(said)
    executions, edges, features, _ = map(int, status[-1]) if status else (0, 0, 0, 0)
    executed, peak = _EXECUTED.findall(said), _PEAK.findall(said)
    return Outcome(int(executed[-1]) if executed else executions, edges, features, int((peak or ["0"])[-1]), problem)


def run_all(names: Sequence[str], seconds: int, keeping: bool, findings: Path) -> int:
    """Exit code: 1 if anything was found."""
    found_any = False
    print(f"{'target':10} {'executions':>12} {'edges':>7} {'features':>9} {'peak MB':>8} {'corpus':>7}  findings")
    for name in names:
        target = targets.load(name)
        with tempfile.TemporaryDirectory(prefix="forwarder-fuzz-") as work:
            found = Path(work)
            outcome = fuzz(name, seconds, found, findings)
            added = corpus.keep(target, found.iterdir()) if keeping and not outcome.problem else 0
        size = len(list(corpus.directory(target).iterdir()))
        print(
            f"{name:10} {outcome.executions:12,} {outcome.edges:7} {outcome.features:9} {outcome.peak_mb:8}"
            f" {size:4}{f'+{added}' if added else '':3}  {'1' if outcome.problem else '0'}",
            flush=True,
        )
        if outcome.problem:
            found_any = True
            print(f"{outcome.problem.strip()}\nthe input is in {findings}/{name}-*", flush=True)
    return int(found_any)


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the parsers.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of: {' '.join(targets.NAMES)} (default: all)")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"for each target (default {SECONDS})")
    parser.add_argument("--keep", action="store_true", help="add to the corpus what reaches something new")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="where to save inputs that fail")
    parser.add_argument("--seeds", action="store_true", help="write the seeds into the corpus, and end")
    options = parser.parse_args()
    unknown = set(options.targets) - set(targets.NAMES)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {' '.join(targets.NAMES)}")
    names = options.targets or targets.NAMES
    if options.seeds:
        for name in names:
            corpus.write_seeds(targets.load(name))
        return 0
    if find_spec("atheris") is None:
        print("make fuzz needs Atheris: it is not installed, and has wheels for CPython 3.11 to 3.14 on Linux only")
        return 2
    findings = options.findings.resolve()
    findings.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTHONHASHSEED", "0")
    logging.disable(logging.CRITICAL)
    return run_all(names, options.seconds, options.keep, findings)


if __name__ == "__main__":
    sys.exit(main())
