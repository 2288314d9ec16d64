"""The command: examine, mend if asked to, examine again, report."""

import json
from pathlib import Path

import click

from forwarder.doctor.examine import examine
from forwarder.doctor.finding import Status
from forwarder.doctor.host import Host
from forwarder.doctor.mend import mend
from forwarder.doctor.report import as_json, count, print_report
from forwarder.doctor.subject import subject_of
from forwarder.errors import NotPermitted


def run_doctor(file: Path | None, fix: bool, as_object: bool, host: Host | None = None) -> int:
    """The exit code: 1 if shortfalls remain. Raises ConfigError; NotPermitted for `fix` without the rights."""
    host = host or Host()
    if fix and not host.is_root:
        raise NotPermitted("doctor --fix: only root may change the kernel's settings; without --fix it looks")
    subject = subject_of(file)
    findings = examine(host, subject)
    mended = None
    if fix:
        mended = mend(host, findings)
        findings = examine(host, subject)
    if as_object:
        click.echo(json.dumps(as_json(findings, mended)))
    else:
        print_report(findings, mended)
    return 1 if count(findings, Status.SHORTFALL) else 0
