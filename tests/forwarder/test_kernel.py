"""A congestion control that the kernel does not have is a mistake in the configuration, found before the start."""

from pathlib import Path

import pytest

from forwarder.config import load
from forwarder.errors import ConfigError
from forwarder.kernel import AVAILABLE, check_congestion
from tests.forwarder.examples import CLIENT, EXAMPLES, write

pytestmark = pytest.mark.skipif(not AVAILABLE.exists(), reason="this kernel has no list")


def settings_with(directory: Path, role: str, algorithm: str) -> tuple[Path, object]:
    text = EXAMPLES[role].replace('mode = "stripe"', f'mode = "stripe"\ncongestion = "{algorithm}"')
    file = write(directory, role, text)
    return file, load(file).settings


@pytest.mark.parametrize("role", ["client", "server"])
def test_unknown_congestion_control_names_the_key_and_those_there_are(tmp_path: Path, role: str) -> None:
    file, settings = settings_with(tmp_path, role, "nosuch")
    with pytest.raises(ConfigError) as refused:
        check_congestion(file, settings)  # type: ignore[arg-type]
    there = ", ".join(AVAILABLE.read_text().split())
    expected = f'{file}: tunnel[1] "web".congestion: expected one that this kernel has ({there}), found "nosuch"'
    assert str(refused.value) == expected
    assert refused.value.code == 78


def test_congestion_control_that_is_there_passes(tmp_path: Path) -> None:
    check_congestion(*settings_with(tmp_path, "client", AVAILABLE.read_text().split()[0]))  # type: ignore[arg-type]
    check_congestion(tmp_path, load(write(tmp_path, "client", CLIENT)).settings)
