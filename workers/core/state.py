"""The states of a stream as a table (names as in RFC 9293, 3.3.2; ours acknowledges a reset too).

A missing entry is an error that names state and input. FIN_RECEIVED and FIN_ACKED mean that every byte before the FIN
was received, too.
"""

from enum import Enum

from workers.core.errors import LocalProtocolError, RemoteProtocolError


class State(Enum):
    """Where a stream stands.

    RESETTING: it waits for its RESET to be acknowledged. CLOSED: nothing more passes in either direction.
    """

    ESTABLISHED = "established"
    FIN_WAIT_1 = "fin-wait-1"
    FIN_WAIT_2 = "fin-wait-2"
    CLOSE_WAIT = "close-wait"
    CLOSING = "closing"
    LAST_ACK = "last-ack"
    RESETTING = "resetting"
    CLOSED = "closed"


class Input(Enum):
    """What moves a stream: ours (SEND_*) or the peer's."""

    SEND_FIN = "send-fin"
    SEND_RESET = "send-reset"
    FIN_ACKED = "fin-acked"
    FIN_RECEIVED = "fin-received"
    RESET_RECEIVED = "reset-received"
    RESET_ACKED = "reset-acked"


_S, _I = State, Input
_LIVE = (_S.ESTABLISHED, _S.FIN_WAIT_1, _S.FIN_WAIT_2, _S.CLOSE_WAIT, _S.CLOSING, _S.LAST_ACK)

TRANSITIONS: dict[tuple[State, Input], State] = {
    (_S.ESTABLISHED, _I.SEND_FIN): _S.FIN_WAIT_1,
    (_S.ESTABLISHED, _I.FIN_RECEIVED): _S.CLOSE_WAIT,
    (_S.FIN_WAIT_1, _I.FIN_ACKED): _S.FIN_WAIT_2,
    (_S.FIN_WAIT_1, _I.FIN_RECEIVED): _S.CLOSING,
    (_S.FIN_WAIT_2, _I.FIN_RECEIVED): _S.CLOSED,
    (_S.CLOSE_WAIT, _I.SEND_FIN): _S.LAST_ACK,
    (_S.CLOSING, _I.FIN_ACKED): _S.CLOSED,
    (_S.LAST_ACK, _I.FIN_ACKED): _S.CLOSED,
    **{(state, _I.SEND_RESET): _S.RESETTING for state in _LIVE},
    **{(state, _I.RESET_RECEIVED): _S.CLOSED for state in State},
    # What was on its way when our RESET left changes nothing any more.
    (_S.RESETTING, _I.FIN_ACKED): _S.RESETTING,
    (_S.RESETTING, _I.FIN_RECEIVED): _S.RESETTING,
    (_S.RESETTING, _I.RESET_ACKED): _S.CLOSED,
}

_OURS = (Input.SEND_FIN, Input.SEND_RESET)


def next_state(state: State, event: Input) -> State:
    """The state that follows. Raises LocalProtocolError for an impossible SEND_*, else RemoteProtocolError."""
    following = TRANSITIONS.get((state, event))
    if following is None:
        error = LocalProtocolError if event in _OURS else RemoteProtocolError
        raise error(f"{event.value} in state {state.value}")
    return following
