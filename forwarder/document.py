"""A configuration file's text -> its TOML document -> checked tables; every mistake becomes one ConfigError.

In order: the text is read, parsed, split by role, and converted by msgspec, which stops at the first mistake in the
order of the document. What concerns several tables at once is `forwarder.config`'s.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from forwarder.errors import ConfigError, Unreadable
from forwarder.schema import ClientFile, File, Mode, ServerFile, Table
from forwarder.values import Mistake

MAX_FILE_BYTES = 1 << 20

_TOML_LINE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)\Z")
_MSGSPEC_PATH = re.compile(r" - at `\$(.*)`\Z", re.DOTALL)
_PATH_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_MSGSPEC_KEY = re.compile(r"Object (contains unknown|missing required) field `(.*)`", re.DOTALL)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LIKE_A_KEY = re.compile(r"[A-Za-z0-9+/]{40,}=+")

_TYPE_NAMES = {dict: "a table", list: "an array", datetime: "a date", date: "a date", time: "a time of day"}

Step = str | int
Document = dict[str, Any]


def read_file(file: Path) -> ClientFile | ServerFile:
    """The file's tables, each checked by itself."""
    return convert(file, parse(file, read_text(file)))


def read_text(file: Path) -> str:
    """The file's text; ConfigError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        kind = Unreadable if isinstance(error, PermissionError) else ConfigError
        raise kind(f"{file}: expected a readable file, found: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{file}: expected at most {MAX_FILE_BYTES} bytes, found more")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError.syntax(file, data.count(b"\n", 0, error.start) + 1, "not UTF-8") from error


def parse(file: Path, text: str) -> Document:
    """TOML -> dictionaries; ConfigError names the line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = _TOML_LINE.search(str(error))
        last = text.rstrip("\n").count("\n") + 1
        line = int(where[1]) if where and where[1] else last
        problem = _TOML_LINE.sub("", str(error))
        raise ConfigError.syntax(file, line, problem[:1].lower() + problem[1:]) from error
    except RecursionError as error:
        raise ConfigError.syntax(file, _first_line_that_raises(RecursionError, text), "nested too deeply") from error
    except ValueError as error:
        raise ConfigError.syntax(file, _first_line_that_raises(ValueError, text), "a number too long") from error


def _first_line_that_raises(kind: type[Exception], text: str) -> int:
    """For errors that tomllib passes on without a place: the fewest lines of `text` that raise the same."""
    lines = text.splitlines(keepends=True)
    low, high = 1, len(lines)
    while low < high:
        middle = (low + high) // 2
        try:
            tomllib.loads("".join(lines[:middle]))
            raised = False
        except Exception as error:
            raised = isinstance(error, kind) and not isinstance(error, tomllib.TOMLDecodeError)
        low, high = (low, middle) if raised else (middle + 1, high)
    return low


def convert(file: Path, document: Document) -> ClientFile | ServerFile:
    """Dictionaries -> tables of the document's role."""
    role = document.get("role")
    if role not in ("client", "server"):
        raise ConfigError.mistake(
            file, "role", '"client" or "server"', shown(role) if "role" in document else "nothing"
        )
    shape: type[ClientFile | ServerFile] = ClientFile if role == "client" else ServerFile
    try:
        return msgspec.convert(document, shape, dec_hook=_parse_value)
    except msgspec.ValidationError as error:
        raise _config_error(file, document, shape, error) from error


def _parse_value(kind: type[Any], raw: object) -> object:
    parse_value: Callable[[object], object] = kind.parse
    return parse_value(raw)


def _config_error(file: Path, document: Document, shape: type[File], error: msgspec.ValidationError) -> ConfigError:
    """msgspec says where; what was expected there is in the schema, and what was found in the document."""
    text = str(error)
    where = _MSGSPEC_PATH.search(text)
    steps = [key or int(index) for key, index in _PATH_STEP.findall(where[1])] if where else []
    if isinstance(error.__cause__, Mistake):
        mistake = error.__cause__
        inner = [] if mistake.key is None else [mistake.key]
        return ConfigError.mistake(file, key_path(document, [*steps, *inner]), mistake.expected, mistake.found)
    about_key = _MSGSPEC_KEY.match(_MSGSPEC_PATH.sub("", text))
    if about_key:
        key = about_key[2]
        path = key_path(document, [*steps, key])
        if about_key[1] == "missing required":
            return ConfigError.mistake(file, path, _expected(shape, document, [*steps, key]), "nothing")
        return ConfigError.mistake(file, path, *_unknown_key(shape, document, steps, key))
    found = shown(_value_at(document, steps), secret=steps[-1] == "key")
    return ConfigError.mistake(file, key_path(document, steps), _expected(shape, document, steps), found)


