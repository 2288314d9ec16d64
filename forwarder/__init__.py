"""forwarder: application traffic between two hosts over many transport connections at once.

This package is the command line, the configuration and the supervisor; no traffic passes here (that is `workers`).
"""

__version__ = "0.1.0"
