"""The manual page is what deploy/manpage makes of the program's commands, and groff finds nothing wrong with it."""

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from forwarder.cli import commands

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "deploy" / "forwarder.1"


def test_page_is_what_its_program_writes() -> None:
    command = [sys.executable, str(ROOT / "deploy" / "manpage")]
    written = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert written == PAGE.read_text(), "run deploy/manpage >deploy/forwarder.1"


def test_every_command_and_option_is_in_it() -> None:
    sections = PAGE.read_text().replace("\\-", "-").split("\n.SS ")
    told = {section.partition("\n")[0]: section for section in sections[1:]}
    assert list(told) == list(commands.commands)
    for name, command in commands.commands.items():
        for option in command.params:
            if isinstance(option, click.Option):
                assert f".B {', '.join(option.opts)}" in told[name], (name, option.opts)


def test_page_has_no_mistake_for_groff() -> None:
    if shutil.which("man") is None or shutil.which("groff") is None:
        pytest.skip("no man or groff here")
    command = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(PAGE)]
    env = {"MANROFFSEQ": "", "PATH": "/usr/bin:/bin", "MANWIDTH": "80"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=env)
    assert done.stderr == ""


def test_page_has_the_sections_that_one_expects() -> None:
    sections = [line[4:] for line in PAGE.read_text().splitlines() if line.startswith(".SH ")]
    assert sections[:5] == ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "COMMANDS"]
    assert {"SIGNALS", "EXIT STATUS", "FILES", "EXAMPLES", "SEE ALSO"} <= set(sections)
