"""What the package is made of agrees with the project. tests/system/test_package.py builds and installs it."""

import re
import tomllib
from pathlib import Path

from forwarder import __version__

ROOT = Path(__file__).parents[2]
DEBIAN = ROOT / "deploy" / "debian"
PIN = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)==(?P<version>\S+) --hash=sha256:[0-9a-f]{64}")
AGAIN = "run deploy/debian/pin"


def pins(name: str) -> dict[str, str]:
    """Normalized name -> version; every line has a hash."""
    lines = [line for line in (DEBIAN / name).read_text().splitlines() if not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert None not in found
    return {normalized(pin["name"]): pin["version"] for pin in found if pin is not None}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_pins_are_the_constraints_versions() -> None:
    constraints = {
        normalized(name): version
        for name, version in re.findall(r"(?m)^([\w.-]+)==([^;\s]+)", (ROOT / "deploy/constraints.txt").read_text())
    }
    for name, version in (pins("requirements.txt") | pins("build-requirements.txt")).items():
        assert constraints[name] == version, AGAIN


def test_environment_holds_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [re.split(r"[><=~;\[ ]", dependency)[0] for dependency in project["dependencies"]]
    wanted += ["pypcap", "impacket", "six"]
    assert {normalized(name) for name in wanted} <= pins("requirements.txt").keys(), AGAIN


def test_changelog_is_about_this_version() -> None:
    assert (DEBIAN / "changelog").read_text().startswith(f"forwarder ({__version__}-")


def test_files_to_install_are_there() -> None:
    for name in ("install", "examples", "docs"):
        for line in (DEBIAN / f"forwarder.{name}").read_text().splitlines():
            assert list(ROOT.glob(line.split()[0])), line


def test_examples_of_configuration_get_their_user() -> None:
    for role in ("client", "server"):
        assert len(re.findall(r"(?m)^#user = ", (ROOT / "conf" / f"{role}.toml").read_text())) == 1
