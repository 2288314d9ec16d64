"""The model as lines of text: header, throughput, the table's rows, keys; as wide and as high as it is told."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.text import Text

from forwarder import figures
from forwarder.render import headline
from forwarder.summary import InstanceStatus
from forwarder.top import graph
from forwarder.top.columns import SHOWN, widths
from forwarder.top.model import HELP, Model
from forwarder.top.rows import Row

_LABEL = 17  # "out  95.5 Mbit/s "
_LEAST_HEIGHT = 12  # for throughput lines
_HIGH = 32  # for taller ones
_LAST = len(SHOWN) - 1


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What the terminal's font has."""

    folded: str
    opened: str
    falling: str
    rising: str
    cut: str
    braille: bool


FULL = Glyphs("▸", "▾", "▼", "▲", "…", True)
PLAIN = Glyphs("+", "-", "v", "^", "~", False)


def frame(model: Model, width: int, height: int, glyphs: Glyphs) -> list[Text]:
    """Exactly `height` lines, none of them wider than `width`."""
    head = [_title(model, width), _totals(model, width)]
    if height >= _LEAST_HEIGHT:
        head += _throughput(model, width, 4 if height >= _HIGH else 2, glyphs)
    shown = widths(width)
    model.columns = [number for number, _ in shown]
    room = max(0, height - len(head) - 2)
    first, cursor = model.window(room)
    if model.help:
        body = _help()
    elif model.status is None:
        body = [Text(), Text(model.silence, style="red"), Text("Waiting for it.")]
    else:
        seen = enumerate(model.rows[first : first + room], first)
        body = [_row(model, row, shown, glyphs, chosen=number == cursor) for number, row in seen]
    body = (body + [Text()] * room)[:room]
    lines = [*head, _headings(model, shown, glyphs), *body, _keys(model, width, first, room)]
    if height < len(lines):
        lines = lines[: max(height - 1, 0)] + lines[-1:]
    for line in lines:
        line.truncate(width)
    return lines[:height]


def _title(model: Model, width: int) -> Text:
    """Which instance this is, how long it runs; at the right, how often it is looked at."""
    status = model.status
    parts = [model.title]
    if status is not None:
        parts += [headline(status), f"up {figures.duration(status.uptime_s)}"]
    title = Text(", ".join(parts), style="bold")
    if model.paused:
        mark = Text("paused", style="reverse")
    elif status is None:
        mark = Text("not running, waiting", style="red")
    else:
        mark = Text(f"every {model.interval_s:g} s", style="dim")
    title.truncate(max(0, width - len(mark) - 1))
    return Text.assemble(title, " " * max(0, width - title.cell_len - len(mark)), mark)


def _totals(model: Model, width: int) -> Text:
    """What is most dispensable comes first, and is left out first."""
    status = model.status
    if status is None:
        return Text()
    sessions = [session for tunnel in status.tunnels for session in tunnel.sessions]
    up = sum(session.carriers_up for session in sessions)
    wanted = sum(session.carriers_wanted for session in sessions)
    restarts = sum(worker.restarts for worker in status.workers)
    words = [
        _counted(len(status.tunnels), "tunnel"),
        _counted(len(status.workers), "worker"),
        *([f"{restarts} restarted"] if restarts else []),
        _counted(len(sessions), "session"),
        f"{figures.share(up, wanted)} carriers",
        _counted(sum(tunnel.flows_open for tunnel in status.tunnels), "flow"),
        f"in {_total(status, 'bytes_in')}",
        f"out {_total(status, 'bytes_out')}",
    ]
    while len(words) > 1 and len(", ".join(words)) > width:
        words.pop(0)
    return Text(", ".join(words))


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _total(status: InstanceStatus, field: str) -> str:
    return figures.amount(sum(getattr(tunnel, field) for tunnel in status.tunnels))


