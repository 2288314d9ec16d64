import time
from html.parser import HTMLParser

import pytest

from forwarder.observer import POINTS, History, Snapshot, look
from forwarder.page import POLICY, ROWS_MAX, rate, render
from tests.forwarder.statistics import Pages


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def sampled(pages: Pages, beats: int = 3) -> tuple[Snapshot, History]:
    history, now = History(), time.monotonic()
    pages.instance()
    for beat in range(1, beats + 1):
        for slot in (0, 1):
            pages.worker(slot, beat, at_s=now + beat)
        history.sample(look(pages.memory))
    return look(pages.memory), history


def test_rates_are_between_two_reports_of_a_worker() -> None:
    with Pages() as pages:
        seen, history = sampled(pages)
        assert list(history.lines["web"].inward[-3:]) == pytest.approx([0.0, 2000.0, 2000.0])
        assert len(history.lines["web"].outward) == POINTS
        assert history.loads[50].cpu == pytest.approx(0.25)
        history.sample(seen)
        assert history.lines["web"].inward[-1] == pytest.approx(2000.0)


def test_line_of_a_worker_that_is_gone_ends() -> None:
    with Pages() as pages:
        _, history = sampled(pages)
        pages.worker(1, 1, serial=99)
        history.sample(look(pages.memory))
        assert history.lines["web"].inward[-1] == pytest.approx(1000.0)
        assert set(history.loads) == {50}


def test_page_says_what_there_is() -> None:
    with Pages() as pages:
        text = " ".join(Reader(render(*sampled(pages))).words)
        for word in (
            "client 1.2.3",
            "1 min 30 s",
            "web",
            "kcp",
            "16 kbit/s",
            "20\N{EN DASH}40 ms",
            "4 carriers",
            "40.0 MiB",
        ):
            assert word.replace("4 carriers", "8 carriers") in text, word


def test_page_loads_nothing_from_elsewhere() -> None:
    with Pages() as pages:
        text = render(*sampled(pages))
    for tag, attributes in Reader(text).tags:
        assert "src" not in attributes and tag not in {"link", "img", "iframe"}, tag
        assert (attributes.get("href") or "/").startswith("/")
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
    assert "://" not in text
    assert POLICY.startswith("default-src 'none'") and "unsafe" not in POLICY


def test_names_are_escaped() -> None:
    with Pages((("<b>&'x", "stripe"),)) as pages:
        text = render(*sampled(pages))
        assert "<b>&'" not in text and "&lt;b&gt;&amp;&#x27;x" in text


def test_page_of_very_many_tunnels_shows_the_busiest() -> None:
    names = tuple((f"t{number}", "stripe") for number in range(ROWS_MAX + 50))
    with Pages(names) as pages:
        seen, history = sampled(pages)
        history.lines["t249"].inward[-1] = 1e9
        text = render(seen, history)
        assert text.count("<tr>") == ROWS_MAX + 4 and "and 50 more" in text and ">t249<" in text
        assert len(text) < 1 << 20


@pytest.mark.parametrize("states", [("up", "down"), ("starting", "up")])
def test_what_is_missing_is_said(states: tuple[str, str]) -> None:
    with Pages() as pages:
        pages.instance(states)
        text = " ".join(Reader(render(look(pages.memory), History())).words)
        slot = 0 if states[0] != "up" else 1
        assert f"worker {slot} is {states[slot]}" in text


def test_page_before_anything_was_said() -> None:
    with Pages() as pages:
        assert "the supervisor has said nothing yet" in render(look(pages.memory), History())


def test_silent_supervisor_is_missed() -> None:
    with Pages() as pages:
        pages.instance(age_s=60.0)
        assert look(pages.memory).missing() == ["the supervisor has been silent for 60 s"]


@pytest.mark.parametrize(
    ("bytes_per_s", "text"),
    [(0, "0"), (1, "8 bit/s"), (124.9, "999 bit/s"), (125, "1 kbit/s"), (12_345, "98.8 kbit/s"), (1.5e9, "12 Gbit/s")],
)
def test_rates_have_three_figures(bytes_per_s: float, text: str) -> None:
    assert rate(bytes_per_s) == text
