"""Findings as text for people, and as JSON for programs."""

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from forwarder.doctor.finding import Finding, Status
from forwarder.doctor.mend import Mended

_STYLES = {
    Status.OK: "green",
    Status.SHORTFALL: "bold red",
    Status.HINT: "yellow",
    Status.UNKNOWN: "cyan",
    Status.NOT_APPLICABLE: "dim",
}
_SHOWN_LAST = (Status.UNKNOWN, Status.HINT, Status.SHORTFALL)
_PIPE_WIDTH = 120
_INDENT = 4


def count(findings: Iterable[Finding], status: Status) -> int:
    return sum(finding.status is status for finding in findings)


def as_json(findings: Sequence[Finding], mended: Mended | None) -> dict[str, Any]:
    """What `--json` prints; without `--fix`, "fixed" is null."""
    checks = [
        {
            "name": finding.name,
            "status": finding.status.value,
            "found": finding.found,
            "wanted": finding.wanted,
            "why": finding.why,
            "command": finding.command,
            "fixable": finding.setting is not None,
        }
        for finding in findings
    ]
    fixed = None
    if mended is not None:
        changes = [{"key": each.key, "before": each.before, "after": each.after} for each in mended.changes]
        refused = [{"key": each.key, "found": each.before, "reason": each.reason} for each in mended.refused]
        fixed = {"changes": changes, "refused": refused, "notes": mended.notes}
    return {"shortfalls": count(findings, Status.SHORTFALL), "checks": checks, "fixed": fixed}


def print_report(findings: Sequence[Finding], mended: Mended | None, console: Console | None = None) -> None:
    """What is well in a line each; then what is not, with its reason and its command, shortfalls last."""
    console = console or _console()
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        if finding.status is Status.OK:
            _print_line(console, finding, min(width, console.width // 2))
    absent = [finding.name for finding in findings if finding.status is Status.NOT_APPLICABLE]
    if absent:
        console.print(Text(f"not applicable: {', '.join(absent)}", style="dim"))
    for status in _SHOWN_LAST:
        for finding in findings:
            if finding.status is status:
                _print_trouble(console, finding)
    if mended is not None:
        _print_mended(console, mended)
    console.print()
    console.print(_summary(findings, mended))


def _console() -> Console:
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(markup=False, highlight=False, emoji=False, width=None if narrow else _PIPE_WIDTH)


def _print_line(console: Console, finding: Finding, width: int) -> None:
    """Name and what was found in two columns, or below each other where there is no room."""
    line = Text.assemble((finding.status.value, _STYLES[finding.status]), "  ", f"{finding.name:<{width}}")
    if line.cell_len + 2 + len(finding.found) <= console.width:
        console.print(line.append(f"  {finding.found}"))
        return
    console.print(Text(line.plain.rstrip()), soft_wrap=True)
    _print_indented(console, finding.found)


def _print_trouble(console: Console, finding: Finding) -> None:
    console.print()
    wanted = f", wanted {finding.wanted}" if finding.wanted else ""
    status = (finding.status.value, _STYLES[finding.status])
    console.print(Text.assemble(status, "  ", (finding.name, "bold"), f": {finding.found}{wanted}"))
    if finding.why:
        _print_indented(console, finding.why)
    if finding.command:
        # Never folded: it is there to be copied.
        console.print(Text(f"{' ' * _INDENT}$ {finding.command}", style="bold"), soft_wrap=True)


def _print_indented(console: Console, text: str) -> None:
    indent = " " * _INDENT
    lines = textwrap.wrap(text, max(console.width, 20), initial_indent=indent, subsequent_indent=indent)
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _print_mended(console: Console, mended: Mended) -> None:
    console.print()
    if not mended.changes and not mended.refused:
        console.print("--fix: nothing that it could mend")
    for change in mended.changes:
        console.print(Text.assemble(("set", "green"), f"  {change.key}: {change.before} -> {change.after}"))
    for change in mended.refused:
        console.print(Text.assemble(("not set", "red"), f"  {change.key}: {change.reason}"))
    for note in mended.notes:
        console.print(Text(note))


def _summary(findings: Sequence[Finding], mended: Mended | None) -> Text:
    shortfalls, hints = count(findings, Status.SHORTFALL), count(findings, Status.HINT)
    parts = [f"{shortfalls} shortfall{'' if shortfalls == 1 else 's'}", f"{hints} hint{'' if hints == 1 else 's'}"]
    if unseen := count(findings, Status.UNKNOWN):
        parts.append(f"{unseen} not known")
    fixable = sum(finding.setting is not None for finding in findings)
    tail = f"; --fix, as root, mends {fixable}" if fixable and mended is None else ""
    return Text(", ".join(parts) + tail, style="bold red" if shortfalls else "bold green")
