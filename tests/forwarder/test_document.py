"""Whatever stands in a document, it is tables or one ConfigError, and no secret is shown."""

import copy
import tomllib
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.document import convert, key_path, parse, shown
from forwarder.errors import ConfigError, one_line
from forwarder.starter import starter_text
from tests.forwarder.examples import KEY_TEXT
from tests.forwarder.test_starter import with_everything

FILE = Path("some.toml")
SECRET = KEY_TEXT[:-1]
DOCUMENTS = [tomllib.loads(with_everything(starter_text(role))) for role in ("client", "server")]

SCALARS: st.SearchStrategy[Any] = (
    st.text(max_size=8)
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.sampled_from(
        ["", "stripe", "spray", "10s", "8MiB", "[::]:80", date(2020, 1, 1), time(1), datetime(2020, 1, 1)]
    )
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for step, part in inner for each in places(part, (*path, step)))]


def assert_one_mistake(document: dict[str, Any]) -> None:
    try:
        convert(FILE, document)
    except ConfigError as error:
        line = str(error)
        assert line.startswith("some.toml: ") and ": expected " in line and ", found " in line
        assert one_line(line).isprintable() and SECRET not in line


@given(st.data())
def test_any_value_anywhere_is_accepted_or_one_mistake(data: st.DataObject) -> None:
    document = copy.deepcopy(data.draw(st.sampled_from(DOCUMENTS)))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(document)[1:] or [("role",)]))
        container: Any = document
        for step in path[:-1]:
            container = container[step]
        match data.draw(st.sampled_from(["put", "remove", "add"])):
            case "put":
                container[path[-1]] = data.draw(VALUES)
            case "add" if isinstance(container, dict):
                container[data.draw(st.text(max_size=8))] = data.draw(VALUES)
            case _ if len(document) > 1:
                del container[path[-1]]
    assert_one_mistake(document)


def test_a_key_put_anywhere_is_not_shown() -> None:
    for whole in DOCUMENTS:
        for path in places(whole)[1:]:
            document = copy.deepcopy(whole)
            container: Any = document
            for step in path[:-1]:
                container = container[step]
            container[path[-1]] = KEY_TEXT
            assert_one_mistake(document)


@pytest.mark.parametrize("text", [KEY_TEXT, f"10.0.0.5:{KEY_TEXT}", f"{KEY_TEXT}\n"])
def test_what_holds_a_key_is_not_shown(text: str) -> None:
    assert KEY_TEXT not in shown(text)
    assert KEY_TEXT not in key_path({}, ["tunnel", text])


@given(st.text(alphabet='ab=[]{}"\n.,#1 \\', max_size=40))
def test_any_text_is_a_document_or_one_error_with_a_line(text: str) -> None:
    try:
        parse(FILE, text)
    except ConfigError as error:
        file, line, problem = str(error).split(":", 2)
        assert (file, 1 <= int(line) <= text.count("\n") + 1) == ("some.toml", True)
        assert problem.strip()


def test_long_values_are_cut() -> None:
    assert len(shown("x y" * 1000)) <= 62
    assert len(shown(10**4000)) <= 60
