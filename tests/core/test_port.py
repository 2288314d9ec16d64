"""One port as a transcript: what comes in, when, and what it wants then."""

from itertools import product

import pytest

from workers.core.errors import LocalProtocolError
from workers.core.path_mtu import CONFIRM_US, NEVER_US
from workers.core.port import (
    DEAD_US,
    DEAF_US,
    DIAL_US,
    LATE_US,
    METER_US,
    PING_BYTES,
    PING_SPACING_US,
    PONGS_IN_A_ROW,
    QUICK_US,
    SLOW_US,
    Port,
    PortSettings,
)
from workers.core.port_state import TRANSITIONS, Input, State, Step, next_state
from workers.core.standing import (
    FORGET_US,
    HOLD_US,
    PAUSE_MAX_US,
    PAUSE_MIN_US,
    TRUST_DOUBLING_US,
    TRUST_LATE,
    TRUST_LOSSY,
    YOUNG_US,
    Standing,
)

MS, SECOND = 1000, 1_000_000
RTT_US = 20 * MS
KEEPALIVE_US = 10 * SECOND


def settings(*, ports: int = 1, rotate_us: int = 0, most: int = 1232) -> PortSettings:
    return PortSettings(most, ports=ports, rotate_us=rotate_us)


def state_of(port: Port) -> State:
    """For mypy, which takes an attribute for unchanged by methods."""
    return port.state


class Transcript:
    """A port that is up since second 1, its path's MTU confirmed. `pings`: when small ones left."""

    def __init__(self, given: PortSettings | None = None) -> None:
        self.port = Port(7, given or settings(), SECOND, lambda: 1.0)
        self.now_us = SECOND
        self.pings: list[int] = []
        self.counter = self.opened = 0
        self.is_answering = True
        self._due: list[tuple[int, int, int, int, int]] = []
        self.start_us = 0
        self.steps: list[Step] = []
        assert self.port.on_time(self.now_us) is Step.DIAL
        self.port.on_dial(self.now_us)
        self.port.on_established(self.now_us, RTT_US)
        self.run(1)
        assert self.port.mtu.size == 1232
        self.start_us = self.now_us
        self.pings.clear()

    def run(self, seconds: float, *, data_us: int = 0) -> None:
        """Let time pass in milliseconds; a datagram leaves every `data_us`."""
        end_us = self.now_us + int(seconds * SECOND)
        due = self._due
        while self.now_us < end_us and self.port.state is not State.DEAD:
            self.now_us += MS
            while due and due[0][0] <= self.now_us:
                _, clock, opened, highest, size = due.pop(0)
                self.port.on_received(1, PING_BYTES + 18, highest, self.now_us)
                self.port.on_pong(clock, opened, highest, size, self.now_us)
            if data_us and self.now_us % data_us == 0:
                self.port.on_sent(1, 1000, self.now_us)
                self._leave()
            if self.now_us < self.port.deadline_us:
                continue
            step = self.port.on_time(self.now_us)
            if step is not Step.NONE:
                self.steps.append(step)
            while size := self.port.next_ping(self.now_us):
                clock = self.port.on_ping_sent(size, self.now_us)
                self._leave()
                if size == PING_BYTES:
                    self.pings.append(self.now_us - self.start_us)
                if self.is_answering:
                    due.append((self.now_us + RTT_US, clock, self.opened, self.counter - 1, size))

    def _leave(self) -> None:
        self.counter += 1
        self.opened += self.is_answering


# The table


def test_every_missing_entry_is_an_error_that_names_state_and_input() -> None:
    for state, event in product(State, Input):
        if (state, event) not in TRANSITIONS:
            with pytest.raises(LocalProtocolError, match=f"{event.value} in state {state.value}"):
                next_state(state, event)


def test_closed_port_stays_closed() -> None:
    assert {following for (state, _), following in TRANSITIONS.items() if state is State.CLOSED} == {State.CLOSED}


# Dialling


def test_dial_that_hangs_is_given_up_and_begins_again_after_a_pause() -> None:
    port = Port(0, settings(), 0, lambda: 0.5)
    assert (port.state, port.on_time(0)) == (State.DEAD, Step.DIAL)
    port.on_dial(0)
    assert port.on_time(DIAL_US - 1) is Step.NONE
    assert port.on_time(DIAL_US) is Step.DIED
    assert (port.state, port.deadline_us) == (State.DEAD, DIAL_US + PAUSE_MIN_US)
    assert port.on_time(port.deadline_us - 1) is Step.NONE
    assert port.on_time(port.deadline_us) is port.on_time(port.deadline_us + 1) is Step.DIAL


