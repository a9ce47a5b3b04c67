"""Which fine-tunes make up a comparison: their order, the rows of each, and how long each is trained."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from davir_ray.compare import job, sets
from davir_ray.compare.arms import FinishedRun
from davir_ray.compare.trials import Trial
from davir_ray.config.compare import CompareConfig
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import RunConfig
from davir_ray.config.selection import Part, RankConfig, SelectConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError
from davir_ray.models.training.loop import plan
from davir_ray.run.files import FileEntry
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import Status

ROWS, UNTRAINABLE, OWN_SIZE, BATCH, EPOCHS = 100, 4, 30, 8, 2
TOKENS = 20
"""Mean response tokens of all rows that can be trained on."""
MEANS = {"selection": 10, "lowest": 40}
"""Mean response tokens of the rows of an arm, where it is another."""


@dataclass
class Made:
    """Runs whose rules can take at most 50 rows, and what a comparison of them writes."""

    runs: list[FinishedRun]
    output: Run
    mean_tokens: dict[str, float] | None = None
    """Of the rows that an arm may take; None: it is that of all."""
    written: dict[str, Any] = field(default_factory=dict)
    """Arm, run, number of rows, draw and options of each set, by its name."""

    def trials(self, *, recipe: dict[str, Any] | None = None, **settings: Any) -> list[Trial]:
        """The trials of a comparison, of which nothing is trained."""
        settings = {"run": [run.run.folder.name for run in self.runs], **settings}
        own = FinetuneConfig(**{"batch_size": BATCH, "epochs": EPOCHS, **(recipe or {})})
        return job._trials(CompareConfig(**settings), self.runs, own, None, self.output)  # type: ignore[arg-type]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """One run; the ids that an arm has are those of `ids_of`."""
    found = Made([made_run(tmp_path / "run0")], Run.at(tmp_path / "out"))

    def selection(run: FinishedRun, size: int | None) -> pa.Table:
        rows = min(size or OWN_SIZE, 50)
        first = 5 * int(run.run.folder.name[-1])  # each run selects other rows
        return pa.table({"group": [""] * rows, "example_id": np.arange(first, first + rows)})

    def rows_of(run: FinishedRun, arm: str, rows: pa.Table, draw: int, **options: Any) -> Any:
        ids = np.arange(rows.num_rows) if arm == "random" else np.asarray(rows["example_id"])
        return Chosen(ids, (arm, run.run.folder.name, rows["example_id"][0].as_py(), rows.num_rows, draw), options)

    def write_set(run: Run, finished: FinishedRun, rows: Any) -> None:
        name = run.folder.name
        assert name not in found.written, "a set is written once"
        found.written[name] = rows
        num_rows = (ROWS if rows is None else len(rows)) * finished.repeats.get("", 1)
        counts = {"prepared": num_rows, "trainable": num_rows}
        counts["num_response_tokens"] = num_rows * MEANS.get(name.split("-")[0], TOKENS)
        Manifest(stage="prepare", fingerprint={}, counts=counts, files=[]).write(run.folder)

    monkeypatch.setattr(FinishedRun, "selection", selection)
    monkeypatch.setattr(FinishedRun, "mean_tokens", lambda run: found.mean_tokens)
    monkeypatch.setattr(FinishedRun, "rows_of", rows_of)
    monkeypatch.setattr(sets, "write_set", write_set)
    return found


class Chosen(np.ndarray):
    """Ids that know how they were asked for."""

    def __new__(cls, ids: Any, asked: Any, options: Any) -> Any:
        array = np.asarray(ids).view(cls)
        array.asked, array.options = asked, options
        return array


def made_run(folder: Path, examples: int = ROWS, reference: str = "reference") -> FinishedRun:
    run, tokens = Run.at(folder), TOKENS * (examples - UNTRAINABLE)
    prepared = {"prepared": examples, "num_response_tokens": tokens}
    Manifest(stage="prepare", fingerprint={}, counts=prepared, files=[]).write(run.folder)
    fingerprint = {"base": {"model": "base"}, "reference": {"model": reference}}
    Manifest(stage="score", fingerprint=fingerprint, counts={Status.NO_PREDICTOR: UNTRAINABLE}, files=[]).write(
        run.folder
    )
    return FinishedRun(run, RankConfig(), SelectConfig())


def rows_trained(trial: Trial) -> int:
    """Number of rows in the steps of a trial, counted one by one."""
    own = trial.recipe
    batches = plan(trial.rows.num_trainable, own.batch_size, own.epochs, own.seed, own.max_steps)
    return sum(len(batch.rows) for batch in batches)


def test_every_arm_size_schedule_and_seed_is_trained_once_on_its_own_rows(made: Made) -> None:
    arms = ["selection", "random", "full"]
    found = made.trials(arms=arms, sizes=[30, 10], seeds=2, readings=["epochs", "steps"])
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
            assert trial.examples == made.runs[0].run
            assert (trial.rows.num_rows, trial.rows.num_trainable) == (ROWS, ROWS - UNTRAINABLE)
        else:
            of_seed = seed if arm == "random" else 0
            assert trial.rows.number == of_seed
            assert made.written[trial.examples.folder.name].asked == (arm, "run0", 0, rows, of_seed)
    assert sorted(made.written) == [
        "random-10-seed0", "random-10-seed1", "random-30-seed0", "random-30-seed1", "selection-10", "selection-30",
    ]  # fmt: skip


def test_without_sizes_the_runs_own_is_taken_and_one_that_cannot_be_reached_is_refused(made: Made) -> None:
    (trial,) = made.trials(arms=["selection"], seeds=1, readings=["epochs"])
    assert str(trial.name) == f"selection-{OWN_SIZE}-epochs-seed0"
    with pytest.raises(ConfigError, match=r"sizes has 60, but the rule of .*run0 can take only 50 rows"):
        made.trials(arms=["selection"], seeds=1, sizes=[60])


def test_seeds_by_arm_and_several_models_on_a_draw(made: Made) -> None:
    arms = ["selection", "random", "random_matched"]
    seeds = {"random": 5, "random_matched": 3, "default": 2}
    found = made.trials(arms=arms, seeds=seeds, seeds_per_draw=2, readings=["tokens"])
    of_arm = {
        arm: [(trial.name.seed, trial.recipe.seed, trial.rows.number) for trial in found if trial.name.arm == arm]
        for arm in arms
    }
    assert of_arm == {
        "selection": [(0, 0, 0), (1, 1, 0)],
        "random": [(0, 0, 0), (1, 1, 0), (2, 2, 1), (3, 3, 1), (4, 4, 2)],
        "random_matched": [(0, 0, 0), (1, 1, 0), (2, 2, 1)],
    }
    assert [trial.name.seed for trial in found] == sorted(trial.name.seed for trial in found)
    drawn = {name: chosen.asked[-1] for name, chosen in made.written.items() if name.startswith("random-")}
    assert drawn == {"random-30-seed0": 0, "random-30-seed1": 1, "random-30-seed2": 2}


def test_the_models_of_several_runs_have_the_rows_of_each_in_turn(made: Made, tmp_path: Path) -> None:
    made.runs.append(made_run(tmp_path / "run1"))
    arms = ["selection", "random", "random_matched", "lowest", "full"]
    found = made.trials(arms=arms, seeds=3, readings=["epochs"], outside_selection=True, match_prompts=True)
    sets_of = {
        arm: [(trial.rows.number, trial.examples.folder.name) for trial in found if trial.name.arm == arm]
        for arm in arms
    }
    drawn = [[(draw, f"{arm}-30-seed{draw}") for draw in range(3)] for arm in ("random", "random_matched")]
    assert sets_of == {
        "selection": [(0, "selection-30"), (1, "selection-30-run1"), (0, "selection-30")],
        "random": drawn[0],
        "random_matched": drawn[1],
        "lowest": [(0, "lowest-30"), (1, "lowest-30-run1"), (0, "lowest-30")],
        "full": [(0, "run0")] * 3,
    }
    # Arm, run whose pool it is, first row of the selection that it is like, rows, and number of the draw or the run.
    assert {name: chosen.asked for name, chosen in made.written.items()} == {
        "selection-30": ("selection", "run0", 0, 30, 0),
        "selection-30-run1": ("selection", "run1", 5, 30, 1),
        "lowest-30": ("lowest", "run0", 0, 30, 0),
        "lowest-30-run1": ("lowest", "run1", 5, 30, 1),
        **{f"random-30-seed{draw}": ("random", "run0", 0, 30, draw) for draw in range(3)},
        **{f"random_matched-30-seed{draw}": ("random_matched", "run0", 5 * (draw % 2), 30, draw) for draw in range(3)},
    }
    for name, chosen in made.written.items():
        assert chosen.options["match_prompts"]
        without = chosen.options["without"]
        assert (None if without is None else without.tolist()) == (list(range(35)) if "seed" in name else None)
    shared = {trial.examples.folder.name: trial.rows.num_shared for trial in found}
    assert (shared["selection-30"], shared["selection-30-run1"], shared["run0"]) == (30, 25, 30)


def test_equal_tokens_are_equal_for_rows_of_any_length(made: Made) -> None:
    """As many as random rows have in the recipe's epochs, to within half a batch."""
    arms = ["selection", "random", "lowest", "full"]
    for batch_size in (8, 7, 64):  # the last one has all rows of an arm
        found = made.trials(arms=arms, seeds=1, readings=["tokens"], recipe={"batch_size": batch_size})
        made.written.clear()
        steps = {}
        for trial in found:
            if trial.name.arm == "full":
                assert (trial.name.reading, trial.recipe.max_steps) == ("epochs", None)
                continue
            per_row = MEANS.get(trial.name.arm, TOKENS)
            tokens, wanted = rows_trained(trial) * per_row, OWN_SIZE * TOKENS * EPOCHS
            assert abs(tokens - wanted) <= per_row * min(batch_size, OWN_SIZE) / 2
            steps[trial.name.arm] = trial.recipe.max_steps
        assert steps["selection"] > steps["random"] > steps["lowest"] >= 1


