"""The whole table of states and inputs, written out once more: every pair is looked at."""

import pytest

from workers.core.errors import LocalProtocolError, RemoteProtocolError
from workers.core.state import TRANSITIONS, Input, State, next_state

# L: our own call was wrong; R: the peer broke the protocol.
TABLE = """
               send-fin    send-reset  fin-acked    fin-received  reset-received  reset-acked
established    fin-wait-1  resetting   R            close-wait    closed          R
fin-wait-1     L           resetting   fin-wait-2   closing       closed          R
fin-wait-2     L           resetting   R            closed        closed          R
close-wait     last-ack    resetting   R            R             closed          R
closing        L           resetting   closed       R             closed          R
last-ack       L           resetting   closed       R             closed          R
resetting      L           L           resetting    resetting     closed          closed
closed         L           L           R            R             closed          R
"""
HEAD, *ROWS = [line.split() for line in TABLE.strip().splitlines()]
CELLS = [(row[0], event, cell) for row in ROWS for event, cell in zip(HEAD, row[1:], strict=True)]


@pytest.mark.parametrize(("state", "event", "expected"), CELLS, ids=lambda word: word)
def test_every_pair_leads_where_the_table_says(state: str, event: str, expected: str) -> None:
    if expected == "L":
        with pytest.raises(LocalProtocolError, match=f"^{event} in state {state}$"):
            next_state(State(state), Input(event))
    elif expected == "R":
        with pytest.raises(RemoteProtocolError, match=f"^{event} in state {state}$"):
            next_state(State(state), Input(event))
    else:
        assert next_state(State(state), Input(event)) is State(expected)


def test_table_names_every_pair() -> None:
    assert {(State(state), Input(event)) for state, event, _ in CELLS} == {(s, i) for s in State for i in Input}
    assert len(CELLS) == len(State) * len(Input)
    assert sum(cell not in "LR" for _, _, cell in CELLS) == len(TRANSITIONS)


def test_both_directions_close_in_either_order() -> None:
    orders = {
        "we end first": (Input.SEND_FIN, Input.FIN_ACKED, Input.FIN_RECEIVED),
        "the peer ends first": (Input.FIN_RECEIVED, Input.SEND_FIN, Input.FIN_ACKED),
        "both at once": (Input.SEND_FIN, Input.FIN_RECEIVED, Input.FIN_ACKED),
    }
    for name, order in orders.items():
        state = State.ESTABLISHED
        for event in order:
            assert state is not State.CLOSED, name
            state = next_state(state, event)
        assert state is State.CLOSED, name


def test_every_state_but_closed_has_a_way_out_by_the_peer_alone_once_we_are_done() -> None:
    for state in State:
        following = next_state(state, Input.SEND_RESET) if (state, Input.SEND_RESET) in TRANSITIONS else state
        if following is not State.CLOSED:
            assert next_state(following, Input.RESET_ACKED) is State.CLOSED
