"""The machine that figures are of, without a name or a path."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def machine() -> str:
    """Cores, CPU, kernel, Python and gevent, in one line."""
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} core{'s' * (cores > 1)} of {_model()}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, gevent {version('gevent')}"
    )


def _model() -> str:
    for line in _CPUINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
