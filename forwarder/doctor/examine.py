"""All checks, in the order in which they are shown."""

from collections.abc import Callable, Iterator

from forwarder.doctor import files, limits, machine, ports, raw, settings
from forwarder.doctor.finding import Finding, unknown
from forwarder.doctor.firewall import firewall
from forwarder.doctor.host import Host, Unseen
from forwarder.doctor.subject import Subject

Check = Callable[[Host, Subject], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    *(limits.descriptors, limits.memory, limits.log_room),
    *(files.key_files, files.control_socket, ports.ports, ports.names),
    *(settings.sizes, settings.local_ports, settings.conntrack, settings.reverse_path, settings.congestion),
    *(raw.capabilities, raw.devices, raw.backend, firewall),
    *(machine.kernel, machine.clocks, machine.container),
)


def examine(host: Host, subject: Subject) -> list[Finding]:
    """What every check finds; one that meets what it may not see says that instead."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(host, subject)
        except Unseen as reason:
            findings.append(unknown(check.__name__.replace("_", " "), str(reason)))
    return findings
