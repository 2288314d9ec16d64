"""Compiles the emulator into memory: nothing of it stays on disk, and a directory mounted noexec does no harm."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.netlab.errors import NoCompiler

_SOURCES = Path(__file__).parent / "emulator"


@functools.cache
def emulator() -> str:
    """The path of the compiled program, good while this process lives."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise NoCompiler("the link emulator needs a C compiler (cc, gcc or clang)")
    with tempfile.TemporaryDirectory(prefix="netlab-") as folder:
        program = Path(folder, "link")
        sources = [str(path) for path in sorted(_SOURCES.glob("*.c"))]
        done = subprocess.run(
            [compiler, "-std=gnu11", "-O2", "-o", str(program), *sources],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise NoCompiler(f"the link emulator does not compile: {done.stderr.strip()}")
        memory = os.memfd_create("netlab-link")
        with os.fdopen(memory, "wb", closefd=False) as file:
            file.write(program.read_bytes())
    return f"/proc/{os.getpid()}/fd/{memory}"
