"""The TAB key in real shells, with the files of deploy/completions as a package installs them."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.system.pseudo_terminal import PseudoTerminal

ROOT = Path(__file__).parents[2]
FILES = ROOT / "deploy" / "completions"
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], f"source {FILES}/forwarder.bash"),
    "zsh": (["zsh", "-f", "-i"], f"fpath=({FILES} $fpath); autoload -Uz compinit; compinit -u -D"),
    "fish": (["fish", "--no-config", "-i"], f"source {FILES}/forwarder.fish"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a `forwarder` to find, and two files that `-c` may mean."""
    program = tmp_path / "bin" / "forwarder"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m forwarder "$@"\n')
    program.chmod(0o755)
    for name in ("client.toml", "server.toml"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes_commands_options_and_files(shell: str, place: Path) -> None:
    argv, setup = SHELLS[shell]
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    environment = {"PATH": f"{place}/bin:/usr/bin:/bin", "HOME": str(place), "PS1": "$ ", "TERM": "xterm"}
    with PseudoTerminal(argv, 200, 24, **environment) as terminal:
        terminal.press(f" cd {place}; {setup}; echo rea''dy\n")
        terminal.wait(lambda screen: "ready" in screen.written)
        for typed, completed in (("forwarder stat", "us"), ("--carr", "iers"), ("-c cli", "ent.toml")):
            before = len(terminal.screen.written)
            terminal.press(f"{typed}\t")
            terminal.wait(lambda screen, before=before, end=completed: end in screen.written[before:])  # type: ignore[misc]
        terminal.press("\x15exit\n")
        terminal.exit_code()
