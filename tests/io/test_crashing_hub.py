"""What ends a worker, and what does not: each in a process of its own."""

import subprocess
import sys

import pytest

from workers.worker import CRASHED

START = """
import gevent
from gevent import socket
from gevent.hub import set_hub
from workers.worker import CrashingHub
"""
UNKNOWN_NAME = """
set_hub(CrashingHub())
try:
    socket.getaddrinfo("nosuch.invalid", 1)
except socket.gaierror:
    gevent.sleep(0.01)
"""
BUG = """
set_hub(CrashingHub())
gevent.spawn(lambda: 1 / 0)
gevent.sleep(10)
"""


@pytest.mark.parametrize(
    ("script", "code"), [(UNKNOWN_NAME, 0), (BUG, CRASHED)], ids=["a name that is not known", "a bug"]
)
def test_worker_ends_for_a_bug_and_not_for_an_unknown_name(script: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", START + script], check=False, timeout=30, stderr=subprocess.DEVNULL)
    assert done.returncode == code
