"""Errors of the protocol core, split by whose fault they are."""


class ProtocolError(Exception):
    """Somebody broke the protocol."""


class LocalProtocolError(ProtocolError):
    """We did: a call out of order or a value out of range. A bug in this program."""


class RemoteProtocolError(ProtocolError):
    """The peer did, or somebody in between: close the carrier. The text is for our log, never for the peer."""