def _throughput(model: Model, width: int, height: int, glyphs: Glyphs) -> list[Text]:
    """What comes from the wire, below it what goes to it: the rate now, the greatest one seen, and all of them."""
    past, total = model.meters.past, model.meters.total
    lines: list[Text] = []
    columns = max(0, width - _LABEL)
    for name, now, values, style in (
        ("in", total.in_bps, past.ins, "green"),
        ("out", total.out_bps, past.outs, "cyan"),
    ):
        shown = list(values)
        dots = graph.area(shown, columns, height, glyphs.braille)
        labels = [f"{name:<4}{figures.rate(now):>12} ", f"{'max':<4}{_peak(shown, columns, glyphs):>12} "]
        labels += [" " * _LABEL] * height
        for number, (label, line) in enumerate(zip(labels, dots, strict=False)):
            lines.append(Text.assemble((label, style if number == 0 else "dim"), (line, style)))
    return lines


def _peak(values: Sequence[float | None], columns: int, glyphs: Glyphs) -> str:
    return figures.rate(graph.peak(values, columns, glyphs.braille))


def _headings(model: Model, shown: Iterable[tuple[int, int]], glyphs: Glyphs) -> Text:
    """The column that rows are sorted by has a mark."""
    line = Text(style="reverse")
    for place, (number, width) in enumerate(shown):
        column = SHOWN[number]
        text = column.heading or "tunnel"
        if number == model.sort:
            text += glyphs.falling if column.falling != model.reverse else glyphs.rising
        line.append(" " if place else "")
        line.append(_fitted(text, width, column.left, glyphs.cut), "bold" if number == model.sort else "")
    return line


def _row(model: Model, row: Row, shown: Iterable[tuple[int, int]], glyphs: Glyphs, chosen: bool) -> Text:
    """The row with the cursor has no other colour."""
    line = Text(style="reverse" if chosen else "")
    for place, (number, width) in enumerate(shown):
        if place == 0:
            mark = " " if not row.expandable else glyphs.opened if model.is_expanded(row) else glyphs.folded
            line.append(_fitted(f"{'  ' * row.depth}{mark} {row.name}", width, True, glyphs.cut))
            continue
        line.append(" ")
        if number == _LAST and row.past is not None:
            line.append(_past(row, width, glyphs), "" if chosen else "green")
            continue
        cell = SHOWN[number].cell(row)
        text, style = (cell, "") if isinstance(cell, str) else (cell.plain, cell.style)
        line.append(_fitted(text, width, SHOWN[number].left, glyphs.cut), "" if chosen else style)
    return line


def _past(row: Row, width: int, glyphs: Glyphs) -> str:
    """The throughput of a tunnel, both ways together."""
    assert row.past is not None
    both = [None if into is None and out is None else (into or 0.0) + (out or 0.0)
            for into, out in zip(row.past.ins, row.past.outs, strict=True)]  # fmt: skip
    return graph.area(both, width, 1, glyphs.braille)[0]


def _fitted(text: str, width: int, left: bool, cut: str) -> str:
    if len(text) > width:
        return text[: width - 1] + cut
    return text.ljust(width) if left else text.rjust(width)


def _help() -> list[Text]:
    """Every key, and what the words mean."""
    widest = max(len(keys) for keys, _ in HELP)
    lines = [Text.assemble((f"{keys:<{widest}}", "bold"), "  ", meaning) for keys, meaning in HELP]
    told = (
        "in, out: from the wire, to the wire",
        "rtt, p95: median, 95th percentile of the carriers that are up; loss: their mean",
        "rate: what carriers were last measured to send; a dash: too little to tell",
    )
    return [Text(), *lines, Text(), *(Text(line) for line in told)]


def _keys(model: Model, width: int, first: int, room: int) -> Text:
    """The keys that there is room for, the important ones first; at the right, which rows are seen."""
    count = len(model.rows)
    place = f"{first + 1}-{min(first + room, count)} of {count}" if count > room > 0 and not model.help else ""
    line = Text()
    for key, what in (
        ("q", "quit"), ("?", "help"), ("enter", "expand"), ("s", "sort"), ("a", "all"), ("p", "pause"),
        ("r", "reverse"), ("+-", "interval"),
    ):  # fmt: skip
        if len(line) + len(key) + len(what) + 3 > width - len(place):
            break
        line.append(key, "bold")
        line.append(f" {what}  ")
    return Text.assemble(line, " " * max(0, width - len(line) - len(place)), place)
