"""`python -m tests.bench`: exit code 0 if every figure came about."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from rich.console import Console

from tests.bench import datagrams, limited, loss, plot, readme, speed, ways
from tests.bench.machine import machine
from tests.bench.measure import BenchError, programs_missing
from tests.bench.section import Section
from tests.bench.table import Table, read_json, write_json, write_markdown
from tests.netlab import LabError

LIMITED_S, SPEED_S = 20, 8
MINUTES = 90
ORDER = ("limited", "loss", "speed", "trips", "datagrams")
_WIDTH = 120
"""What a table takes; a narrower terminal wraps it."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """What is measured in one lab. `seconds`: how long one measurement takes unless told otherwise; `duration_s`: about
    how long all of it takes, by rounds and seconds."""

    tables: tuple[str, ...]
    seconds: int
    duration_s: Callable[[int, int], float]
    measure: Callable[[Section], list[Table]]


def main() -> int:
    congestion = ways.best_congestion()
    limits = {f"limited-{count or 'auto'}": count for count in limited.COUNTS}
    losses = {f"loss-{algorithm}": algorithm for algorithm in loss.ALGORITHMS}
    contenders = {each.row: each for each in speed.contenders(congestion)}
    sprays = {each.row: each for each in datagrams.contenders()}
    options = _options([*limits, *losses, *contenders, *sprays])
    progress = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        progress.print(text, markup=False)

    parts: list[Part] = []
    if counts := [count for row, count in limits.items() if row in options.rows]:
        duration = partial(limited.duration_s, counts)
        parts.append(Part(("limited",), LIMITED_S, duration, lambda section: [limited.table(counts, section)]))
    if algorithms := [each for row, each in losses.items() if row in options.rows]:
        duration, there = partial(loss.duration_s, algorithms), ways.congestions()
        parts.append(Part(("loss",), loss.SECONDS, duration, lambda section: [loss.table(algorithms, there, section)]))
    if wanted := [each for row, each in contenders.items() if row in options.rows]:
        duration = partial(speed.duration_s, wanted)
        parts.append(
            Part(("speed", "trips"), SPEED_S, duration, lambda section: speed.tables(wanted, congestion, section))
        )
    if sprayed := [each for row, each in sprays.items() if row in options.rows]:
        duration = partial(datagrams.duration_s, sprayed)
        parts.append(
            Part(("datagrams",), datagrams.SECONDS, duration, lambda section: [datagrams.table(sprayed, section)])
        )
    try:
        return _run(parts, options, say, Console(width=max(progress.width, _WIDTH), highlight=False))
    except (BenchError, OSError) as error:
        say(f"make bench: {error}")
        return 1


def _run(parts: list[Part], options: argparse.Namespace, say: Say, console: Console) -> int:
    if missing := programs_missing("iperf3", "ss", "ip"):
        raise BenchError(f"no {' and no '.join(missing)} here")
    host = machine()
    tables = {table.name: table for table in (read_json(options.earlier, host) if options.earlier else [])}
    planned = {name for part in parts for name in part.tables}
    if options.readme and (missing := [name for name in ORDER if name not in planned | tables.keys()]):
        raise BenchError(f"README shows all tables, and these would be missing: {', '.join(missing)}")
    drawn = options.plot or (readme.ROOT / readme.PLOT if options.readme else None)
    if drawn and not plot.AVAILABLE:
        say("make bench: no matplotlib here (deploy/venv bench), so no plot")
        drawn = None
    done, complete = _measure(parts, options, say)
    for table in done:
        table.print(console)
        tables[table.name] = table
    shown = [tables[name] for name in ORDER if name in tables]
    if options.json:
        write_json(options.json, host, shown)
    if options.markdown:
        write_markdown(options.markdown, host, shown)
    if drawn:
        plot.draw(shown, drawn)
    if options.readme and len(shown) == len(ORDER):
        readme.fill(readme.README, host, shown, plot=drawn is not None)
    return 0 if complete and not any(table.left_out for table in done) else 1


def _measure(parts: list[Part], options: argparse.Namespace, say: Say) -> tuple[list[Table], bool]:
    """What came about, and whether that is all."""
    until = time.monotonic() + 60 * options.minutes
    about_s = sum(part.duration_s(options.rounds, options.seconds or part.seconds) for part in parts)
    if parts:
        say(f"about {about_s / 60:.0f} minutes")
    done: list[Table] = []
    complete = True
    try:
        for part in parts:
            section = Section(options.rounds, options.seconds or part.seconds, say, until)
            try:
                done += part.measure(section)
            except (LabError, BenchError, OSError) as error:
                say(f"make bench: {error}")
                complete = False
    except KeyboardInterrupt:
        say("make bench: interrupted")
        complete = False
    return done, complete


def _options(rows: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=f"Rows: {', '.join(rows)}.",
        epilog=f"All rows take about an hour; with --rounds 1 --seconds 3 about ten minutes. After {MINUTES} minutes "
        f"(--minutes) nothing more is begun.",
    )
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many counts (default 3)")
    parser.add_argument(
        "--seconds",
        type=int,
        help=f"how long each is measured (default {LIMITED_S}, with loss {loss.SECONDS}, without a limit {SPEED_S}, "
        f"of datagrams {datagrams.SECONDS})",
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="begin nothing after so long (default %(default)s)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot there, as SVG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--from",
        type=Path,
        dest="earlier",
        metavar="FILE",
        help="take figures from there (--json of an earlier run); only tables with a ROW named here are measured again",
    )
    parser.add_argument("--readme", action="store_true", help=f"write tables and plot into README.md and {readme.PLOT}")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="only these; patterns like 'limited-*' (default all)")
    options = parser.parse_args()
    patterns = options.rows or ([] if options.earlier else ["*"])
    options.rows = [row for row in rows if any(fnmatch(row, pattern) for pattern in patterns)]
    if patterns and not options.rows:
        parser.error(f"no such row: {' '.join(patterns)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
