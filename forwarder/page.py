"""The web page: one document with everything in it, that fetches itself anew every two seconds.

Nothing from elsewhere: style and script are inline, named by hash in POLICY; lines are SVG. Without scripts the browser
reloads it.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

from forwarder.figures import amount, duration, memory
from forwarder.observer import POINTS, SAMPLE_S, History, Line, Snapshot
from workers.shm.totals import CarrierTotals, Seat, TunnelTotals, WorkerTotals

ROWS_MAX = 200
"""Tunnels that are shown: the busiest ones, where there are more."""
LINE_POINTS = 75
"""Of a tunnel's small line: every second sample."""
NONE = "<span class=dim>&ndash;</span>"

SCRIPT = """
const main = document.querySelector("main"), late = document.querySelector("#late");
async function turn() {
  try {
    const answer = await fetch("/", {cache: "no-store", signal: AbortSignal.timeout(5000)});
    const text = await answer.text();
    main.replaceChildren(...new DOMParser().parseFromString(text, "text/html").querySelector("main").childNodes);
    late.hidden = true;
  } catch { late.hidden = false; }
  setTimeout(turn, document.hidden ? 10000 : 2000);
}
setTimeout(turn, 2000);
"""

STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --text: #1d2126; --dim: #6a727c; --rule: #e3e5e8;
  --in: #1f77d0; --out: #d9730d; --good: #1a8a4a; --warn: #b7791f; --bad: #c53030; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1c2024; --text: #e6e8ea; --dim: #949ca6;
  --rule: #30363c; --in: #5aa9ff; --out: #ffa657; --good: #56d38a; --warn: #e3b341; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 14px/1.45 system-ui, sans-serif; }
main, #late { max-width: 1200px; margin: 0 auto; padding: 0 16px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 16px; padding: 18px 0 12px; }
h1 { font-size: 20px; margin: 0; } h1 small { font-weight: 400; color: var(--dim); }
h2 { font-size: 14px; margin: 20px 0 6px; }
.dim { color: var(--dim); } .good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.in { color: var(--in); } .out { color: var(--out); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; overflow-x: auto; }
.sum { padding: 10px 14px 8px; overflow: hidden; }
.sum p { margin: 0 0 6px; display: flex; flex-wrap: wrap; gap: 2px 20px; }
.sum svg { display: block; width: 100%; height: 110px; }
.sum .axis { margin: 4px 0 0; justify-content: space-between; font-size: 12px; }
svg { overflow: visible; } polyline { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; } polygon { fill: currentColor; opacity: .14; stroke: none; }
.base { stroke: var(--rule); stroke-width: 1; vector-effect: non-scaling-stroke; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--dim); font-size: 12px; }
td { text-align: right; border-top: 1px solid var(--rule); }
th, td { padding: 5px 8px; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 14px; }
th:last-child, td:last-child { padding-right: 14px; }
td:first-child { max-width: 190px; overflow: hidden; text-overflow: ellipsis; }
td svg { display: block; width: 120px; height: 26px; margin: 1px 0; }
.l { text-align: left; }
footer { padding: 14px 0 24px; color: var(--dim); font-size: 12px; } a { color: inherit; }
#late { color: var(--bad); padding-top: 10px; }
@media (max-width: 1060px) { .w3 { display: none; } }
@media (max-width: 900px) { .w2 { display: none; } td svg { width: 90px; } }
@media (max-width: 520px) { .w1 { display: none; } main, #late { padding: 0 8px; } th, td { padding: 5px; }
  table { font-size: 12.5px; } th:first-child, td:first-child { padding-left: 8px; } td:first-child { max-width: 88px; }
  th:last-child, td:last-child { padding-right: 8px; } td svg { width: 46px; } }
"""


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


POLICY = (
    f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; connect-src 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


def render(seen: Snapshot, history: History) -> str:
    """The whole document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>forwarder</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<noscript><meta http-equiv="refresh" content="5"></noscript>'
        f'<style>{STYLE}</style></head><body><div id="late" hidden>No answer: what stands below is old.</div><main>'
        f"{_header(seen)}{_sum(seen, history)}{_tunnels(seen, history)}{_workers(seen, history)}"
        '<footer>Bytes are application payload. <a href="/metrics">metrics</a> · <a href="/healthz">health</a></footer>'
        f"</main><script>{SCRIPT}</script></body></html>"
    )


