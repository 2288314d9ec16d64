"""What can go wrong with a lab, by what the caller should do about it."""


class LabError(Exception):
    """The lab was used wrongly, or its emulator died."""


class LabUnavailable(LabError):
    """No lab on this machine: skip, or do without."""


class NamespacesRefused(LabUnavailable):
    """Neither root's nor a user's own network namespaces are permitted here."""


class NoCompiler(LabUnavailable):
    """The link emulator cannot be compiled."""


class RunVoid(LabError):
    """The emulator was starved: what was measured says nothing. Run it again, or skip it."""
