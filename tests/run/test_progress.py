"""How far a run is: what the file holds, what the line says, and that rates are those of the last minute."""

import json

import pytest

from davir_ray.run.location import Location
from davir_ray.run.progress import PROGRESS_FILE, WINDOW_S, Pace, Progress, duration


def pace_of(readings: list[tuple[float, int, int]]) -> Pace:
    pace = Pace()
    for at, done, tokens in readings:
        pace.add(at, done, tokens)
    return pace


def test_a_steady_run_has_its_rate_and_time_left() -> None:
    pace = pace_of([(at, 10 * at, 500 * at) for at in range(0, 300, 5)])
    assert pace.tokens_per_second == pytest.approx(500)
    assert pace.seconds_left(2000) == pytest.approx(200)
    assert pace.seconds_left(-10) == 0, "more was done than was thought to be there"


def test_only_the_last_minute_counts() -> None:
    fast = [(float(at), 100 * at, 1000 * at) for at in range(0, 1000, 5)]
    done, tokens = fast[-1][1:]
    slow = [(1000.0 + 5 * step, done + 5 * step, tokens + 50 * step) for step in range(int(WINDOW_S / 5) + 2)]
    pace = pace_of(fast + slow)
    assert pace.tokens_per_second == pytest.approx(10)
    assert pace.seconds_left(60) == pytest.approx(60)


def test_there_is_no_rate_where_nothing_is_known() -> None:
    assert Pace().tokens_per_second is None
    assert Pace().seconds_left(10) is None
    still = pace_of([(0.0, 0, 0), (5.0, 0, 0), (10.0, 0, 0)])
    assert still.tokens_per_second is None
    assert still.seconds_left(10) is None
    assert pace_of([(0.0, 0, 0), (5.0, 5, 5)]).seconds_left(None) is None


def test_a_step_back_is_no_negative_rate() -> None:
    """A worker that goes on from its last checkpoint has done less than the one that was lost."""
    pace = pace_of([(0.0, 0, 0), (5.0, 50, 500), (10.0, 20, 0)])
    assert pace.tokens_per_second is None
    pace.add(15.0, 30, 100)
    assert pace.tokens_per_second == pytest.approx(20)
    assert pace.seconds_left(10) == pytest.approx(5)


def test_shards_that_take_longer_than_the_window_have_a_steady_rate() -> None:
    """One shard of 800,000 tokens each 100 s, read every 5 s."""
    pace = Pace()
    for at in range(0, 2000, 5):
        pace.add(at, at // 100, at // 100 * 800_000)
        if at >= 205:
            assert pace.tokens_per_second == pytest.approx(8000, rel=0.06)


def test_a_rate_falls_while_nothing_more_is_done() -> None:
    pace = pace_of([(at, at, at) for at in range(0, 100, 5)])
    rates = []
    for at in range(100, 1000, 50):
        pace.add(at, 95, 95)
        rates.append(pace.tokens_per_second or 0.0)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1


def test_the_time_until_the_first_change_does_not_count() -> None:
    pace = pace_of([(0.0, 0, 0), (60.0, 10, 100), (70.0, 20, 200), (80.0, 30, 300)])
    assert pace.tokens_per_second == pytest.approx(10)


@pytest.mark.parametrize("content", ["{", "[]", '{"unit": "rows"}', "null"])
def test_a_file_that_is_not_ours_is_none(place: Location, content: str) -> None:
    (place / PROGRESS_FILE).write_text(content)
    assert Progress.read(place) is None


def test_a_file_of_a_later_version_is_read(place: Location) -> None:
    (place / PROGRESS_FILE).write_text('{"stage": "score", "state": "running", "colour": "red"}')
    assert Progress.read(place) == Progress(stage="score")


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (
            Progress(
                stage="score",
                unit="rows",
                done=256,
                total=1998,
                tokens_per_second=1232.4,
                seconds_left=282.0,
                rejects=2,
            ),
            "score: 256 of 1,998 rows (13%), 1,232 tokens/s, 5 min left, 2 rejects, 0 retries",
        ),
        (
            Progress(stage="score", unit="rows", done=9, total=10, unscored=3, rejects=1, retries=1),
            "score: 9 of 10 rows (90%), 1 reject, 3 without a score, 1 retry",
        ),
        (
            Progress(stage="prepare", unit="bytes", done=1_500_000, total=3_000_000, rows=1200),
            "prepare: 1.5 of 3.0 MB, 1,200 rows, 0 rejects, 0 retries",
        ),
        (Progress(stage="finetune", unit="steps", done=3), "finetune: 3 steps, 0 rejects, 0 retries"),
        (Progress(stage="rank"), "rank"),
    ],
)
def test_the_line(progress: Progress, line: str) -> None:
    assert str(progress) == line


@pytest.mark.parametrize(
    ("seconds", "line"), [(0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations(seconds: float, line: str) -> None:
    assert duration(seconds) == line


def test_the_file_comes_back_and_says_how_the_run_ended(place: Location) -> None:
    assert Progress.read(place) is None
    progress = Progress(stage="score", unit="rows", done=3, total=9, seconds_left=4.0)
    progress.write(place)
    found = Progress.read(place)
    assert found is not None
    assert found.updated.endswith("+00:00")
    Progress.end(place, "failed", "the disk is full")
    values = json.loads((place / PROGRESS_FILE).read_bytes())
    assert (values["stage"], values["state"], values["done"]) == ("score", "failed", 3)
    assert (values["error"], values["seconds_left"]) == ("the disk is full", None)


def test_a_run_that_fails_before_its_first_stage_says_so(place: Location) -> None:
    Progress.end(place, "failed", "no")
    found = Progress.read(place)
    assert found is not None
    assert (found.stage, found.state, found.error) == ("prepare", "failed", "no")