def test_pause_grows_with_failures_up_to_its_most() -> None:
    port, now_us, pauses = Port(0, settings(), 0, lambda: 1.0), 0, []
    for _ in range(9):
        port.on_dial(now_us)
        port.on_dial_failed(now_us)
        pauses.append(port.deadline_us - now_us)
        now_us = port.deadline_us
    assert pauses[:3] == [200 * MS, 400 * MS, 800 * MS]
    assert pauses[-1] == PAUSE_MAX_US


def test_refused_dial_ends_at_once() -> None:
    port = Port(0, settings(), 0, lambda: 1.0)
    port.on_dial(0)
    port.on_reset(5)
    assert state_of(port) is State.DEAD


def test_pause_before_a_dial_can_be_cut_short_but_not_made_longer() -> None:
    port = Port(0, settings(), 0, lambda: 1.0)
    for _ in range(10):
        port.on_dial(SECOND)
        port.on_dial_failed(SECOND)
    assert port.deadline_us == SECOND + PAUSE_MAX_US
    port.hasten(2 * SECOND)
    port.hasten(3 * SECOND)
    assert port.on_time(2 * SECOND - 1) is Step.NONE
    assert port.on_time(2 * SECOND) is Step.DIAL
    port.on_dial(2 * SECOND)
    port.hasten(2 * SECOND)
    assert port.deadline_us == 2 * SECOND + DIAL_US


def test_accepted_port_starts_up_and_is_never_dialled() -> None:
    port = Port(0, settings(), 0, lambda: 1.0, accepted=True)
    assert state_of(port) is State.UP
    port.on_close_received(SECOND)
    assert (port.state, port.deadline_us) == (State.DEAD, NEVER_US)
    assert port.on_time(100 * SECOND) is Step.NONE


# Probes of a port that works


def test_idle_port_is_pinged_every_keepalive() -> None:
    transcript = Transcript()
    transcript.run(35)
    gaps = [later - earlier for earlier, later in zip(transcript.pings, transcript.pings[1:], strict=False)]
    assert len(gaps) >= 2
    assert all(KEEPALIVE_US <= gap <= KEEPALIVE_US + 2 * RTT_US for gap in gaps)


