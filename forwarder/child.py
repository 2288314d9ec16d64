"""A worker's process, from the fork to the worker's own code."""

import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from logging import CRITICAL
from typing import NoReturn

from setproctitle import setproctitle

from forwarder.errors import BootError
from forwarder.logs import WorkerOutput, log, set_up
from forwarder.privileges import Identity, become, capabilities_wanted, die_with_parent
from forwarder.signals import reset_in_worker
from forwarder.slots import ENCODER
from workers.boot import Boot, Failed

WorkerMain = Callable[[Boot], None]


@dataclass(frozen=True, slots=True)
class Birth:
    """What the child does first. release: closes what is the supervisor's or another worker's."""

    supervisor_pid: int
    identity: Identity | None
    log_sender: socket.socket
    main: WorkerMain
    release: Callable[[], None]


def live(boot: Boot, birth: Birth) -> NoReturn:
    """The whole life of the worker's process; called in the child with signals blocked."""
    code = 1
    try:
        birth.release()
        reset_in_worker()
        gc.freeze()  # objects of the supervisor's stay where they are, unwritten
        set_up(boot.settings.log, WorkerOutput(birth.log_sender), f"worker {boot.slot}")
        setproctitle(f"forwarder: worker {boot.slot}")
        if boot.settings.pin:
            _pin(boot.seat)
        if birth.identity is not None:
            become(birth.identity, capabilities_wanted(boot.settings))
        if die_with_parent(birth.supervisor_pid):
            birth.main(boot)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BootError as error:
        boot.channel.send(ENCODER.encode(Failed(error.code, error.message)))
    except BaseException:
        log(CRITICAL, "a worker crashed", error=traceback.format_exc())
    finally:
        _flush()
        os._exit(code)


def run_worker(boot: Boot) -> None:
    """The real worker; only now does gevent come into the process."""
    from workers.worker import run  # noqa: PLC0415

    run(boot)


def _pin(seat: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[seat % len(cores)]})


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
