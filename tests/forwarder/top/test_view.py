"""What `top` shows, as text at fixed sizes."""

import pytest

from forwarder.top.live import glyphs_of, painted
from forwarder.top.model import Model
from forwarder.top.view import FULL, PLAIN, Glyphs, frame
from tests.forwarder.top.answers import carrier, instance, session, tunnel


def shown(model: Model, width: int = 80, height: int = 24, glyphs: Glyphs = FULL) -> list[str]:
    lines = frame(model, width, height, glyphs)
    assert len(lines) == height
    assert all(line.cell_len <= width for line in lines)
    return [line.plain.rstrip() for line in lines]


def looked(carriers: int = 2, answers: int = 5) -> Model:
    """A model that has seen some answers: 8 Mbit/s in, 80 kbit/s out, spread evenly."""
    model = Model("client.toml", 1.0)
    for second in range(answers):
        in_, out = second * 1_000_000, second * 10_000
        each = [carrier(number, counts=(in_ // carriers, out // carriers)) for number in range(carriers)]
        each[0].state, each[-1].loss = "connecting", 0.07
        web = tunnel("web", session("a", *each), counts=(in_, out), state="degraded")
        model.on_answer(instance(100.0 + second, web, tunnel("ssh", state="connecting", open_=0), restarts=3))
    return model


EXPECTED_80 = """\
client.toml, forwarder 1.2.3 client, pid 4242, up 1 min 44 s           every 1 s
1 worker, 3 restarted, 1 session, 1/2 carriers, 1 flow, in 4.00 MB, out 40.0 kB
in   8.00 Mbit/s                                                              ⣿⣿
max  8.00 Mbit/s                                                              ⣿⣿
out  80.0 kbit/s                                                              ⣿⣿
max  80.0 kbit/s                                                              ⣿⣿
tunnel▲              state          up/of     rtt   loss          in         out
  ssh stripe         connecting       0/0       -      -     0 bit/s     0 bit/s
▾ web stripe         degraded         1/2 10.0 ms  7.0 % 8.00 Mbit/s 80.0 kbit/s
  ▾ laptop 10.0.0.2… degraded         1/2 10.0 ms  7.0 % 8.00 Mbit/s 80.0 kbit/s
      stripe 0       connecting                 -      - 4.00 Mbit/s 40.0 kbit/s
      stripe 1       up                   10.0 ms  7.0 % 4.00 Mbit/s 40.0 kbit/s
"""


def test_small_terminal_shows_what_matters() -> None:
    model = looked()
    model.on_key("a")
    lines = shown(model)
    assert lines[:12] == EXPECTED_80.splitlines()
    assert lines[-1].startswith("q quit  ? help  enter expand  s sort")
    assert lines[10].startswith("      stripe 0")


def test_wide_terminal_shows_every_column() -> None:
    model = looked()
    model.on_key("a")
    lines = shown(model, 200, 60)
    head = next(line for line in lines if line.startswith("tunnel"))
    columns = "tunnel▲ state up/of rtt p95 loss in out rate bytes in bytes out flows resets age worker local - peer"
    assert head.split() == columns.split()
    stripe = next(line for line in lines if "stripe 1" in line)
    cells = " ".join(stripe.split())
    assert cells.startswith("stripe 1 up 10.0 ms 7.0 % 4.00 Mbit/s 40.0 kbit/s - 2.00 MB 20.0 kB 1 min 0 s 0 10.")
    assert cells.endswith("10.0.0.1:40001 - 10.0.0.2:9000")
    assert sum(line.endswith("⣿⣿") for line in lines) == 8 + 1  # both directions, and the tunnel's own


def test_thousand_carriers_are_scrolled_through() -> None:
    model = looked(1000)
    model.on_key("a")
    assert shown(model)[-1].endswith("1-16 of 1003")
    model.on_key("end")
    lines = shown(model)
    assert lines[-1].endswith("988-1003 of 1003")
    assert "stripe 999" in lines[-2]


def test_states_and_loss_have_a_colour_besides_their_word() -> None:
    model = looked()
    model.on_key("a")
    colours = {str(span.style) for line in frame(model, 80, 24, FULL) for span in line.spans}
    assert {"yellow", "green", "red", "cyan"} <= colours


def test_nobody_answers() -> None:
    model = looked()
    model.on_silence("no instance is running (control socket /run/forwarder/client.sock)")
    lines = shown(model)
    assert lines[0].startswith("client.toml") and lines[0].endswith("not running, waiting")
    assert "no instance is running (control socket /run/forwarder/client.sock)" in lines
    assert not any("stripe" in line for line in lines)


def test_pause_and_help_are_said() -> None:
    model = looked()
    model.on_key("p")
    assert shown(model)[0].endswith("paused")
    model.on_key("?")
    text = "\n".join(shown(model))
    assert "choose the column to sort by" in text and "web stripe" not in text


def test_plain_glyphs_are_ascii() -> None:
    model = looked()
    model.on_key("a")
    for lines in (shown(model, 80, 24, PLAIN), shown(model, 200, 60, PLAIN)):
        assert "\n".join(lines).isascii()


@pytest.mark.parametrize("width", [1, 2, 10, 40, 79, 80, 119, 120, 190, 200, 400])
@pytest.mark.parametrize("height", [1, 2, 3, 8, 12, 24, 60])
def test_every_size_is_filled_exactly(width: int, height: int) -> None:
    model = looked(50)
    for keys in ("", "a", "?"):
        for key in keys:
            model.on_key(key)
        shown(model, width, height)
    model.on_silence("nobody")
    shown(model, width, height)


def test_painted_lines_are_as_many_and_have_colours_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    model = looked()
    lines = frame(model, 80, 24, FULL)
    assert len(painted(lines, 80)) == 24
    assert any("\x1b[3" in line for line in painted(lines, 80))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any("\x1b[3" in line for line in painted(lines, 80))


def test_glyphs_are_what_the_terminal_has() -> None:
    assert glyphs_of("xterm-256color", "utf-8") is glyphs_of("screen", "UTF8") is FULL
    assert glyphs_of("linux", "utf-8") is glyphs_of("xterm", "ANSI_X3.4-1968") is PLAIN
