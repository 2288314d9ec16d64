"""Workers that hang, start slowly or die, as the crew's ticks see them."""

import os
import resource
import selectors
import signal
import socket
from collections.abc import Iterator

import msgspec
import pytest

from forwarder.crew import Crew
from forwarder.generation import Generation
from forwarder.reload import Running, begin
from forwarder.slots import Parcel, State, Worker, describe_exit, new_slot
from forwarder.timing import Timing
from workers.boot import Drained, FromWorker, Quit, Ready, Reconfigure, StatusReply
from workers.settings import Address, Settings, SprayClientTunnel, StripeClientTunnel


def never(*_: object) -> None:
    raise AssertionError("not to be called")


@pytest.fixture
def crew() -> Iterator[Crew]:
    """Two workers that are no processes: their heartbeats are written by hand."""
    selector = selectors.DefaultSelector()
    running = Running(Settings(role="client", workers=2, keys=()), (), 0, {})
    made = Crew(running, selector, never, never)
    made.generations.append(Generation(0, 2, [new_slot(0, 0), new_slot(1, 1)]))
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in made.slots]
    for slot, (ours, _) in zip(made.slots, pairs, strict=True):
        slot.worker = Worker(slot.index, slot.index + 1, -1, ours, State.READY)
    yield made
    for slot, (ours, theirs) in zip(made.slots, pairs, strict=True):
        slot.worker = None
        ours.close()
        theirs.close()
    made.close()
    selector.close()


def test_every_tunnel_of_a_client_has_a_session_of_its_own() -> None:
    here = Address("127.0.0.1", 1)
    stripe = StripeClientTunnel(name="web", index=1, local=here, remote_end=here)
    spray = SprayClientTunnel(name="kcp", index=0, ports=(80,), local=here, hosts=("server",))
    settings = Settings(role="client", workers=1, keys=(), client_tunnels=(stripe,), spray_client_tunnels=(spray,))
    running = begin(settings, iter((5, 7)).__next__)
    assert running.session_ids == {0: 5, 1: 7} and running.order == ("kcp", "web") and running.next_index == 2


def beat(crew: Crew, *slots: int) -> None:
    for slot in slots:
        crew._heartbeat[slot] += 1


def tick(crew: Crew, on_time: bool = True) -> list[int]:
    return [worker.slot for worker in crew.count_beats(on_time, hung_ticks=4, start_ticks=6)]


def test_worker_still_for_four_ticks_is_hung(crew: Crew) -> None:
    for _ in range(3):
        beat(crew, 0)
        assert tick(crew) == []
    beat(crew, 0)
    assert tick(crew) == [1]


def test_one_beat_in_time_starts_the_count_again(crew: Crew) -> None:
    seen = []
    for number in range(12):
        beat(crew, 0, *([1] if number % 4 == 3 else []))
        seen += tick(crew)
    assert seen == []


def test_late_ticks_count_against_nobody(crew: Crew) -> None:
    assert [tick(crew, on_time=False) for _ in range(20)] == [[]] * 20
    assert [tick(crew) for _ in range(4)] == [[], [], [], [0, 1]]


def test_starting_worker_has_longer_and_its_beats_do_not_count(crew: Crew) -> None:
    starting = crew.slots[1].worker
    assert starting is not None
    starting.state = State.STARTING
    for _ in range(5):
        beat(crew, 0, 1)
        assert tick(crew) == []
    beat(crew, 0, 1)
    assert tick(crew) == [1]


def test_leaving_worker_has_to_beat_too(crew: Crew) -> None:
    leaving = crew.slots[1].worker
    assert leaving is not None
    leaving.state = State.LEAVING
    for _ in range(3):
        beat(crew, 0)
        tick(crew)
    beat(crew, 0)
    assert tick(crew) == [1]


