"""Imports point one way: core <- shm <- io <- worker <- forwarder, and core knows nothing of the outside."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = frozenset({"gevent", "socket", "select", "os", "time", "threading", "random", "logging"})

# The agreed values that pass between the layers; they import nothing but each other.
VALUES = ("workers.settings", "workers.status", "workers.boot")

# What the modules of a layer may import of ours; the longest prefix that fits a module is its layer.
MAY_IMPORT = {
    "workers.settings": (),
    "workers.status": (),
    "workers.boot": ("workers.settings",),
    "workers.core": ("workers.core",),
    "workers.shm": ("workers.core", "workers.shm", *VALUES),
    "workers.io": ("workers.core", "workers.shm", "workers.io", *VALUES),
    "workers": ("workers",),
    "forwarder": ("forwarder", "workers"),
}


def is_under(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(module: str, source: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere in the source, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*kept, base] if base else kept)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in {"__import__", "import_module"} and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    layer = max((name for name in MAY_IMPORT if is_under(module, name)), key=len)
    found = []
    for line, name in imports_of(module, source, is_package):
        ours = is_under(name, "workers") or is_under(name, "forwarder")
        if ours and not any(is_under(name, allowed) for allowed in MAY_IMPORT[layer]):
            found.append(f"{module}:{line}: {layer} must not import {name}")
        elif layer == "workers.core" and name.split(".")[0] in OUTSIDE:
            found.append(f"{module}:{line}: core must not import {name}")
    return found


MODULES = sorted([*(ROOT / "forwarder").rglob("*.py"), *(ROOT / "workers").rglob("*.py")])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    assert violations(name_of(path), path.read_text(), path.name == "__init__.py") == []


def test_every_layer_is_looked_at() -> None:
    names = [name_of(path) for path in MODULES]
    for layer in MAY_IMPORT:
        assert any(is_under(name, layer) for name in names), layer


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("workers.core.stream", "import time"),
        ("workers.core.stream", "import os.path as p"),
        ("workers.core.stream", "from random import Random"),
        ("workers.core.stream", "from gevent.socket import socket"),
        ("workers.core.stream", "def late():\n    import logging"),
        ("workers.core.stream", "__import__('socket')"),
        ("workers.core.stream", "importlib.import_module('select')"),
        ("workers.core.stream", "from workers.shm import ring"),
        ("workers.core.stream", "from workers import shm"),
        ("workers.core.stream", "from .. import io"),
        ("workers.core.stream", "from ..shm.ring import Ring"),
        ("workers.core.stream", "import workers.settings"),
        ("workers.shm.ring", "from workers.io import stripe"),
        ("workers.io.stripe", "from workers.worker import run"),
        ("workers.io.stripe", "import forwarder"),
        ("workers.worker", "from forwarder.config import load"),
        ("workers.settings", "from workers.core import frame"),
    ],
)
def test_import_against_the_direction_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("workers.core.stream", "from workers.core.frame import Data\nimport struct\nfrom .reorder import Reorder"),
        ("workers.core.stream", "import timeit"),
        ("workers.shm.ring", "from workers.core import frame\nimport os"),
        ("workers.io.stripe", "from workers.shm.ring import Ring\nimport gevent, socket"),
        ("workers.worker", "from workers.io import stripe"),
        ("forwarder.cli", "from workers.settings import Settings"),
    ],
)
def test_import_along_the_direction_is_fine(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_supervisor_side_imports_no_gevent() -> None:
    """Workers import gevent after the fork, so nothing that the supervisor imports may."""
    names = [name_of(path) for path in MODULES if path.is_relative_to(ROOT / "forwarder") and path.stem != "__main__"]
    imports = "\n".join(f"import {name}" for name in names)
    code = f"import sys\n{imports}\nsys.exit('gevent' in sys.modules and 'gevent was imported')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
