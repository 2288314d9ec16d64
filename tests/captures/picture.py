"""A terminal's lines as a small SVG file that needs nothing from elsewhere: the fonts are the reader's."""

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

THEME = TerminalTheme(
    (24, 26, 31),
    (214, 217, 222),
    [(24, 26, 31), (224, 96, 96), (120, 190, 110), (214, 170, 80), (100, 150, 220), (180, 120, 200), (90, 190, 200),
     (214, 217, 222)],
)  # fmt: skip

CELL_WIDTH, LINE_HEIGHT = 12.2, 24.4  # rich's, in units of the picture
MARGIN = 8

# rich fills in the words in braces.
FORMAT = """<svg class="rich-terminal" viewBox="0 0 @width@ @height@" xmlns="http://www.w3.org/2000/svg">
<title>@title@</title>
<style>
.{unique_id}-matrix {{
font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: {char_height}px; line-height: {line_height}px;
white-space: pre;
}}
{styles}
</style>
<rect width="100%" height="100%" fill="#181a1f"/>
<g transform="translate(@margin@, @margin@)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def write_svg(file: Path, title: str, lines: Sequence[str], columns: int) -> None:
    """lines: with the escape sequences of their colours."""
    console = Console(file=io.StringIO(), record=True, width=columns, force_terminal=True, color_system="standard")
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, overflow="crop", highlight=False)
    words = {"@title@": title, "@width@": f"{columns * CELL_WIDTH + 2 * MARGIN:g}"}
    words |= {"@height@": f"{len(lines) * LINE_HEIGHT + 2 * MARGIN:g}", "@margin@": str(MARGIN)}
    form = FORMAT
    for word, value in words.items():
        form = form.replace(word, value)
    file.write_text(_smaller(console.export_svg(title=title, theme=THEME, code_format=form, unique_id="t")))


def _smaller(svg: str) -> str:
    """Clip paths are for lines that are too long, of which there are none; ends of lines need no element."""
    svg = re.sub(r' clip-path="[^"]*"', "", svg)
    svg = re.sub(r"<text [^>]*>(&#160;)*\n*</text>", "", svg)
    return re.sub(r'<text class="([^"]*)" x="([^"]*)" y="([^"]*)" textLength="[^"]*">([^<]*)</text>', _split, svg)


def _split(element: re.Match[str]) -> str:
    """Text and dots apart: they come from different fonts, and each has to be fitted to its cells."""
    style, x, y, content = element.groups()
    place, parts = float(x), []
    for run in re.findall("[\u2800-\u28ff]+|[^\u2800-\u28ff]+", html.unescape(content)):
        width = len(run) * CELL_WIDTH
        text = html.escape(run, quote=False).replace("\u00a0", "&#160;")
        parts.append(f'<text class="{style}" x="{place:g}" y="{y}" textLength="{width:g}">{text}</text>')
        place += width
    return "".join(parts)
