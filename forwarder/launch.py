"""From the command line to a running supervisor: the start of an instance, and its going on after an upgrade."""

import os
import secrets
from functools import partial
from logging import ERROR
from pathlib import Path

from setproctitle import setproctitle

from forwarder import logs
from forwarder.child import WorkerMain, run_worker
from forwarder.daemon import Announcement, detach
from forwarder.errors import BootError
from forwarder.instance import PidFile
from forwarder.logs import log
from forwarder.reload import begin
from forwarder.source import Source
from forwarder.supervisor import Supervisor
from forwarder.timing import Timing
from forwarder.upgrade import Program
from forwarder.upgrade import State as Saved
from workers.settings import Settings


def run(
    settings: Settings,
    source: Source,
    pid_file: Path | None = None,
    daemon: bool = False,
    *,
    worker_main: WorkerMain = run_worker,
    timing: Timing | None = None,
) -> int:
    """Runs the instance to its end or, with `daemon`, until it serves in the background. Returns the exit code.

    What went wrong is one line on standard error. settings: as `source` has them now. worker_main: what a worker runs
    after the fork.
    """
    program = Program.of_this_process()
    announcement = Announcement()
    output: logs.FileOutput | None = None
    try:
        if daemon and settings.log.file is None:
            raise BootError(78, f"{source.file}: log.file: expected a file for --daemon, found none")
        pid = PidFile(pid_file) if pid_file is not None else None
        output = logs.FileOutput(settings.log.file)
        if daemon:
            outcome = detach()
            if isinstance(outcome, int):
                return outcome
            announcement = outcome
            output.take_standard_error()
        logs.set_up(settings.log, output, "supervisor")
        setproctitle(f"forwarder: supervisor {source.file.name}")
        running = begin(settings, partial(secrets.randbits, 64))
        parts = (source, program, announcement, output, pid, worker_main, timing or Timing())
        return Supervisor(running, *parts).run()
    except BootError as error:
        announcement.failed(error.code, error.message)
        return error.code
    finally:
        announcement.close()
        if output is not None:
            output.close()


def resume(saved: Saved, source: Source, *, worker_main: WorkerMain = run_worker, timing: Timing | None = None) -> int:
    """The same for an instance that runs already, as this process under another program. Returns the exit code."""
    program = Program.of_this_process()
    output = logs.FileOutput(None)
    trouble = ""
    if saved.daemon:
        os.chdir("/")
    try:
        output.move(saved.running.settings.log.file)
        if saved.daemon:
            output.take_standard_error()
    except BootError as error:
        trouble = error.message
    logs.set_up(saved.running.settings.log, output, "supervisor")
    if trouble:
        log(ERROR, "the log goes to standard error", reason=trouble)
    setproctitle(f"forwarder: supervisor {source.file.name}")
    pid = PidFile.restored(saved.pid_file) if saved.pid_file is not None else None
    try:
        parts = (source, program, Announcement(), output, pid, worker_main, timing or Timing())
        return Supervisor(saved.running, *parts, saved).run()
    finally:
        output.close()
