"""An instance that forgets sessions without ports soon: `python -m tests.system.forgetful SECONDS start -c FILE`."""

import sys
from pathlib import Path

from forwarder import config
from forwarder.child import run_worker
from forwarder.launch import run
from forwarder.source import Source
from workers.boot import Boot


def main(idle_s: float, file: Path) -> int:
    """Run the supervisor."""

    def worker_main(boot: Boot) -> None:
        # Only now may gevent come into the process.
        from workers.io import spray_session  # noqa: PLC0415

        vars(spray_session).update(IDLE_US=int(idle_s * 1e6))
        run_worker(boot)

    return run(config.load(file).settings, Source(file), worker_main=worker_main)


if __name__ == "__main__":
    _, seconds, command, option, name = sys.argv
    assert (command, option) == ("start", "-c")
    sys.exit(main(float(seconds), Path(name)))
