"""The starter configurations, conf/ among them: valid as they stand, every key in them, with its true default."""

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forwarder.config import Loaded, load
from forwarder.errors import ConfigError, ForwarderError
from forwarder.keys import read_key_file
from forwarder.schema import ClientFile, ServerFile
from forwarder.starter import Role, starter_text, write_starter
from tests.forwarder.examples import KEY_TEXT

CONF = Path(__file__).parents[2] / "conf"
ROLES: list[Role] = ["client", "server"]
# The other spelling of a key that the starter sets; it stands in the prose.
OTHER_SPELLINGS = {"local", "remote", "key"}


# What a tunnel of mode spray has to say, wherever it stands in the starter.
SPRAY_REQUIRED = r"^#(?=\[\[tunnel\]\]|(name|mode|host|ports|ludp|taddr) = )"


def put_key(directory: Path) -> None:
    file = directory / "laptop.key"
    file.write_text(KEY_TEXT)
    file.chmod(0o600)


def with_everything(text: str) -> str:
    """The starter with every `#key = value` and `#[table]` in force."""
    return re.sub(r"^#(?=\[|\w+ = )", "", text, flags=re.MULTILINE)


def load_text(directory: Path, role: Role, text: str) -> Loaded:
    put_key(directory)
    file = directory / f"{role}.toml"
    file.write_text(text)
    return load(file)


@pytest.mark.parametrize("role", ROLES)
def test_conf_holds_the_starter(role: Role) -> None:
    assert (CONF / f"{role}.toml").read_text() == starter_text(role)


@pytest.mark.parametrize("role", ROLES)
def test_starter_is_valid(tmp_path: Path, role: Role) -> None:
    loaded = load_text(tmp_path, role, starter_text(role))
    assert (loaded.settings.role, loaded.warnings) == (role, ())


@pytest.mark.parametrize("role", ROLES)
def test_starter_lines_fit_a_screen(role: Role) -> None:
    assert max(map(len, starter_text(role).splitlines())) <= 120


def keys_of(shape: Any) -> dict[str, set[str]]:
    """Table -> its keys, as the schema has them; "" is the top, and tables of several modes have theirs in the name."""
    tables: dict[str, set[str]] = {"": set()}
    for field in msgspec.inspect.type_info(shape).fields:  # type: ignore[union-attr]
        inner = structs_in(field.type)
        if not inner:
            tables[""].add(field.name)
        for table in inner:
            mode = {table.tag_field} if table.tag_field else set()
            tables[f"{field.name} {table.tag}" if mode else field.name] = {each.name for each in table.fields} | mode
    return tables


def structs_in(kind: Any) -> list[Any]:
    if isinstance(kind, msgspec.inspect.StructType):
        return [kind]
    parts = [
        *getattr(kind, "types", ()),
        *(getattr(kind, name) for name in ("type", "item_type") if hasattr(kind, name)),
    ]
    return [found for part in parts for found in structs_in(part)]


@pytest.mark.parametrize(("role", "shape"), [("client", ClientFile), ("server", ServerFile)])
def test_starter_shows_every_key(role: Role, shape: Any) -> None:
    document = tomllib.loads(with_everything(starter_text(role)))
    shown: dict[str, set[str]] = {"": set()}
    for key, value in document.items():
        for table in value if isinstance(value, list) else [value]:
            if isinstance(table, dict):
                shown[f"{key} {table['mode']}" if "mode" in table else key] = set(table)
            else:
                shown[""].add(key)
    wanted = {table: names - OTHER_SPELLINGS for table, names in keys_of(shape).items()}
    assert shown == wanted
    for spelling in OTHER_SPELLINGS & {name for names in keys_of(shape).values() for name in names}:
        assert f" {spelling} = " in starter_text(role)


@pytest.mark.parametrize("role", ROLES)
def test_starter_shows_true_defaults(tmp_path: Path, role: Role) -> None:
    """Everything in force, examples aside, changes nothing."""
    text = starter_text(role)
    examples = (
        r"^#(user|group|file|socket|congestion|rotate_after|source|tunnels|dev|mtu|capture|\[metrics\]\n#listen)\b.*\n"
    )
    kept = re.sub(examples, "", text, flags=re.MULTILINE)
    assert kept != text
    with_spray = load_text(tmp_path, role, re.sub(SPRAY_REQUIRED, "", text, flags=re.MULTILINE))
    assert [tunnel.mode for tunnel in with_spray.settings.tunnels] == ["stripe", "spray"]
    assert load_text(tmp_path, role, with_everything(kept)) == with_spray
    assert len(re.findall(r"^#\w+ = ", kept, flags=re.MULTILINE)) >= 18


@pytest.mark.parametrize("role", ROLES)
def test_defaults_that_the_starter_sets_are_the_true_ones(tmp_path: Path, role: Role) -> None:
    text = starter_text(role)
    bare = re.sub(r"^(workers|suite|somaxconn) = .*\n", "", text, flags=re.MULTILINE)
    assert bare != text
    assert load_text(tmp_path, role, bare) == load_text(tmp_path, role, text)


def test_init_of_both_roles_in_one_place_share_the_key(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "place"
    client = write_starter("client", directory)
    server = write_starter("server", directory)
    assert (client.fresh, server.fresh) == (True, False)
    assert client.key_file == server.key_file and client.key_file.stat().st_mode & 0o777 == 0o600
    secrets = {load(written.config_file).settings.keys[0].secret for written in (client, server)}
    assert secrets == {read_key_file(client.key_file)[0]}
    assert load(client.config_file).warnings == ()


def test_init_makes_another_key_each_time(tmp_path: Path) -> None:
    keys = {read_key_file(write_starter("server", tmp_path / name).key_file)[0] for name in "ab"}
    assert len(keys) == 2


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text("mine")
    with pytest.raises(ForwarderError, match=r"client\.toml exists already"):
        write_starter("client", tmp_path)
    assert file.read_text() == "mine" and not (tmp_path / "laptop.key").exists()


def test_init_keeps_a_key_and_refuses_what_is_none(tmp_path: Path) -> None:
    put_key(tmp_path)
    assert not write_starter("client", tmp_path).fresh
    assert (tmp_path / "laptop.key").read_text() == KEY_TEXT
    (tmp_path / "laptop.key").write_text("mine")
    with pytest.raises(ConfigError, match="found 3 bytes"):
        write_starter("server", tmp_path)
    assert (tmp_path / "laptop.key").read_text() == "mine" and not (tmp_path / "server.toml").exists()


def test_init_where_no_directory_can_be_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ForwarderError, match=r"Not a directory|File exists"):
        write_starter("client", tmp_path / "file" / "below")
