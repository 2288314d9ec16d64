"""An instance that asks for receive buffers of only so many bytes, and so advertises a smaller window scale:
`python -m tests.system.narrow BYTES start -c FILE`."""

import sys
from pathlib import Path

from forwarder import config
from forwarder.launch import run
from forwarder.source import Source
from workers.io import fake_handshake

if __name__ == "__main__":
    _, size, command, option, name = sys.argv
    assert (command, option) == ("start", "-c")
    vars(fake_handshake).update(WINDOW_BYTES=int(size))
    sys.exit(run(config.load(Path(name)).settings, Source(Path(name))))