def test_the_repeats_of_a_mixture_are_rows_that_are_trained_on(made: Made) -> None:
    """Thirty rows, each twice, beside a full set of a hundred rows, each twice: 50 steps are 6.25 passes."""
    mixture = SelectConfig(mixture=[Part(source="", top_k=OWN_SIZE, repeat=2)])
    made.runs[0] = replace(made.runs[0], select=mixture)
    found = made.trials(arms=["selection", "random", "full"], seeds=1, readings=["tokens", "steps"])
    of_name = {str(trial.name): trial for trial in found}
    assert of_name.keys() == {
        "selection-30-tokens-seed0", "selection-30-steps-seed0", "random-30-tokens-seed0", "random-30-steps-seed0",
        "full-200-epochs-seed0",
    }  # fmt: skip
    assert made.written["full"] is None
    assert of_name["selection-30-steps-seed0"].recipe.max_steps == 200 * EPOCHS // BATCH
    for arm, per_row in (("selection", MEANS["selection"]), ("random", TOKENS)):
        tokens = rows_trained(of_name[f"{arm}-30-tokens-seed0"]) * per_row
        assert abs(tokens - 2 * OWN_SIZE * TOKENS * EPOCHS) <= per_row * BATCH / 2
    assert of_name["full-200-epochs-seed0"].rows.num_shared == OWN_SIZE


