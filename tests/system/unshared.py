"""Shell scripts in namespaces of their own: what they mount or set is nobody else's."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0
# An instance in the background, too, ends with the script.
FORWARDER = f"setpriv --pdeathsig KILL {sys.executable} -m forwarder"


@functools.cache
def _prefix() -> tuple[str, ...] | None:
    for flags in (("-nm",), ("-Urnm",)):
        prefix = ("unshare", *flags, "--")
        try:
            done = subprocess.run([*prefix, "mount", "-t", "tmpfs", "none", "/run"], check=False, capture_output=True)
        except OSError:
            return None
        if done.returncode == 0:
            return prefix
    return None


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a shell script as root of its own network and mounts, in `folder`. `forwarder` is this one's command, and
    `$FORWARDER start ... &` has its pid."""
    prefix = _prefix()
    if prefix is None:
        pytest.skip("no namespaces of one's own here")
    head = f'set -e\nFORWARDER="{FORWARDER}"\nforwarder() {{ $FORWARDER "$@"; }}\nip link set lo up\ncd {folder}\n'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*prefix, "sh", "-c", head + script],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment,
    )
