"""Progress: a piece reported twice counts once, one begun twice is a retry, and the file follows."""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from davir_ray.engine import progress as module
from davir_ray.engine.progress import ProgressCounter, Totals, WorkDone, tracked
from davir_ray.run.folder import Run
from davir_ray.run.progress import PROGRESS_FILE, Progress

pytestmark = pytest.mark.usefixtures("ray_session")


def totals_of(counter: ProgressCounter, condition: Any) -> Totals:
    """The totals once they meet the condition: reports are sent, not answered."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        totals = counter.totals()
        if totals is not None and condition(totals):
            return totals
        time.sleep(0.05)
    raise AssertionError(f"never came: {totals}")


def wait_for_file(run: Run, done: int) -> None:
    """Return when progress.json says that so much is done."""
    deadline = time.monotonic() + 300
    while (found := Progress.read(run.folder)) is None or found.done != done:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_a_second_report_replaces_the_first_and_a_second_start_is_a_retry() -> None:
    counter = ProgressCounter("score", 30)
    for key in ("a", "b", "a", "c", "a"):
        counter.begin(key)
    counter.report("a", WorkDone(5, rows=5, tokens=70))
    counter.report("b", WorkDone(10, rows=10, tokens=30, unscored=2))
    counter.report("a", WorkDone(7, rows=7, tokens=100, rejects=1))
    totals = totals_of(counter, lambda totals: totals.work.done == 17)
    assert totals.work == WorkDone(17, rows=17, tokens=130, rejects=1, unscored=2)
    assert totals.retries == 2
    assert totals.total == 30
    assert totals.throughput["tokens"] == [70, 100, 130]
    assert totals.throughput["seconds"] == sorted(totals.throughput["seconds"])


def test_a_total_may_come_from_a_worker() -> None:
    counter = ProgressCounter("finetune", None)
    counter.report("steps", WorkDone(3, tokens=9), total=12)
    assert totals_of(counter, lambda totals: totals.work.done == 3).total == 12


def test_parts_that_have_not_begun_count_as_the_others_do() -> None:
    counter = ProgressCounter("finetune", None, num_parts=4)
    counter.report("fold 0", WorkDone(0, before=10), total=10)
    counter.report("fold 1", WorkDone(3, tokens=9), total=12)
    totals = totals_of(counter, lambda totals: totals.work.done == 3)
    assert (totals.work.before, totals.total) == (10, 44)
    for fold in (2, 3):
        counter.report(f"fold {fold}", WorkDone(1), total=11)
    assert totals_of(counter, lambda totals: totals.work.done == 5).total == 44


def test_the_throughput_of_a_long_stage_stays_short() -> None:
    counter = ProgressCounter("score", None)
    for shard in range(1000):
        counter.report(str(shard), WorkDone(1, tokens=1))
    throughput = totals_of(counter, lambda totals: totals.work.done == 1000).throughput
    assert 50 < len(throughput["tokens"]) <= 200
    assert throughput["tokens"][-1] == 1000
    steps = np.diff(throughput["tokens"])[:-1]
    assert steps.min() == steps.max(), "evenly over the whole stage"
    assert throughput["tokens"][0] <= 8


def test_progress_follows_the_tally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.1)
    run = Run.at(tmp_path)
    with tracked(run, Progress(stage="score", unit="rows", done=40, total=100, rejects=3)) as counter:
        first = Progress.read(run.folder)
        assert first is not None
        assert (first.done, first.tokens_per_second) == (40, None)
        counter.report("a", WorkDone(10, rows=10, tokens=500))
        wait_for_file(run, done=50)
        counter.report("b", WorkDone(20, rows=20, tokens=1000, unscored=1, before=2))
        totals_of(counter, lambda totals: totals.work.done == 30)
    last = Progress.read(run.folder)
    assert last is not None
    assert (last.done, last.total, last.tokens, last.rejects, last.unscored) == (72, 100, 1500, 3, 1)
    assert last.tokens_per_second is not None
    assert last.tokens_per_second > 0
    assert last.seconds_left is not None
    assert (last.state, last.stage) == ("running", "score")
    assert counter.totals() is None, "a long driver would gather the counts of every stage"


def test_a_terminal_shows_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.1)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with tracked(Run.at(tmp_path), Progress(stage="score", unit="rows", done=40, total=100, rejects=3)) as counter:
        counter.report("a", WorkDone(60, rows=60, tokens=500))
        totals_of(counter, lambda totals: totals.work.done == 60)
        time.sleep(0.5)
    shown = capsys.readouterr().err
    assert "| 40 of 100 rows (40%), 3 rejects\r" in shown
    assert "score    |████████████████| 100 of 100 rows (100%), 3 rejects" in shown


def test_after_an_error_nothing_more_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run may be another driver's by then."""
    monkeypatch.setattr(module, "EVERY_S", 0.05)
    pauses = list[float | None]()

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout)
            return super().wait(timeout)

    monkeypatch.setattr(module, "threading", SimpleNamespace(Event=Watched, Thread=threading.Thread))
    run = Run.at(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupted(run, pauses)
    assert Progress.read(run.folder) == Progress(stage="of another driver")


def interrupted(run: Run, pauses: list[float | None]) -> None:
    with tracked(run, Progress(stage="score", unit="rows", total=100)) as counter:
        counter.report("a", WorkDone(10))
        module.EVERY_S = 3600.0
        deadline = time.monotonic() + 300
        while 3600.0 not in pauses:  # until then a write may be under way
            assert time.monotonic() < deadline, pauses
            time.sleep(0.01)
        place = run / PROGRESS_FILE
        place.write_text('{"stage": "of another driver"}')
        raise KeyboardInterrupt