def _header(seen: Snapshot) -> str:
    instance, missing = seen.instance, seen.missing()
    if instance is None:
        return f"<header><h1>forwarder</h1><span class=bad>{escape(missing[0])}</span></header>"
    state = "<span class=good>up</span>" if not missing else f"<span class=bad>{escape('; '.join(missing))}</span>"
    since = duration(seen.at_s - instance.started_s)
    return (
        f"<header><h1>forwarder <small>{escape(instance.role)} {escape(instance.version)}</small></h1>{state}"
        f"<span class=dim>for {since} · pid {instance.pid}</span></header>"
    )


def _sum(seen: Snapshot, history: History) -> str:
    """All tunnels together."""
    lines = list(history.lines.values())
    inward = [sum(values) for values in zip(*(line.inward for line in lines), strict=True)] or [0.0] * POINTS
    outward = [sum(values) for values in zip(*(line.outward for line in lines), strict=True)] or [0.0] * POINTS
    top = max(*inward, *outward)
    flows = sum(tunnel.flows_open for tunnel in seen.tunnels)
    up = sum(each.up for tunnel in seen.tunnels for each in tunnel.carriers)
    return (
        f"<section class='card sum'><p><span class=in>▼ in <b>{rate(inward[-1])}</b></span>"
        f"<span class=out>▲ out <b>{rate(outward[-1])}</b></span>"
        f"<span class=dim>{_count(flows, 'connection')} open · {_count(up, 'carrier')} up</span></p>"
        f"{_chart(inward, outward, top)}<p class='dim axis'><span>{POINTS * SAMPLE_S / 60:.0f} minutes ago</span>"
        f"<span>top {rate(top)}</span><span>now</span></p></section>"
    )


def _chart(inward: Sequence[float], outward: Sequence[float], top: float) -> str:
    """100 high, a step wide for each point; stretched by its style."""
    width = len(inward) - 1
    drawn = "".join(
        f"<g class={name}><polygon points='0,100 {points} {width},100'/><polyline points='{points}'/></g>"
        for name, points in (("in", _points(inward, top)), ("out", _points(outward, top)))
        if points
    )
    base = f"<line class=base x1=0 y1=100 x2={width} y2=100 />"
    return f"<svg viewBox='0 0 {width} 100' preserveAspectRatio=none aria-hidden=true>{base}{drawn}</svg>"


def _points(values: Sequence[float], top: float) -> str:
    """Nothing for a line of zeros, and no point between equal ones."""
    if not any(values):
        return ""
    heights = [round(100 - 98 * value / top) for value in values]
    last = len(heights) - 1
    return " ".join(
        f"{x},{y}" for x, y in enumerate(heights) if x in (0, last) or not heights[x - 1] == y == heights[x + 1]
    )


def _tunnels(seen: Snapshot, history: History) -> str:
    shown = seen.tunnels
    if len(shown) > ROWS_MAX:
        busiest = sorted((each.name for each in shown), key=lambda name: -_busy(history.lines.get(name)))
        kept = set(busiest[:ROWS_MAX])
        shown = [each for each in shown if each.name in kept]
    head = (
        "<tr><th>tunnel<th class='l w2'>mode<th>carriers<th class=w1>open<th class=w3>total<th class=w3>reset"
        "<th class=w2>round trip<th class=w3>loss<th class=l>5 min<th>in<th>out"
        "<th class=w2>in, all<th class=w2>out, all</tr>"
    )
    rows = "".join(_tunnel(each, history.lines.get(each.name) or Line()) for each in shown)
    more = f"<p class=dim>and {len(seen.tunnels) - len(shown)} more</p>" if len(shown) < len(seen.tunnels) else ""
    return f"<h2>Tunnels</h2><div class=card><table>{head}{rows}</table></div>{more}"


def _busy(line: Line | None) -> float:
    return line.inward[-1] + line.outward[-1] if line is not None else 0.0


