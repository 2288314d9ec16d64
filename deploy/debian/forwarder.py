#!/usr/bin/python3 -IS
"""The command, in an environment of its own: the standard library and /usr/lib/forwarder, and nothing else."""

import sys

sys.path.insert(0, "/usr/lib/forwarder")

from forwarder.cli import main

main()
