"""The systemd units as they stand: what they start, what they may, and how they end. tests/system/test_systemd.py runs
them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from forwarder.supervisor import Timing
from workers.settings import Settings

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
PLAIN, SPRAY = UNITS / "forwarder@.service", UNITS / "forwarder-spray@.service"
EXPOSURE_MAX = 3.0
RIGHTS = {PLAIN: "CAP_NET_BIND_SERVICE", SPRAY: "CAP_NET_BIND_SERVICE CAP_NET_RAW CAP_NET_ADMIN"}
BOTH = pytest.mark.parametrize("unit", [PLAIN, SPRAY], ids=lambda unit: unit.stem)


def values(unit: Path, name: str) -> list[str]:
    """Of every line that sets `name`."""
    return re.findall(rf"(?m)^{name}=(.*)$", unit.read_text())


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    command = ["systemd-analyze", "--no-pager", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@BOTH
def test_unit_runs_its_file_with_no_more_rights_than_its_mode_needs(unit: Path) -> None:
    assert values(unit, "ExecStart") == ["/usr/bin/forwarder start -c /etc/forwarder/%i.toml"]
    assert values(unit, "AmbientCapabilities") == values(unit, "CapabilityBoundingSet") == [RIGHTS[unit]]
    assert values(unit, "User") == ["forwarder"]


@BOTH
def test_exposure_is_low(unit: Path) -> None:
    said = analyze("security", "--offline=true", unit).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert found is not None, said
    assert float(found[1]) <= EXPOSURE_MAX


@BOTH
def test_systemd_understands_every_line(unit: Path, tmp_path: Path) -> None:
    for name, path in ((PLAIN.name, PLAIN), (SPRAY.name, SPRAY)):
        program = shutil.which("true") or "/bin/true"
        (tmp_path / name).write_text(path.read_text().replace("/usr/bin/forwarder", program))
    said = analyze("verify", "--man=no", tmp_path / unit.name.replace("@", "@client"))
    assert [line for line in said.stderr.splitlines() if "forwarder" in line] == []


def test_units_differ_in_rights_alone() -> None:
    plain, spray = (
        [line for line in unit.read_text().splitlines() if not re.match(r"#|Description=|Conflicts=|.*Cap.*=", line)]
        for unit in (PLAIN, SPRAY)
    )
    assert plain == spray


@BOTH
def test_stop_has_more_patience_than_a_drain(unit: Path) -> None:
    drain_s = Settings(role="client", workers=1, keys=()).drain_timeout_s
    (patience,) = values(unit, "TimeoutStopSec")
    assert float(patience.removesuffix("s")) > drain_s + Timing().drain_margin_s + Timing().quit_grace_s
    assert values(unit, "KillMode") == ["mixed"]