def test_ports_that_come_up_together_are_not_pinged_together() -> None:
    ports = [Port(0, settings(), 0, lambda jitter=jitter: jitter) for jitter in (0.5, 0.75, 1.0)]  # type: ignore[misc]
    for port in ports:
        port.on_dial(0)
        port.on_established(0)
    assert [port.next_ping_us for port in ports] == [KEEPALIVE_US // 2, KEEPALIVE_US * 3 // 4, KEEPALIVE_US]


def test_first_data_after_a_pause_is_measured_at_once_and_then_now_and_then() -> None:
    transcript = Transcript()
    transcript.run(1.05, data_us=10 * MS)
    gaps = [later - earlier for earlier, later in zip(transcript.pings, transcript.pings[1:], strict=False)]
    assert transcript.pings[0] <= METER_US
    assert gaps and all(METER_US <= gap <= METER_US + 10 * MS for gap in gaps)
    assert transcript.port.outward.sent > 80 and transcript.port.outward.lost == 0


def test_many_ports_are_measured_less_often() -> None:
    port = Port(0, settings(ports=1000), 0, lambda: 1.0, accepted=True)
    clock = port.on_ping_sent(PING_BYTES, SECOND)
    port.on_pong(clock, 1, 0, PING_BYTES, SECOND + RTT_US)
    port.on_sent(1, 1000, SECOND + RTT_US)
    assert port.next_ping_us == SECOND + 1000 * PING_SPACING_US


def test_pong_that_answers_nothing_is_ignored() -> None:
    transcript = Transcript()
    srtt_us = transcript.port.rtt.srtt_us
    transcript.port.on_pong(12345, 99, 99, PING_BYTES, transcript.now_us)
    assert transcript.port.rtt.srtt_us == srtt_us


def test_two_pings_in_one_microsecond_have_clocks_of_their_own() -> None:
    port = Port(0, settings(), 0, lambda: 1.0, accepted=True)
    assert port.on_ping_sent(PING_BYTES, 5) != port.on_ping_sent(PING_BYTES, 5)


def test_current_size_is_confirmed_while_data_is_sent() -> None:
    transcript = Transcript()
    before = transcript.port.mtu.probe_clock
    transcript.run(CONFIRM_US / SECOND + 0.5, data_us=10 * MS)
    assert transcript.port.mtu.probe_clock > before


def test_pong_says_what_was_opened() -> None:
    port = Port(0, settings(), 0, lambda: 1.0, accepted=True)
    assert port.pong() == (0, -1)
    port.on_received(5, 500, 9, 1)
    port.on_received(1, 100, 7, 2)
    assert port.pong() == (6, 9)
    assert (port.received_bytes, port.last_received_us) == (600, 2)


# Doubts


def test_silent_port_gets_no_data_soon_and_is_dead_after_a_second_and_a_half() -> None:
    transcript = Transcript()
    transcript.run(1, data_us=10 * MS)
    transcript.is_answering = False
    silent_us = transcript.now_us
    transcript.run(0.5, data_us=10 * MS)
    assert state_of(transcript.port) is State.SUSPECT
    transcript.pings.clear()
    transcript.run(3, data_us=10 * MS)
    assert state_of(transcript.port) is State.DEAD
    assert transcript.steps[-1] is Step.DIED
    assert DEAD_US <= transcript.now_us - silent_us <= DEAD_US + METER_US + SLOW_US


def test_doubtful_port_is_probed_quickly_three_times_and_then_slowly() -> None:
    transcript = Transcript()
    transcript.is_answering = False
    transcript.port.on_sent(1, 1000, transcript.now_us)
    transcript.run(3)
    first, *others = transcript.pings
    gaps = [later - earlier for earlier, later in zip([first, *others], others, strict=False)]
    assert gaps[:3] == [QUICK_US] * 3
    assert all(gap == SLOW_US for gap in gaps[3:])
    assert state_of(transcript.port) is State.DEAD


def test_one_late_ping_is_no_doubt_while_data_comes() -> None:
    transcript = Transcript()
    port = transcript.port
    port.on_sent(1, 1000, transcript.now_us)
    clock = port.on_ping_sent(PING_BYTES, transcript.now_us)
    port.on_received(1, 1000, 50, transcript.now_us + 1)
    late_us = clock + port.late_us
    assert late_us >= clock + RTT_US + LATE_US
    port.on_time(late_us)
    assert state_of(port) is State.UP
    port.on_ping_sent(PING_BYTES, late_us)
    port.on_received(1, 1000, 51, late_us + 1)
    port.on_time(late_us + port.late_us)
    assert state_of(port) is State.SUSPECT


def test_answer_ends_the_doubt_and_trust_grows_back() -> None:
    transcript = Transcript()
    port = transcript.port
    clock = port.on_ping_sent(PING_BYTES, transcript.now_us)
    now_us = clock + port.late_us
    port.on_time(now_us)
    assert state_of(port) is State.SUSPECT and not port.is_answering
    port.on_pong(clock, 3, 3, PING_BYTES, now_us + 1)
    assert state_of(port) is State.UP and port.is_answering
    trusts = [port.standing.trust(now_us + 1 + seconds * TRUST_DOUBLING_US) for seconds in range(4)]
    assert trusts == [TRUST_LATE, 0.5, 1.0, 1.0]


def test_paused_machine_ends_no_port() -> None:
    transcript = Transcript()
    transcript.port.on_ping_sent(PING_BYTES, transcript.now_us)
    assert transcript.port.on_time(transcript.now_us + 100 * SECOND) is Step.PING
    assert state_of(transcript.port) is State.SUSPECT


def test_true_reset_ends_the_port_and_a_forged_one_does_not() -> None:
    transcript = Transcript()
    transcript.is_answering = False
    transcript.port.on_reset(transcript.now_us)
    assert state_of(transcript.port) is State.SUSPECT
    start_us = transcript.now_us
    transcript.run(2)
    assert state_of(transcript.port) is State.DEAD
    assert transcript.now_us - start_us <= 2 * (2 * RTT_US + LATE_US)

    transcript = Transcript()
    port = transcript.port
    port.on_reset(transcript.now_us)
    transcript.run(0.1)
    assert (port.state, port.forged_resets, port.standing.trust(transcript.now_us)) == (State.UP, 1, 1.0)
    pings = len(transcript.pings)
    port.on_reset(transcript.now_us)
    assert state_of(port) is State.UP
    transcript.run(0.1)
    assert len(transcript.pings) == pings + 1
    transcript.run(DEAF_US / SECOND)
    port.on_reset(transcript.now_us)
    assert state_of(port) is State.SUSPECT


def test_late_answer_to_an_earlier_ping_does_not_show_that_a_reset_was_forged() -> None:
    transcript = Transcript()
    port = transcript.port
    clock = port.on_ping_sent(PING_BYTES, transcript.now_us)
    port.on_reset(transcript.now_us + MS)
    port.on_pong(clock, 3, 3, PING_BYTES, transcript.now_us + 2 * MS)
    assert state_of(port) is State.SUSPECT


def test_lossy_port_comes_back_after_a_while_and_enough_answers_in_a_row() -> None:
    transcript = Transcript()
    port = transcript.port
    holds: list[int] = []
    for _ in range(3):
        port.suspend(transcript.now_us)
        assert state_of(port) is State.SUSPECT and port.is_answering
        start_us, pings = transcript.now_us, len(transcript.pings)
        while state_of(port) is State.SUSPECT:
            transcript.run(0.01)
        holds.append((transcript.now_us - start_us) // HOLD_US)
        assert len(transcript.pings) - pings >= PONGS_IN_A_ROW
        assert port.standing.trust(transcript.now_us) == TRUST_LOSSY
        assert port.outward.sent == 0
    assert holds == [1, 2, 4]


def test_port_closed_by_the_other_end_is_dialled_again() -> None:
    transcript = Transcript()
    transcript.port.on_close_received(transcript.now_us)
    assert transcript.port.on_time(transcript.port.deadline_us) is Step.DIAL
    transcript.port.on_close_received(transcript.now_us)
    transcript.port.on_reset(transcript.now_us)
    transcript.port.on_pong(1, 1, 1, PING_BYTES, transcript.now_us)
    assert state_of(transcript.port) is State.DEAD


def test_port_closed_by_the_other_end_is_dialled_at_once_unless_it_always_is() -> None:
    port = Port(0, settings(), 0, lambda: 1.0)
    pauses = []
    for now_us in range(SECOND, 4 * SECOND, SECOND):
        port.on_dial(now_us)
        port.on_established(now_us)
        port.on_close_received(now_us)
        pauses.append(port.deadline_us - now_us)
    assert pauses == [0, 400_000, 800_000]


def test_closed_port_wants_nothing() -> None:
    transcript = Transcript()
    transcript.port.close()
    assert transcript.port.deadline_us == NEVER_US
    assert transcript.port.next_ping(100 * SECOND) == 0
    assert transcript.port.on_time(NEVER_US) is Step.NONE


def test_port_expires_at_its_age() -> None:
    transcript = Transcript(settings(rotate_us=60 * SECOND))
    assert not transcript.port.is_expired(60 * SECOND)
    assert transcript.port.is_expired(61 * SECOND)
    assert not Transcript().port.is_expired(10_000 * SECOND)


# The past


def test_port_that_dies_young_again_and_again_is_trusted_little_and_dialled_later() -> None:
    standing = Standing(lambda: 1.0)
    standing.on_established(0)
    assert standing.trust(0) == 1.0
    assert [standing.on_lost(YOUNG_US - 1) for _ in range(2)] == [200 * MS, 400 * MS]
    standing.on_established(SECOND)
    assert standing.trust(SECOND) == TRUST_LOSSY
    assert standing.on_lost(YOUNG_US) == PAUSE_MIN_US
    standing.on_established(20 * SECOND)
    assert standing.trust(20 * SECOND) == 1.0


def test_dials_that_fail_cost_no_trust() -> None:
    standing = Standing(lambda: 1.0)
    for _ in range(5):
        standing.on_lost(None)
    standing.on_established(SECOND)
    assert standing.trust(SECOND) == 1.0


def test_suspensions_are_forgotten_after_a_while() -> None:
    standing = Standing(lambda: 1.0)
    assert [standing.on_suspended(SECOND) for _ in range(7)] == [HOLD_US << n for n in (0, 1, 2, 3, 4, 5, 5)]
    standing.on_return(TRUST_LOSSY, SECOND)
    assert standing.on_suspended(SECOND + FORGET_US + 1) == HOLD_US


def test_new_port_of_an_index_inherits_the_past() -> None:
    old = Port(0, settings(), 0, lambda: 1.0, accepted=True)
    old.on_close_received(SECOND)
    new = Port(0, settings(), SECOND, lambda: 1.0, accepted=True, standing=old.standing)
    assert new.standing.trust(SECOND) == TRUST_LOSSY