def test_delay_is_nothing_at_first_then_doubles_to_its_cap() -> None:
    timing = Timing()
    delays = [timing.respawn_delay_s(deaths) for deaths in range(9)]
    assert delays == [0, 0, 0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert timing.respawn_delay_s(100_000) == 5.0


class TestChannel:
    @pytest.fixture
    def ends(self) -> Iterator[tuple[Worker, socket.socket]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        yield Worker(0, 1, 0, ours), theirs
        ours.close()
        theirs.close()

    def test_messages_come_in_order_then_the_end(self, ends: tuple[Worker, socket.socket]) -> None:
        worker, theirs = ends
        sent: list[FromWorker] = [Ready(), StatusReply(3), Drained()]
        for message in sent:
            theirs.send(msgspec.msgpack.encode(message))
        assert [message for message, _ in worker.receive()] == sent
        theirs.close()
        assert [message for message, _ in worker.receive()] == [None]

    def test_nonsense_is_an_error_and_its_descriptor_is_closed(self, ends: tuple[Worker, socket.socket]) -> None:
        worker, theirs = ends
        socket.send_fds(theirs, [b"\xc1"], [theirs.fileno()])
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ValueError):
            list(worker.receive())
        assert len(os.listdir("/proc/self/fd")) == before

    def test_message_whose_descriptor_finds_none_free_is_lost_and_no_more(
        self, ends: tuple[Worker, socket.socket]
    ) -> None:
        worker, theirs = ends
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(theirs.fileno())
        os.close(lowest_free)
        socket.send_fds(theirs, [msgspec.msgpack.encode(StatusReply(3))], [theirs.fileno()])
        theirs.send(msgspec.msgpack.encode(Drained()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        try:
            assert list(worker.receive()) == [(Drained(), [])]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def test_worker_that_reads_nothing_is_killed(
        self, ends: tuple[Worker, socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker, _ = ends
        killed: list[signal.Signals] = []
        monkeypatch.setattr(Worker, "kill", lambda self, signum: killed.append(signum))
        sent = 0
        while not killed and sent < 100_000:
            worker.send(Quit())
            sent += 1
        assert killed == [signal.SIGKILL] and sent > 100

    def test_what_the_channel_does_not_take_follows_in_order_with_its_descriptors(
        self, ends: tuple[Worker, socket.socket]
    ) -> None:
        worker, theirs = ends
        before = len(os.listdir("/proc/self/fd"))
        memories = [os.memfd_create("test") for _ in range(50)]
        for number in range(500):
            worker.send(Reconfigure(number), [memories[number % 50]])
        for memory in memories:
            os.close(memory)
        assert worker.full and len(worker.outbox) > 100
        got = []
        while len(got) < 500:
            data, fds, _, _ = socket.recv_fds(theirs, 1000, 1)
            got.append(msgspec.msgpack.decode(data, type=Reconfigure).number)
            assert os.readlink(f"/proc/self/fd/{fds[0]}").startswith("/memfd:test")
            os.close(fds[0])
            worker.flush()
        assert got == list(range(500)) and not worker.full
        assert len(os.listdir("/proc/self/fd")) == before

    def test_message_for_many_is_kept_once(self, ends: tuple[Worker, socket.socket]) -> None:
        before = len(os.listdir("/proc/self/fd"))
        memory = os.memfd_create("test")
        parcel = Parcel(Reconfigure(1), [memory])
        parcel.keep()
        parcel.keep()
        os.close(memory)
        assert len(os.listdir("/proc/self/fd")) == before + 1
        os.fstat(parcel.fds[0])
        del parcel
        assert len(os.listdir("/proc/self/fd")) == before

    def test_worker_that_is_gone_is_no_error(self, ends: tuple[Worker, socket.socket]) -> None:
        worker, theirs = ends
        theirs.close()
        worker.send(Quit())


@pytest.mark.parametrize(("status", "words"), [(0, "exit 0"), (768, "exit 3"), (9, "SIGKILL"), (139, "SIGSEGV")])
def test_wait_status_in_words(status: int, words: str) -> None:
    assert describe_exit(status) == words