def _tunnel(tunnel: TunnelTotals, line: Line) -> str:
    inward, outward = ([*_halved(values)] for values in (line.inward, line.outward))
    name = escape(tunnel.name)
    return (
        f"<tr><td title='{name}'>{name}<td class='l w2 dim'>{escape(tunnel.mode)}<td>{_up(tunnel.carriers)}"
        f"<td class=w1>{tunnel.flows_open}<td class=w3>{tunnel.flows_total}<td class=w3>{tunnel.flows_reset}"
        f"<td class=w2>{_trip(tunnel.carriers)}<td class=w3>{_loss(tunnel.carriers)}"
        f"<td class=l>{_chart(inward, outward, max(*inward, *outward))}"
        f"{_rate_cell('in', line.inward[-1])}{_rate_cell('out', line.outward[-1])}"
        f"<td class=w2>{amount(tunnel.bytes_in)}<td class=w2>{amount(tunnel.bytes_out)}</tr>"
    )


def _rate_cell(way: str, bytes_per_s: float) -> str:
    text = rate(bytes_per_s)
    return f"<td class={way if text != '0' else 'dim'}>{text}"


def _halved(values: Sequence[float]) -> Iterable[float]:
    step = len(values) // LINE_POINTS
    return (max(values[at : at + step]) for at in range(0, len(values), step))


def _up(carriers: Sequence[CarrierTotals]) -> str:
    """Carriers that are up, of those that are wanted where this end knows."""
    up, wanted = sum(each.up for each in carriers), sum(each.wanted for each in carriers)
    if not wanted:
        return str(up)
    colour = "good" if up >= wanted else "warn" if up else "bad"
    return f"<span class={colour}>{up}</span><span class=dim>/{wanted}</span>"


def _trip(carriers: Sequence[CarrierTotals]) -> str:
    least = min((each.rtt_min_us for each in carriers if each.timed), default=0)
    most = max((each.rtt_max_us for each in carriers), default=0)
    if not most:
        return NONE
    low, high = f"{least / 1000:.3g}", f"{most / 1000:.3g}"
    return f"{low} ms" if low == high else f"{low}&ndash;{high} ms"


def _loss(carriers: Sequence[CarrierTotals]) -> str:
    up = sum(each.up for each in carriers)
    loss = sum(each.loss for each in carriers) / max(up, 1)
    return f"<span class={'dim' if loss < 0.001 else 'warn'}>{loss:.1%}</span>" if up else NONE


def _workers(seen: Snapshot, history: History) -> str:
    if seen.instance is None:
        return ""
    by_slot = {each.slot: each for each in seen.workers}
    seats = [*seen.instance.seats]
    seats += [Seat(slot, each.state, 0) for slot, each in by_slot.items() if slot not in {seat.slot for seat in seats}]
    head = (
        "<tr><th>worker<th class=l>state<th class=w1>pid<th>CPU<th class=w1>resident<th>payload memory"
        "<th class=w2>carriers<th class=w2>open<th class=w3>late by<th class=w1>restarts</tr>"
    )
    rows = "".join(_worker(seat, by_slot.get(seat.slot), history) for seat in seats)
    return f"<h2>Workers</h2><div class=card><table>{head}{rows}</table></div>"


_WORKER_WIDTHS = ("w1", "", "w1", "", "w2", "w2", "w3")


def _worker(seat: Seat, worker: WorkerTotals | None, history: History) -> str:
    colour = {"up": "good", "starting": "warn", "draining": "warn"}.get(seat.state, "bad")
    cells = [NONE] * len(_WORKER_WIDTHS)
    if worker is not None:
        load = history.loads.get(worker.serial)
        cells = [
            str(worker.pid),
            f"{load.cpu:.0%}" if load else NONE,
            memory(worker.resident_bytes),
            f"{memory(worker.arena_used_bytes)} <span class=dim>of {memory(worker.arena_bytes)}</span>",
            str(sum(each.up for tunnel in worker.tunnels for each in tunnel.carriers)),
            str(sum(tunnel.flows_open for tunnel in worker.tunnels)),
            f"{load.lag_s * 1000:.1f} ms" if load else NONE,
        ]
    row = "".join(f"<td class='{width}'>{cell}" for width, cell in zip(_WORKER_WIDTHS, cells, strict=True))
    state = f"<td class='l {colour}'>{escape(seat.state)}"
    return f"<tr><td>{seat.slot}{state}{row}<td class=w1>{seat.restarts}</tr>"


def rate(bytes_per_s: float) -> str:
    """Bits a second to three figures: `0`, `12.5 Mbit/s`."""
    value, units = bytes_per_s * 8, ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s")
    if value < 1:
        return "0"
    for unit in units:
        if value < 999.5 or unit == units[-1]:
            return f"{value:.0f} {unit}" if value >= 99.95 or unit == "bit/s" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