def test_steps_are_left_out_where_they_would_pass_too_often_over_a_set(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    """24 steps are 6 passes over 30 rows, and 24 over 5."""
    with caplog.at_level(logging.WARNING):
        found = made.trials(arms=["random"], sizes=[30, 5], seeds=1, readings=["epochs", "steps"])
    assert [str(trial.name) for trial in found] == [
        "random-30-epochs-seed0", "random-30-steps-seed0", "random-5-epochs-seed0",
    ]  # fmt: skip
    assert "steps is left out for arms of 5 rows: it takes 24 passes" in caplog.text
    with pytest.raises(ConfigError, match=r"left out for all sizes \(5\).*more than 20 passes"):
        made.trials(arms=["random", "full"], sizes=[5], seeds=1, readings=["steps"])


@pytest.mark.parametrize(
    ("recipe", "settings", "named"),
    [
        ({"batch_size": 30}, {}, "selection-30"),
        ({"batch_size": 29}, {}, None),
        ({"batch_size": 30, "lora_rank": 2}, {}, None),
        ({"batch_size": 30}, {"seeds": 1}, None),
        ({"batch_size": 30}, {"seeds": 3, "seeds_per_draw": 2}, "random-30, selection-30"),
        ({"batch_size": 96}, {"arms": ["full"]}, "full-100"),
    ],
)
def test_models_that_take_the_same_steps_are_told(
    made: Made, caplog: pytest.LogCaptureFixture, recipe: Any, settings: Any, named: str | None
) -> None:
    with caplog.at_level(logging.WARNING):
        made.trials(recipe=recipe, **{"arms": ["selection", "random"], "seeds": 2, "readings": ["epochs"], **settings})
    assert (f"has all rows of {named}, so" in caplog.text) == (named is not None)
    assert ("take the same steps" in caplog.text) == (named is not None)


def test_runs_that_differ_in_more_than_the_reference_are_refused(made: Made, tmp_path: Path) -> None:
    first, second = made.runs[0].run, made_run(tmp_path / "run1", reference="other").run
    config = RunConfig(finetune=FinetuneConfig(seed=1))
    other_seed = replace(config, finetune=FinetuneConfig(seed=2))
    job._check_replicates([first], [config])
    job._check_replicates([first, second], [config, other_seed])
    same = made_run(tmp_path / "run2").run
    with pytest.raises(ConfigError, match=r"run2 and .*run0 have the same reference.*another --finetune\.seed"):
        job._check_replicates([first, same], [config, other_seed])
    for changes, named in (
        ({"rank": RankConfig(order="rho_sum")}, "rank.order"),
        ({"select": SelectConfig(top_k=3)}, "select.top_k"),
        ({"finetune": FinetuneConfig(epochs=9, seed=2)}, "finetune.epochs: 3 → 9"),
        ({"reference": "given"}, "finetune: "),
    ):
        with pytest.raises(ConfigError, match=f"run1 cannot be compared together with .*run0.* {named}"):
            job._check_replicates([first, second], [config, replace(other_seed, **changes)])
    manifest = second.require("score")
    replace(manifest, fingerprint={**manifest.fingerprint, "base": {"model": "new"}}).write(second.folder)
    with pytest.raises(ConfigError, match=r'differs in base\.model: "base" → "new"'):
        job._check_replicates([first, second], [config, other_seed])
    manifest.write(second.folder)
    pool = [FileEntry(name="examples/part-00000.parquet", rows=1, bytes=1, sha256="0")]
    replace(second.require("prepare"), files=pool).write(second.folder)
    with pytest.raises(ConfigError, match="differs in prepared examples: "):
        job._check_replicates([first, second], [config, other_seed])


def test_held_out_rows_have_no_folds_and_lose_no_near_duplicates(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made.runs[0].run
    fingerprint = {"encoding": {"chat_template": None}}
    Manifest(stage="prepare", fingerprint=fingerprint, counts={}, files=[]).write(run.folder)
    base = SimpleNamespace(weights_digest=lambda: {"model": "base"}, uri="base")
    monkeypatch.setattr(job, "scored_with", lambda *given: base)
    monkeypatch.setattr(job, "check_base", lambda *given: None)
    monkeypatch.setattr(job, "scoring_spec", lambda *given: {"chat_template": None})
    own = PrepareConfig(max_tokens=99, chat=True, folds=3, fold_by="user", anchor=0.1, near_duplicates="drop")
    heldout = job._preparation(run, RunConfig(prepare=own), CompareConfig())
    assert heldout.config == PrepareConfig(max_tokens=99, chat=True, shard_rows=heldout.config.shard_rows)
