"""What TensorBoard reads of a tracked training, and what is refused before any work."""

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from davir_ray.config.align import AlignRunConfig
from davir_ray.config.compare import CompareConfig
from davir_ray.config.run import InputConfig, RunConfig, Tracker
from davir_ray.engine.trackers import EVENTS, Step, TrackingRun, check_tracker
from davir_ray.errors import ConfigError
from davir_ray.inputs import check_inputs
from davir_ray.run.folder import Run


def curves(run: Run) -> list[dict[str, list[tuple[int, float]]]]:
    """The curves of each tracking run, oldest first, as TensorBoard reads them."""
    found = []
    for folder in sorted(Path(str(run / EVENTS)).iterdir(), key=lambda folder: folder.stat().st_mtime_ns):
        events = EventAccumulator(str(folder))
        events.Reload()
        found.append(
            {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        )
    return found


def steps(training: str, *numbers: int) -> list[Step]:
    return [Step(training, number, {"train/loss": 1 / number}) for number in numbers]


def test_a_resumed_run_goes_on_in_its_tracking_run_and_has_no_step_twice(tmp_path: Path) -> None:
    run = Run.at(tmp_path / "run")
    first = TrackingRun(run, "tensorboard", "run")
    first.log(steps("a", 1, 2, 4))
    first.log(steps("a", 2, 4, 8, 4, 8, 16))  # a worker that was replaced went on from step 1
    del first  # as a driver that is killed: nothing is closed
    again = TrackingRun(run, "tensorboard", "run")
    again.log(steps("a", 8, 16, 32))
    again.log_results({"score/scored": 40})
    again.close(failed=False)
    third = TrackingRun(run, "tensorboard", "run")
    third.log_results({"score/scored": 40})
    third.close(failed=False)
    (found,) = curves(run)
    assert found == {
        "train/loss": [(step, 1 / step) for step in (1, 2, 4, 8, 16, 32)],
        "score/scored": [(32, 40.0)],
    }


def test_another_training_in_the_same_run_has_a_tracking_run_of_its_own(tmp_path: Path) -> None:
    run = Run.at(tmp_path / "run")
    tracked = TrackingRun(run, "tensorboard", "run")
    tracked.log(steps("a", 1, 2))
    tracked.log(steps("b", 1, 2, 4))
    tracked.close(failed=True)
    assert [[step for step, _ in found["train/loss"]] for found in curves(run)] == [[1, 2], [1, 2, 4]]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow"])
def test_an_absent_package_is_named_before_anything_else(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, tracker, raising=False)
    (tmp_path / tracker).mkdir()  # the folder that wandb and mlflow leave behind is no package
    message = rf"track is {tracker}, but the package {tracker} is not installed; pip install 'davir_ray\[{tracker}\]'"
    configs: list[InputConfig] = [RunConfig(track=tracker), AlignRunConfig(track=tracker)]
    for config in configs:
        with pytest.raises(ConfigError, match=message):
            check_inputs(config)
    with pytest.raises(ConfigError, match=message):
        check_tracker(CompareConfig(track=tracker).track, Run.at(tmp_path / "run"))


def test_tensorboard_is_refused_where_it_cannot_write(tmp_path: Path) -> None:
    check_tracker("tensorboard", Run.at(tmp_path))
    check_tracker(None, Run.at("memory://run"))
    with pytest.raises(ConfigError, match="track is tensorboard, which writes to local files, but output is memory://"):
        check_tracker("tensorboard", Run.at("memory://run"))


def test_a_tracker_that_cannot_start_is_the_users_and_one_that_fails_later_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.at(tmp_path / "run")
    tracked = TrackingRun(run, "tensorboard", "run")
    tracked.log([Step("a", 1, {"train/loss": float("nan")}), Step("a", 2, {"train/loss": "no number"})])  # type: ignore[dict-item]
    assert "tensorboard does not take what" in caplog.text
    tracked.close(failed=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / EVENTS).write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="track is tensorboard, which cannot be started: "):
        TrackingRun(Run.at(tmp_path / "other"), "tensorboard", "run")
