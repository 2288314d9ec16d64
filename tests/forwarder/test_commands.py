"""The command line: what each command hands on, prints and exits with."""

import base64
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import forwarder.control
import forwarder.launch
from forwarder import __version__, config
from forwarder.cli import commands
from forwarder.control import ControlError
from forwarder.errors import BootError, NotPermitted, Unavailable
from forwarder.source import Source
from tests.forwarder.examples import CLIENT, EXAMPLES, KEY_TEXT, SERVER, second, write
from tests.forwarder.test_render import ANSWER

ROOT = Path(__file__).parents[2]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `start` has called the supervisor with."""
    calls: list[tuple[Any, ...]] = []

    def run(*arguments: Any) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(forwarder.launch, "run", run)
    return calls


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the running instance was asked; it answers like one."""
    calls: list[tuple[Any, ...]] = []

    def request(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return ANSWER if arguments[1]["command"] == "status" else {"ok": True}

    monkeypatch.setattr(forwarder.control, "request", request)
    return calls


def test_version() -> None:
    result = invoke("--version")
    assert (result.stdout, result.exit_code) == (f"forwarder {__version__}\n", 0)


@pytest.mark.parametrize("module", ["forwarder", "forwarder.__main__"])
def test_real_process_tells_its_version(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    assert (result.stdout, result.stderr) == (f"forwarder {__version__}\n", "")


def test_command_line_loads_only_what_it_needs() -> None:
    code = "import sys, forwarder.cli; print(*{'rich', 'msgspec', 'toml', 'gevent', 'cryptography'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    assert result.stdout == "\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["start"],
        ["bogus"],
        ["start", "-c", "client.toml", "--bogus"],
        ["start", "-c", "client.toml", "--workers", "-1"],
        ["start", "-c", "client.toml", "--workers", "65"],
        ["start", "-c", "client.toml", "--log-level", "loud"],
        ["init", "relay"],
        ["status", "-c", "client.toml", "extra"],
        ["top", "-c", "client.toml", "--interval", "0.1"],
        ["top", "-c", "client.toml", "--interval", "nan"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], started: list[Any]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout, started) == (2, "", [])
    assert result.stderr


def test_genkey_prints_32_fresh_bytes() -> None:
    lines = {invoke("genkey").stdout for _ in range(3)}
    assert len(lines) == 3
    for line in lines:
        assert line.endswith("\n") and len(base64.b64decode(line.rstrip("\n"), validate=True)) == 32


def test_init_then_check_passes(tmp_path: Path) -> None:
    for role in ("client", "server"):
        made = invoke("init", role, "-o", tmp_path)
        assert (made.exit_code, made.stderr) == (0, "")
        assert str(tmp_path / "laptop.key") in made.stdout
        checked = invoke("check", "-c", tmp_path / f"{role}.toml")
        assert (checked.exit_code, checked.stderr) == (0, "")
    again = invoke("init", "client", "-o", tmp_path)
    line = f"{tmp_path / 'client.toml'} exists already: nothing is written\n"
    assert (again.exit_code, again.stderr, again.stdout) == (1, line, "")


def test_init_writes_here_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("init", "client").exit_code == 0
    assert {file.name for file in tmp_path.iterdir()} == {"client.toml", "laptop.key"}


@pytest.mark.parametrize("role", EXAMPLES)
def test_check_prints_what_is_in_effect_and_no_key(tmp_path: Path, role: str) -> None:
    more = {"window_max": '"64KiB"', "resume_timeout": '"90s"'}
    text = EXAMPLES[role].replace('key_file = "laptop.key"', f'key = "{KEY_TEXT}"') + second(role, **more)
    file = write(tmp_path, role, f"workers = 3\n{text}")
    file.chmod(0o600)
    result = invoke("check", "-c", file)
    assert (result.exit_code, result.stderr) == (0, "")
    assert KEY_TEXT not in result.stdout
    document = tomllib.loads(result.stdout)
    assert (document["role"], document["workers"], document["drain_timeout"]) == (role, 3, "30s")
    web, ssh = document["tunnel"]
    assert (web["window_max"], web["resume_timeout"], web["host_port"]) == ("32MiB", "30s", 9000)
    assert (ssh["window_max"], ssh["resume_timeout"], ssh["host_port"]) == ("64KiB", "90s", 9001)


@pytest.mark.parametrize("role", EXAMPLES)
def test_what_check_prints_means_the_same(tmp_path: Path, role: str) -> None:
    """Given the key back, it is a configuration with the same settings."""
    file = write(
        tmp_path, role, EXAMPLES[role] + second(role, congestion='"bbr"') + '[metrics]\nlisten = "[::1]:9464"\n'
    )
    again = tmp_path / "again.toml"
    again.write_text(invoke("check", "-c", file).stdout.replace("hidden", KEY_TEXT))
    assert config.load(again).settings == config.load(file).settings


def test_check_warns_on_standard_error(tmp_path: Path) -> None:
    file = write(tmp_path, "client")
    key = tmp_path / "laptop.key"
    key.chmod(0o644)
    result = invoke("check", "-c", file)
    assert (result.exit_code, result.stderr) == (0, f"warning: auth.key_file: every user of this host may read {key}\n")


def test_start_hands_over_the_settings(tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "client")
    monkeypatch.chdir(tmp_path)
    result = invoke("start", "-c", "client.toml")
    assert (result.exit_code, result.output) == (0, "")
    file = tmp_path / "client.toml"
    assert started == [(config.load(file).settings, Source(file), None, False)]


def test_start_options_override_the_file(tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "usable_cores", lambda: 9)
    file = write(tmp_path, "server", SERVER.replace("[[client]]", 'workers = 3\nlog.format = "json"\n[[client]]'))
    options = ("--daemon", "--pid-file", "x.pid", "--workers", "2", "--log-level", "debug")
    assert invoke("start", "-c", file, *options).exit_code == 0
    settings, _, pid_file, daemon = started[0]
    assert (settings.workers, settings.log.level, settings.log.format) == (2, "debug", "json")
    assert (pid_file, daemon) == (Path("x.pid"), True)
    assert invoke("start", "-c", file, "--workers", "0").exit_code == 0
    assert (started[1][0].workers, started[1][0].log.level) == (9, "info")


@pytest.mark.parametrize(
    ("error", "code"),
    [(BootError(69, "port 80: taken"), 69), (Unavailable("port 80: taken"), 69), (NotPermitted("port 80: taken"), 77)],
)
def test_start_that_fails_prints_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def run(*_: Any) -> int:
        raise error

    monkeypatch.setattr(forwarder.launch, "run", run)
    result = invoke("start", "-c", write(tmp_path, "client"))
    assert (result.exit_code, result.stderr, result.stdout) == (code, "port 80: taken\n", "")


def test_start_exits_as_the_supervisor_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder.launch, "run", lambda *_: 77)
    assert invoke("start", "-c", write(tmp_path, "client")).exit_code == 77


