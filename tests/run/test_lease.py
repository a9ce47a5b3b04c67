"""One driver a run: a second is refused, a dead one's place is taken, on this machine at once and elsewhere in time."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import davir_ray
from davir_ray.errors import OutputError
from davir_ray.run import lease as module
from davir_ray.run.lease import LEASE_FILE, Holder, Lease
from davir_ray.run.location import Location

HOLD = """
import signal, sys, time
from davir_ray.run import lease
from davir_ray.run.location import Location
signal.signal(signal.SIGINT, getattr(signal, sys.argv[2]))
lease.BEAT_S, lease.MISSED_BEATS = 0.2, 30
with lease.Lease(Location.of(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
    print("slept", flush=True)
"""
"""Hold a lease, with this handler of SIGINT; a process has SIG_IGN where a shell script starts it in the background."""


LONG_S = 600
"""What is not interrupted waits so long: it only ends a test that would hang."""


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "run")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast heartbeats, some of which may be missing on a busy machine."""
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "MISSED_BEATS", 30)
    monkeypatch.setattr(module, "_SETTLE_S", 0.3)


def start_holder(run: Location, handler: str = "default_int_handler") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(davir_ray.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run), handler], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def wait_until(happened: Callable[[], bool], seconds: float = LONG_S) -> None:
    """Return when it has happened, or after so long."""
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