def _unknown_key(shape: type[File], document: Document, steps: Sequence[Step], key: str) -> tuple[str, str]:
    """(expected, found) for a key that its table does not have."""
    table = _choose(_annotation_at(shape, document, steps), _value_at(document, steps))
    mode = table.__struct_config__.tag
    other_shape = ServerFile if shape is ClientFile else ClientFile
    role, other_role = ("client", "server") if shape is ClientFile else ("server", "client")
    modes_here = _modes_with(shape, document, steps, key)
    modes_there = _modes_with(other_shape, document, steps, key)
    if mode in modes_there and not modes_here:
        return f"a key that a {role} has", f"one that only a {other_role} has"
    if other_modes := modes_here or modes_there:
        return f'a key of mode "{mode}"', f'one of mode "{other_modes[0]}"'
    close = difflib.get_close_matches(key, table.__struct_fields__, n=1)
    return f'a known key, such as "{close[0]}"' if close else "a known key", "an unknown one"


def _modes_with(shape: type[File], document: Document, steps: Sequence[Step], key: str) -> list[Any]:
    """The modes (None: a table without) whose tables at `steps` have that key."""
    try:
        tables = _tables_in(_annotation_at(shape, document, steps))
    except KeyError:
        return []
    return [table.__struct_config__.tag for table in tables if key in table.__struct_fields__]


def _annotation_at(shape: type[File], document: Document, steps: Sequence[Step]) -> Any:
    """The schema's annotation of the value at `steps`; KeyError if there is none."""
    annotation: Any = shape
    value: Any = document
    for step in steps:
        if isinstance(step, int):
            annotation, value = get_args(_bare(annotation))[0], value[step]
            continue
        if step == _tables_in(annotation)[0].__struct_config__.tag_field:
            return Mode
        annotation = _without_none(get_type_hints(_choose(annotation, value), include_extras=True)[step])
        value = value.get(step)
    return annotation


def _without_none(annotation: Any) -> Any:
    """`X | None` -> `X`."""
    choices = [choice for choice in get_args(annotation) if choice is not type(None)]
    return choices[0] if type(None) in get_args(annotation) else annotation


def _bare(annotation: Any) -> Any:
    """An annotation without what `Annotated` adds."""
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _tables_in(annotation: Any) -> Sequence[type[Table]]:
    """The table, or those of the several modes."""
    bare = _bare(annotation)
    return get_args(bare) or (bare,)


def _choose(annotation: Any, value: Any) -> type[Table]:
    """The table, or the one of the mode that `value` names."""
    tables = _tables_in(annotation)
    config = tables[0].__struct_config__
    return tables[0] if len(tables) == 1 else {t.__struct_config__.tag: t for t in tables}[value[config.tag_field]]


def _expected(shape: type[File], document: Document, steps: Sequence[Step]) -> str:
    annotation = _annotation_at(shape, document, steps)
    if hasattr(annotation, "__metadata__"):
        return str(annotation.__metadata__[0].description)
    return str(getattr(annotation, "expected", "a table"))


def _value_at(document: Document, steps: Sequence[Step]) -> object:
    value: Any = document
    for step in steps:
        value = value[step]
    return value


def key_path(document: Document, steps: Sequence[Step]) -> str:
    """`["tunnel", 0, "host_port"]` -> `tunnel[1] "web".host_port`: counted from 1, with the table's own name."""
    text = ""
    value: Any = document
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            value = None
        if isinstance(step, str):
            name = step if _BARE_KEY.fullmatch(step) else shown(step)
            text += f".{name}" if text else name
            continue
        text += f"[{step + 1}]"
        label = (value.get("name") or value.get("key_id")) if isinstance(value, dict) else None
        text += f" {shown(label)}" if isinstance(label, str) else ""
    return text


def shown(value: object, *, secret: bool = False, limit: int = 60) -> str:
    """A value of the document as an error may show it: of bounded length, and never a key, nor what looks like one."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if secret or _LIKE_A_KEY.search(value):
            return f"{len(value)} characters that are not shown"
        return json.dumps(value if len(value) <= limit else value[: limit - 3] + "...", ensure_ascii=False)
    if isinstance(value, int | float):
        return "a number that is not shown" if secret else str(value)[:limit]
    return "an empty array" if value == [] else _TYPE_NAMES.get(type(value), "something else")
