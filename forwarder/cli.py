"""The command line. Whatever goes wrong ends in one line on standard error and an exit code.

What a command needs is imported when it runs: `forwarder --version` loads nothing but click.
"""
# ruff: noqa: PLC0415

import json
import os
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forwarder import __version__
from forwarder.errors import ForwarderError, NotPermitted, complain, one_line

if TYPE_CHECKING:
    from forwarder.config import Loaded

STATUS_TIMEOUT_S = 10.0
RELOAD_TIMEOUT_S = 60.0
"""A reload waits for its turn, and then for every worker."""
STOP_MARGIN_S = 15.0
"""Beyond the drain itself: the supervisor's own margin, and closing."""


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; what it raises on purpose becomes its exit code."""
        try:
            return super().invoke(ctx)
        except ForwarderError as error:
            complain(one_line(str(error)))
            raise click.exceptions.Exit(error.code) from error


def main() -> None:
    """The `forwarder` command."""
    commands(prog_name="forwarder")


_path = click.Path(path_type=Path, readable=False)  # who opens it says what is wrong, in one line

_config = click.option(
    "-c",
    "--config",
    "file",
    required=True,
    metavar="FILE",
    type=_path,
    help="Configuration file; it names the instance.",
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s", prog_name="forwarder")
def commands() -> None:
    """Make remote TCP and UDP ports local ones: connections striped over many sockets, datagrams over many ports."""


@commands.command()
@_config
@click.option("--daemon", is_flag=True, help="Return once it serves, and go on in the background.")
@click.option("--pid-file", metavar="F", type=_path, help="Write the process id here.")
@click.option("--workers", metavar="N", type=click.IntRange(0, 64), help="Worker processes; 0: one per usable core.")
@click.option(
    "--log-level",
    metavar="L",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="debug, info, warning or error.",
)
def start(file: Path, daemon: bool, pid_file: Path | None, workers: int | None, log_level: Any) -> None:
    """Run an instance, in the foreground unless told otherwise."""
    from forwarder.launch import resume, run
    from forwarder.source import Source
    from forwarder.upgrade import inherited

    source = Source(file.absolute(), workers, log_level)
    saved = inherited(os.environ)
    if saved is not None:
        raise click.exceptions.Exit(resume(saved, source))
    settings = source.applied(_load(file).settings)
    raise click.exceptions.Exit(run(settings, source, pid_file, daemon))


@commands.command()
@_config
@click.option("--now", is_flag=True, help="Close open connections at once.")
def stop(file: Path, now: bool) -> None:
    """Stop the running instance; it finishes what is open first."""
    from forwarder.config import find_instance

    instance = find_instance(file)
    timeout_s = STOP_MARGIN_S + (0.0 if now else instance.drain_timeout_s)
    _ask(instance.control_socket, {"command": "stop", "now": now}, timeout_s)


@commands.command()
@_config
def reload(file: Path) -> None:
    """Have the running instance read its file again; connections of tunnels that did not change stay."""
    from forwarder.config import find_instance

    answer = _ask(find_instance(file).control_socket, {"command": "reload"}, RELOAD_TIMEOUT_S)
    for line in answer.get("changes") or ["nothing has changed"]:
        click.echo(one_line(str(line)))


@commands.command()
@_config
@click.option("--tunnel", metavar="NAME", help="This tunnel alone.")
@click.option("--carriers", is_flag=True, help="Every carrier, however many there are.")
@click.option("--json", "as_json", is_flag=True, help="The answer as one JSON object.")
def status(file: Path, tunnel: str | None, carriers: bool, as_json: bool) -> None:
    """Show what the running instance does."""
    from forwarder.config import find_instance

    answer = _ask(find_instance(file).control_socket, {"command": "status"}, STATUS_TIMEOUT_S)
    if tunnel is not None:
        from forwarder.summary import keep_tunnel

        answer = keep_tunnel(answer, tunnel)
    if as_json:
        click.echo(json.dumps(answer))
        return
    from msgspec import ValidationError

    from forwarder.render import print_status

    try:
        print_status(answer, every_carrier=carriers)
    except ValidationError as error:
        raise ForwarderError(f"the answer is not one of this version: {error}") from error


@commands.command()
@_config
@click.option(
    "--interval",
    metavar="S",
    type=click.FloatRange(0.5, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
def top(file: Path, interval: float) -> None:
    """Show what the running instance does, live in the terminal; ? tells the keys."""
    from forwarder.config import find_instance
    from forwarder.top.live import run

    if isnan(interval):  # which is in every range
        raise click.BadParameter("'nan' is not a number of seconds.", param_hint="'--interval'")
    raise click.exceptions.Exit(run(file.name, find_instance(file).control_socket, interval))


@commands.command()
@_config
@click.option("--upgrade-from", metavar="V", type=int, hidden=True)
def check(file: Path, upgrade_from: int | None) -> None:
    """Validate a configuration and print what is in effect, keys hidden."""
    loaded = _load(file)
    if upgrade_from is not None:
        from forwarder.upgrade import check_upgrade

        check_upgrade(upgrade_from)
    from forwarder.effective import effective_toml

    click.echo(effective_toml(loaded.settings), nl=False)


@commands.command()
@click.argument("role", type=click.Choice(["client", "server"]))
@click.option(
    "-o",
    "directory",
    metavar="DIR",
    default=".",
    type=_path,
    help="Where to write; default: here.",
)
def init(role: Any, directory: Path) -> None:
    """Write a commented starter configuration with a fresh key."""
    from forwarder.starter import write_starter

    written = write_starter(role, directory)
    other = "server" if role == "client" else "client"
    click.echo(f"{written.config_file}: written")
    click.echo(f"{written.key_file}: {'a fresh key' if written.fresh else 'kept, it holds a key already'}")
    click.echo(f"The {other} needs the same key: copy {written.key_file.name} there over a safe way.")


@commands.command()
def genkey() -> None:
    """Print 32 random bytes in base64."""
    from forwarder.keys import new_key

    click.echo(new_key())


@commands.command()
@click.argument("file", type=_path)
@click.option("--role", type=click.Choice(["client", "server"]), help="Whose file to make of mtcp's; default: client.")
@click.option("--key-id", metavar="NAME", default="laptop", show_default=True, help="Name of the client's key.")
def convert(file: Path, role: Any, key_id: str) -> None:
    """Print a configuration file of mtcp or rsock as TOML.

    What has no equivalent is said on standard error.
    """
    from forwarder.convert import convert_file

    text, notes = convert_file(file, role, key_id)
    for note in notes:
        complain(one_line(f"note: {note}"))
    click.echo(text, nl=False)


@commands.command()
@click.option("-c", "--config", "file", metavar="FILE", type=_path, help="What it needs as well.")
@click.option("--fix", is_flag=True, help="Set, as root, the kernel settings that are too small, for now and at boot.")
@click.option("--json", "as_json", is_flag=True, help="The findings as one JSON object.")
def doctor(file: Path | None, fix: bool, as_json: bool) -> None:
    """Say what this host lacks, and what mends it.

    The exit code is 1 if something is lacking.
    """
    from forwarder.doctor.command import run_doctor

    raise click.exceptions.Exit(run_doctor(file, fix, as_json))


def _load(file: Path) -> "Loaded":
    """The checked configuration; warnings go to standard error."""
    from forwarder.config import load

    loaded = load(file)
    for warning in loaded.warnings:
        complain(one_line(f"warning: {warning}"))
    return loaded


def _ask(control_socket: Path, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The running instance's answer; ForwarderError if there is none, or a refusal."""
    from forwarder.control import ControlError, ControlRefused, request

    try:
        answer = request(control_socket, message, timeout_s)
    except ControlRefused as error:
        raise NotPermitted(str(error)) from error
    except ControlError as error:
        raise ForwarderError(str(error)) from error
    if "error" in answer:
        refusal = ForwarderError(one_line(str(answer["error"])))
        refusal.code = int(answer.get("code", refusal.code))
        raise refusal
    return answer