def at_once(take: Callable[[int], None], count: int) -> None:
    """Call it with each number, all at the same time, and return when all are done."""
    threads = [threading.Thread(target=take, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def leave(run: Location, **changes: object) -> Holder:
    """A lease of a driver on another machine."""
    holder = replace(Holder.of_this_process(), machine="elsewhere", host="node7", **changes)  # type: ignore[arg-type]
    (run / LEASE_FILE).write_text(json.dumps(asdict(holder)))
    return holder


def lose_at_next_heartbeat(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the heartbeat find another's lease. One left by a test might be overwritten by a heartbeat under way.

    However late the heartbeat comes, nobody takes the holder for dead.
    """
    monkeypatch.setattr(module, "MISSED_BEATS", 10 * LONG_S)
    read = Holder.read

    def read_after(place: Location) -> Holder | None:
        if threading.current_thread().name == "lease":
            leave(run)
        return read(place)

    monkeypatch.setattr(Holder, "read", read_after)


def test_a_lease_is_there_while_it_is_held_and_gone_after(run: Location) -> None:
    for _ in range(2):
        with Lease(run):
            holder = Holder.read(run / LEASE_FILE)
            assert holder is not None
            assert holder.pid == os.getpid()
            with pytest.raises(OutputError, match=f"being written by process {os.getpid()} on"), Lease(run):
                pass
        assert not (run / LEASE_FILE).exists()


def test_a_lease_is_gone_after_an_error(run: Location) -> None:
    with pytest.raises(ZeroDivisionError), Lease(run):
        raise ZeroDivisionError
    assert not (run / LEASE_FILE).exists()


def test_a_live_process_is_refused_at_once_and_a_killed_one_replaced_at_once(run: Location) -> None:
    process = start_holder(run)
    started = time.monotonic()
    with pytest.raises(OutputError, match=f"process {process.pid} on .*choose another --output"), Lease(run):
        pass
    process.kill()
    process.wait()
    with Lease(run):
        pass
    assert time.monotonic() - started < module.BEAT_S * module.MISSED_BEATS, "it waited as for one elsewhere"


def test_a_process_id_that_was_used_again_is_another_process(run: Location) -> None:
    holder = replace(Holder.of_this_process(), process_started=1.0)
    assert holder.is_dead()
    assert not Holder.of_this_process().is_dead()
    assert not replace(holder, machine="elsewhere").is_dead()


@pytest.mark.usefixtures("quick")
def test_a_lease_elsewhere_without_heartbeat_is_waited_for(run: Location) -> None:
    leave(run)
    started = time.monotonic()
    with Lease(run):
        assert time.monotonic() - started >= 0.1 * module.MISSED_BEATS


@pytest.mark.usefixtures("quick")
def test_a_lease_elsewhere_with_a_heartbeat_is_refused(run: Location) -> None:
    holder, refused = leave(run), threading.Event()

    def beat() -> None:
        for number in itertools.count(1):
            (run / LEASE_FILE).write_text(json.dumps(asdict(replace(holder, beat=number))))
            if refused.wait(0.05):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(OutputError, match=r"process \d+ on node7, since 20"), Lease(run):
        pass
    refused.set()
    thread.join()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": "x", "more": 1}'])
def test_a_lease_that_cannot_be_read_is_waited_out(run: Location, content: bytes) -> None:
    (run / LEASE_FILE).write_bytes(content)
    with Lease(run):
        pass


@pytest.mark.usefixtures("quick")
def test_a_held_lease_has_a_heartbeat(run: Location) -> None:
    with Lease(run):
        seen = set()
        deadline = time.monotonic() + LONG_S
        while len(seen) < 3 and time.monotonic() < deadline:
            holder = Holder.read(run / LEASE_FILE)
            assert holder is not None
            seen.add(holder.beat)
            time.sleep(0.02)
    assert len(seen) == 3


@pytest.mark.usefixtures("quick")
def test_who_loses_the_lease_stops_and_leaves_the_others(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []

    def lose() -> None:
        with Lease(run):
            lose_at_next_heartbeat(run, monkeypatch)
            time.sleep(LONG_S)
            slept.append(LONG_S)

    with pytest.raises(OutputError, match=r"was taken over by process \d+ on node7"):
        lose()
    assert not slept
    holder = Holder.read(run / LEASE_FILE)
    assert holder is not None
    assert holder.host == "node7"


@pytest.mark.usefixtures("quick")
def test_of_many_that_take_over_a_dead_drivers_run_one_gets_it(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.signal, "pthread_kill", lambda *_: None)  # the holders here are no main threads
    leave(run)
    held, refused = [], []

    def take(number: int) -> None:
        try:
            with Lease(run):
                held.append(number)
                wait_until(lambda: len(refused) == 5, 60)
        except OutputError:
            refused.append(number)

    at_once(take, 6)
    assert len(held) == 1
    assert {*range(6)} - {*held} <= {*refused}, "who held it may lose it, on a busy machine"


@pytest.mark.usefixtures("quick")
def test_of_two_that_saw_the_same_dead_driver_the_first_to_take_its_place_gives_way(
    run: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second removes what it takes for the dead driver's lease, which is the first's by then."""
    dead = replace(Holder.of_this_process(), token="dead", process_started=0.0)
    (run / LEASE_FILE).write_text(json.dumps(asdict(dead)))
    create = Location.create

    def create_and_be_replaced(place: Location, content: bytes) -> bool:
        created = create(place, content)
        leave(run)
        return created

    monkeypatch.setattr(Location, "create", create_and_be_replaced)
    with pytest.raises(OutputError, match=r"is being written by process \d+ on node7"), Lease(run):
        pytest.fail("two drivers hold the run")


def test_a_lease_whose_answer_was_lost_is_ones_own(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store wrote it, the answer did not come, and the repeated request finds the file there."""
    create = Location.create

    def create_twice(place: Location, content: bytes) -> bool:
        create(place, content)
        return create(place, content)

    monkeypatch.setattr(Location, "create", create_twice)
    with Lease(run):
        assert (run / LEASE_FILE).exists()
    assert not (run / LEASE_FILE).exists()


@pytest.mark.usefixtures("quick")
def test_who_cannot_renew_the_lease_stops_before_another_may_take_it(
    run: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = []

    def fail(*_: object) -> None:
        raise OSError(errno.EBUSY, "SlowDown")

    def hold() -> None:
        with Lease(run):
            monkeypatch.setattr(Location, "write_bytes", fail)
            time.sleep(LONG_S)
            slept.append(LONG_S)

    with pytest.raises(OutputError, match="may have been taken over by another driver, because the heartbeat failed"):
        hold()
    assert not slept


@pytest.mark.usefixtures("quick")
def test_a_loss_interrupts_until_the_block_ends(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 1.0)  # between two interrupts: the second must not meet the end of the block
    missed = []

    def hold() -> None:
        with Lease(run):
            lose_at_next_heartbeat(run, monkeypatch)
            with suppress(KeyboardInterrupt):
                time.sleep(LONG_S)
                missed.append(1)
            time.sleep(LONG_S)
            missed.append(2)

    with pytest.raises(OutputError, match="was taken over"):
        hold()
    assert not missed


def test_a_holder_gives_up_a_heartbeat_before_others_take_it_for_dead() -> None:
    last = time.monotonic() - module.BEAT_S * (module.MISSED_BEATS - 1)  # others wait for one heartbeat more
    assert module._is_overdue(last - 0.1 * module.BEAT_S)
    assert not module._is_overdue(last + 0.5 * module.BEAT_S)


def test_an_interrupt_ends_the_lease(run: Location) -> None:
    process = start_holder(run)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == ""
    assert not (run / LEASE_FILE).exists()


def test_a_background_process_ignores_interrupts_but_stops_when_it_loses_the_lease(run: Location) -> None:
    process = start_holder(run, "SIG_IGN")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    deadline = time.monotonic() + LONG_S
    while process.poll() is None and time.monotonic() < deadline:
        leave(run)  # again, if a heartbeat that was under way has written over it
        time.sleep(0.05)
    printed, error = process.communicate()
    assert printed == ""
    assert "was taken over by process" in error


def test_an_end_before_the_loss_is_noticed_leaves_the_others_lease(run: Location) -> None:
    with Lease(run):
        other = leave(run)
    assert Holder.read(run / LEASE_FILE) == other


# --- stores that create a file twice ---------------------------------------------------------------------------------


class Forgetful(MemoryFileSystem):  # type: ignore[misc]
    """A store that ignores the condition of a write, as those do that do not know If-None-Match."""

    protocol = "forgetful"
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.before_write: Callable[[], object] = lambda: None

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self.before_write()
        super().pipe_file(path, value, **options)


@pytest.fixture
def twice() -> Iterator[Callable[[], Location]]:
    """A run in a store that creates a file twice; each call gives a client of its own."""
    name = f"/{uuid.uuid4().hex}"
    yield lambda: Location(Forgetful(), name)
    Location(Forgetful(), name).remove()


@pytest.mark.usefixtures("quick")
def test_where_a_file_is_created_twice_the_first_driver_holds_and_the_second_is_refused(
    twice: Callable[[], Location],
) -> None:
    place = twice() / "probe"
    assert [place.create(b"one"), place.create(b"two")] == [True, True]
    with Lease(twice()):
        first = Holder.read(twice() / LEASE_FILE)
        with pytest.raises(OutputError, match=f"being written by process {os.getpid()} on"), Lease(twice()):
            pass
        assert first is not None

        def has_beaten() -> bool:
            now = Holder.read(twice() / LEASE_FILE)
            return now is not None and now.token == first.token and now.beat > first.beat

        wait_until(has_beaten)
        assert has_beaten()
    assert not (twice() / LEASE_FILE).exists()


@pytest.mark.usefixtures("quick")
def test_where_a_file_is_created_twice_one_of_many_that_begin_at_the_same_moment_goes_on(
    twice: Callable[[], Location],
) -> None:
    """All of them have seen no lease when the first writes its own."""
    all_have_read, begun, held, refused = threading.Barrier(5), set[int](), list[int](), list[int]()

    def take(number: int) -> None:
        def wait_once() -> None:
            if number not in begun:
                begun.add(number)
                all_have_read.wait()

        run = twice()
        run.fs.before_write = wait_once
        try:
            with Lease(run):
                held.append(number)
                wait_until(lambda: len(refused) == 4)
        except OutputError:
            refused.append(number)

    at_once(take, 5)
    assert (len(held), len(refused)) == (1, 4)


@pytest.mark.usefixtures("quick")
def test_a_lease_that_is_written_too_late_to_count_is_taken_back(twice: Callable[[], Location]) -> None:
    """The second driver has seen no lease, and writes its own when the first is long at work."""
    second_reads, first_works, refused = threading.Event(), threading.Event(), []

    def come_late() -> None:
        run = twice()
        run.fs.before_write = lambda: (second_reads.set(), first_works.wait())
        try:
            with Lease(run):
                pass
        except OutputError as error:
            refused.append(str(error))

    thread = threading.Thread(target=come_late)
    thread.start()
    second_reads.wait()
    with Lease(twice()):
        first = Holder.read(twice() / LEASE_FILE)
        first_works.set()
        thread.join()
        now = Holder.read(twice() / LEASE_FILE)
        assert first is not None
        assert now is not None
        assert now.token == first.token
    assert len(refused) == 1


@pytest.mark.usefixtures("quick")
def test_a_heartbeat_that_is_written_too_late_takes_nothing_from_who_took_over(twice: Callable[[], Location]) -> None:
    """A write of the holder hangs in the store until another has seen no heartbeat and has taken the run over."""
    hangs, taken_over, held = threading.Event(), threading.Event(), []

    def take_over() -> None:
        hangs.wait()
        run = twice()
        (run / LEASE_FILE).write_bytes((run / LEASE_FILE).read_bytes().replace(b'"machine": "', b'"machine": "not '))
        with Lease(run):
            held.append(Holder.read(run / LEASE_FILE))
            taken_over.set()
            time.sleep(6 * module.BEAT_S)
            held.append(Holder.read(run / LEASE_FILE))

    def hold() -> None:
        run = twice()
        with Lease(run):
            run.fs.before_write = lambda: (hangs.set(), taken_over.wait())
            time.sleep(LONG_S)

    thread = threading.Thread(target=take_over)
    thread.start()
    with pytest.raises(OutputError, match=r"taken over by .*the heartbeat came too late"):
        hold()
    thread.join()
    tokens = [found.token for found in held if found is not None]
    assert len(tokens) == 2
    assert len(set(tokens)) == 1