def test_stop_waits_for_the_drain(tmp_path: Path, asked: list[Any]) -> None:
    file = write(tmp_path, "client", f'drain_timeout = "2m"\ncontrol.socket = "own.sock"\n{CLIENT}')
    assert [invoke("stop", "-c", file).output, invoke("stop", "--now", "-c", file).output] == ["", ""]
    (path, message, timeout_s), (_, message_now, timeout_now_s) = asked
    assert (path, message, message_now) == (
        tmp_path / "own.sock",
        {"command": "stop", "now": False},
        {"command": "stop", "now": True},
    )
    assert timeout_s > 120 > timeout_now_s > 5


def test_reload_tells_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, Any]] = [
        {"changes": ["tunnel 'web': changed (local)", "key 'a': added"]},
        {"changes": []},
        {"error": "it.toml: user cannot change\nwhile it runs", "code": 78},
    ]
    monkeypatch.setattr(forwarder.control, "request", lambda *_: answers.pop(0))
    file = write(tmp_path, "client")
    results = [invoke("reload", "-c", file) for _ in range(3)]
    assert [result.exit_code for result in results] == [0, 0, 78]
    assert results[0].stdout == "tunnel 'web': changed (local)\nkey 'a': added\n"
    assert results[1].stdout == "nothing has changed\n"
    assert results[2].stderr == "it.toml: user cannot change\\nwhile it runs\n"


def test_status_prints_the_answer(tmp_path: Path, asked: list[Any]) -> None:
    file = write(tmp_path, "client")
    as_json, for_people = invoke("status", "-c", file, "--json"), invoke("status", "-c", file)
    assert (as_json.exit_code, json.loads(as_json.stdout), as_json.stdout.count("\n")) == (0, ANSWER, 1)
    assert for_people.exit_code == 0 and "degraded" in for_people.stdout
    assert [message for _, message, _ in asked] == [{"command": "status"}] * 2


def test_status_of_one_tunnel_or_with_every_carrier(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ANSWER | {"tunnels": [ANSWER["tunnels"][0], ANSWER["tunnels"][0] | {"name": "ssh"}]}
    monkeypatch.setattr(forwarder.control, "request", lambda *_: other)
    file = write(tmp_path, "client")
    one = json.loads(invoke("status", "-c", file, "--json", "--tunnel", "ssh").stdout)
    assert [tunnel["name"] for tunnel in one["tunnels"]] == ["ssh"]
    assert "ssh" not in invoke("status", "-c", file, "--tunnel", "web").stdout
    assert "stripe 3" in invoke("status", "-c", file, "--carriers").stdout
    none = invoke("status", "-c", file, "--tunnel", "kcp")
    assert (none.exit_code, none.stdout) == (2, "")
    assert none.stderr == "--tunnel: expected one of web, ssh, found kcp\n"


def test_top_without_a_terminal_is_one_line_and_exit_2(tmp_path: Path) -> None:
    result = invoke("top", "-c", write(tmp_path, "client"))
    line = "top: expected a terminal as standard input, found none; `forwarder status` needs none\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", line)


@pytest.mark.parametrize("command", ["stop", "status", "reload"])
def test_without_an_instance_one_line_and_exit_1(tmp_path: Path, command: str) -> None:
    file = write(tmp_path, "client", f'control.socket = "own.sock"\n{CLIENT}')
    result = invoke(command, "-c", file)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and str(tmp_path / "own.sock") in result.stderr


@pytest.mark.parametrize("answer", [ControlError("no answer within 1 s"), {"error": "no such command"}, {"workers": 1}])
def test_answer_that_is_none_is_one_line_and_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Exception | dict[str, Any]
) -> None:
    def request(*_: Any) -> dict[str, Any]:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(forwarder.control, "request", request)
    result = invoke("status", "-c", write(tmp_path, "client"))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
