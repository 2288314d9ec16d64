"""`python -m tests.bench`: exit code 0 if every figure came about."""

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from tests.bench import limited, speed, ways
from tests.bench.measure import programs_missing
from tests.bench.table import Table, write
from tests.netlab import LabError

_LIMITED_S, _SPEED_S = 20, 8
_WIDTH = 120
"""What a table takes; a narrower terminal wraps it."""


def main() -> int:
    congestion = ways.best_congestion()
    counts = {f"limited-{count}": count for count in limited.COUNTS}
    contenders = {each.row: each for each in speed.contenders(congestion)}
    options = _options([*counts, *contenders])
    progress = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        progress.print(text, markup=False)

    if missing := programs_missing("iperf3", "ss", "ip"):
        say(f"make bench: no {' and no '.join(missing)} here")
        return 1
    tables: list[Table] = []
    limited_wanted = [count for row, count in counts.items() if row in options.rows]
    speed_wanted = [each for row, each in contenders.items() if row in options.rows]
    try:
        if limited_wanted:
            tables.append(limited.table(limited_wanted, options.rounds, options.seconds or _LIMITED_S, say))
        if speed_wanted:
            tables.append(speed.table(speed_wanted, congestion, options.rounds, options.seconds or _SPEED_S, say))
    except (LabError, OSError) as error:
        say(f"make bench: {error}")
    except KeyboardInterrupt:
        say("make bench: interrupted")
    console = Console(width=max(progress.width, _WIDTH), highlight=False)
    for each in tables:
        each.print(console)
    write(tables, markdown=options.markdown, as_json=options.json)
    complete = len(tables) == bool(limited_wanted) + bool(speed_wanted)
    return 0 if complete and not any(each.left_out for each in tables) else 1


def _options(rows: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=f"Rows: {', '.join(rows)}.")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many counts (default 3)")
    parser.add_argument(
        "--seconds", type=int, help=f"how long each is measured (default {_LIMITED_S}, without a limit {_SPEED_S})"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="only these; patterns like 'limited-*' (default all)")
    options = parser.parse_args()
    patterns = options.rows or ["*"]
    options.rows = [row for row in rows if any(fnmatch(row, pattern) for pattern in patterns)]
    if not options.rows:
        parser.error(f"no such row: {' '.join(patterns)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
