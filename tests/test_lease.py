"""One driver a run: a second is refused, a dead one's place is taken, on this machine at once and elsewhere in time."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import davir_ray
from davir_ray import lease as module
from davir_ray.errors import OutputError
from davir_ray.lease import LEASE_FILE, Holder, Lease
from davir_ray.storage import Location

HOLD = "import sys, time\nfrom davir_ray.lease import Lease\nfrom davir_ray.storage import Location\n"
HOLD += "with Lease(Location.of(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "run")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hearts that beat fast."""
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "_SETTLE_S", 0.3)


def start_holder(run: Location) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(davir_ray.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def leave(run: Location, **changes: object) -> Holder:
    """A lease of a driver on another machine."""
    holder = replace(Holder.of_this_process(), machine="elsewhere", host="node7", **changes)  # type: ignore[arg-type]
    (run / LEASE_FILE).write_text(json.dumps(asdict(holder)))
    return holder


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
    assert time.monotonic() - started < module.BEAT_S


def test_a_process_id_that_was_used_again_is_another_process(run: Location) -> None:
    holder = replace(Holder.of_this_process(), process_started=1.0)
    assert holder.is_dead()
    assert not Holder.of_this_process().is_dead()
    assert not replace(holder, machine="elsewhere").is_dead()


@pytest.mark.usefixtures("quick")
def test_a_still_heart_elsewhere_is_waited_for(run: Location) -> None:
    leave(run)
    started = time.monotonic()
    with Lease(run):
        assert time.monotonic() - started >= 0.1 * module.MISSED_BEATS


@pytest.mark.usefixtures("quick")
def test_a_beating_heart_elsewhere_is_refused(run: Location) -> None:
    leave(run)
    timer = threading.Timer(0.15, lambda: leave(run, beat=1))
    timer.start()
    with pytest.raises(OutputError, match=r"process \d+ on node7, since 20"), Lease(run):
        pass
    timer.join()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": "x", "more": 1}'])
def test_a_lease_that_cannot_be_read_is_waited_out(run: Location, content: bytes) -> None:
    (run / LEASE_FILE).write_bytes(content)
    with Lease(run):
        pass


@pytest.mark.usefixtures("quick")
def test_the_heart_beats(run: Location) -> None:
    with Lease(run):
        seen = set()
        deadline = time.monotonic() + 10
        while len(seen) < 3 and time.monotonic() < deadline:
            holder = Holder.read(run / LEASE_FILE)
            assert holder is not None
            seen.add(holder.beat)
            time.sleep(0.02)
    assert len(seen) == 3


@pytest.mark.usefixtures("quick")
def test_who_loses_the_lease_stops_and_leaves_the_others(run: Location) -> None:
    def lose() -> None:
        with Lease(run):
            leave(run)
            time.sleep(30)

    with pytest.raises(OutputError, match=r"taken over by process \d+ on node7"):
        lose()
    holder = Holder.read(run / LEASE_FILE)
    assert holder is not None
    assert holder.host == "node7"


@pytest.mark.usefixtures("quick")
def test_of_many_that_take_over_a_dead_drivers_run_one_gets_it(run: Location) -> None:
    leave(run)
    held, refused = [], []

    def take(number: int) -> None:
        try:
            with Lease(run):
                held.append(number)
                time.sleep(1.5)
        except OutputError:
            refused.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)


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
    def fail(*_: object) -> None:
        raise OSError(errno.EBUSY, "SlowDown")

    def hold() -> None:
        with Lease(run):
            monkeypatch.setattr(Location, "write_bytes", fail)
            time.sleep(30)

    with pytest.raises(OutputError, match="taken over by a driver that may take it for dead"):
        hold()


def test_an_interrupt_ends_the_lease(run: Location) -> None:
    process = start_holder(run)
    process.send_signal(signal.SIGINT)
    process.wait()
    assert not (run / LEASE_FILE).exists()


def test_an_end_before_the_loss_is_noticed_leaves_the_others_lease(run: Location) -> None:
    with Lease(run):
        other = leave(run)
    assert Holder.read(run / LEASE_FILE) == other
