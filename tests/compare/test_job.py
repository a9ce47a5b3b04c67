"""Which fine-tunes make up a comparison: their order, the rows of each, and how long each is trained."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from davir_ray.compare import job
from davir_ray.compare.arms import FinishedRun
from davir_ray.config.compare import CompareConfig
from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import Status

ROWS, UNTRAINABLE, OWN_SIZE, BATCH = 100, 4, 30, 8


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinishedRun:
    """A finished run whose rule can take at most 50 rows; an arm's rows are its name and seed."""
    run = Run.at(tmp_path / "run")
    for stage, counts in (("prepare", {"prepared": ROWS}), ("score", {Status.NO_PREDICTOR: UNTRAINABLE})):
        Manifest(stage=stage, fingerprint={}, counts=dict(counts), files=[]).write(run.folder)
    monkeypatch.setattr(FinishedRun, "selection", lambda _, size: pa.table({"group": [""] * min(size or OWN_SIZE, 50)}))
    monkeypatch.setattr(FinishedRun, "rows_of", lambda _, arm, rows, seed: (arm, rows.num_rows, seed))
    return FinishedRun(run, RankConfig(), SelectConfig())


def trials(finished: FinishedRun, written: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """The trials of a comparison; `written` receives the rows of each set by name."""

    def write_set(run: Run, _: FinishedRun, rows: Any) -> None:
        assert run.folder.name not in written, "a set is written once"
        written[run.folder.name] = rows

    monkeypatch.setattr(job, "write_set", write_set)
    recipe = FinetuneConfig(batch_size=BATCH, epochs=2)
    output = Run.at(f"{finished.run}/../out")
    return job._trials(CompareConfig(**settings), finished, recipe, None, output)  # type: ignore[arg-type]


def test_every_arm_size_schedule_and_seed_is_trained_once_on_its_own_rows(
    finished: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, Any] = {}
    found = trials(finished, written, monkeypatch, arms=["selection", "random", "full"], sizes=[30, 10], seeds=2)
    names = [
        f"{arm}-{schedule}-seed{seed}"
        for seed in range(2)
        for arm, schedule in [
            ("selection-30", "epochs"), ("selection-30", "steps"), ("random-30", "epochs"), ("random-30", "steps"),
            ("full-100", "epochs"),
            ("selection-10", "epochs"), ("selection-10", "steps"), ("random-10", "epochs"), ("random-10", "steps"),
        ]
    ]  # fmt: skip
    assert [str(trial.name) for trial in found] == names
    assert [trial.run.folder.name for trial in found] == names
    for trial in found:
        arm, rows, schedule, seed = trial.name
        assert trial.recipe.seed == seed
        assert trial.recipe.max_steps == (2 * (ROWS - UNTRAINABLE) // BATCH if schedule == "steps" else None)
        if arm == "full":
            assert trial.examples == finished.run
        else:
            of_seed = seed if arm == "random" else 0
            assert written[trial.examples.folder.name] == (arm, rows, of_seed)
    assert len(written) == 2 * (1 + 2)


def test_without_sizes_the_runs_own_is_taken_and_one_that_cannot_be_reached_is_refused(
    finished: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trial,) = trials(finished, {}, monkeypatch, arms=["selection"], seeds=1, readings=["epochs"])
    assert str(trial.name) == f"selection-{OWN_SIZE}-epochs-seed0"
    with pytest.raises(ConfigError, match="sizes has 60, but the run's rule can take only 50 rows"):
        trials(finished, {}, monkeypatch, arms=["selection"], seeds=1, sizes=[60])
