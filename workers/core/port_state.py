"""The states of a port as a table, and what its owner has to do for it. A missing entry is an error of ours."""

from enum import Enum

from workers.core.errors import LocalProtocolError


class State(Enum):
    """Where a port stands. Only an UP port gets data, as long as there is one. CLOSED: given up for good."""

    DIALLING = "dialling"
    UP = "up"
    SUSPECT = "suspect"
    DEAD = "dead"
    CLOSED = "closed"


class Input(Enum):
    """What moves a port."""

    DIAL = "dial"
    ESTABLISHED = "established"
    DOUBT = "doubt"
    CLEARED = "cleared"
    LOST = "lost"
    CLOSE = "close"


class Step(Enum):
    """What the owner has to do: nothing, send the PING of `next_ping`, dial, or close the socket of a dead port."""

    NONE = "none"
    PING = "ping"
    DIAL = "dial"
    DIED = "died"


_S, _I = State, Input

TRANSITIONS: dict[tuple[State, Input], State] = {
    (_S.DEAD, _I.DIAL): _S.DIALLING,
    (_S.DIALLING, _I.ESTABLISHED): _S.UP,
    (_S.DIALLING, _I.LOST): _S.DEAD,
    (_S.UP, _I.DOUBT): _S.SUSPECT,
    (_S.UP, _I.LOST): _S.DEAD,
    (_S.SUSPECT, _I.DOUBT): _S.SUSPECT,
    (_S.SUSPECT, _I.CLEARED): _S.UP,
    (_S.SUSPECT, _I.LOST): _S.DEAD,
    **{(state, _I.CLOSE): _S.CLOSED for state in State},
}


def next_state(state: State, event: Input) -> State:
    """The state that follows. Raises LocalProtocolError where the table has none."""
    following = TRANSITIONS.get((state, event))
    if following is None:
        raise LocalProtocolError(f"{event.value} in state {state.value}")
    return following
