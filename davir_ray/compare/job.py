"""A comparison, read aloud: does the run's selection train a better model than other sets of rows do?

finished run ─► sets of rows ─► a fine-tune for each arm, size, reading and seed ─► losses on held-out data ─► table

<output>/
  heldout/            the held-out data, prepared as the run's were
  sets/               the rows of each arm; the full set is the run's own examples
  instructions/       the list of instructions, if there is one
  arms/               a folder for each fine-tune: its manifests, scores/ of the held-out examples, and where they are
                      asked for generations/ and matches/ of them, and answers/ with outputs.json for alpaca_eval
  base_cache/         losses of the base, computed once
  left_out.parquet    held-out rows that are in the run's training pool
  comparison.json, comparison.html, results.parquet, comparison.parquet, and manifests/compare.json of these
"""

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.compare.arms import FinishedRun, write_set
from davir_ray.compare.exact_match import num_expected
from davir_ray.compare.heldout import Losses, check_left, in_training_pool, read_losses, read_matches
from davir_ray.compare.outputs import prepare_instructions
from davir_ray.compare.trials import STAGE, Setting, Trial, plan_trials, run_trials
from davir_ray.config.compare import DRAWN, CompareConfig, TrialName
from davir_ray.config.run import RunConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.config.yaml import dump, load
from davir_ray.engine.connect import connected_to
from davir_ray.errors import ConfigError, DataError, ModelError, OutputError
from davir_ray.inputs import check_base, last_config, read_template, scored_with, warn_without_effect, written_by
from davir_ray.models.training.loop import num_steps
from davir_ray.report.comparison import (
    FLEXIBLE,
    LOSS,
    RESULTS,
    STRICT,
    TABLE,
    ComparisonInputs,
    Measured,
    TrialFacts,
    render_comparison,
    results_rows,
    summarise_comparison,
)
from davir_ray.run.access import check_readable, probe_output
from davir_ray.run.files import committed_parquet, write_file, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest, differences
from davir_ray.run.progress import Progress
from davir_ray.schema import Status
from davir_ray.stages.finetune import what_matters
from davir_ray.stages.prepare import Preparation, prepare, scoring_spec

log = logging.getLogger(__name__)

HELDOUT = "heldout"
LEFT_OUT = "left_out.parquet"

_STAGE = "compare"
"""Of the manifest that says that the comparison is complete."""

_SHARD_ROWS = 128
"""Of held-out data and instructions. A shard is what one actor generates the texts of, for minutes: with the thousands
of rows that scoring takes at a time one actor would do all of a benchmark, and lose all of it when it dies."""


def compare(config: CompareConfig) -> Run:
    """Train every arm, measure it, and write the table and its page; arms that are complete are skipped."""
    config.require()
    warn_without_effect(config)
    run, output = Run.at(config.run or ""), Run.at(config.output or "", overwrite=config.overwrite)
    check_readable([(str(run), OutputError), *((path, DataError) for path in _inputs(config))])
    probe_output(output.folder)
    before = last_config(run)
    finished = _finished(run, before)
    recipe = _recipe(before, config.recipe)
    preparation = _preparation(run, before, config)
    _check_output(run, output)
    with (
        connected_to(run, is_shared=config.output_is_shared),
        connected_to(output, is_shared=config.output_is_shared),
        output.writing(dump(config)),
    ):
        heldout = output.within(HELDOUT)
        prepare(
            heldout,
            config.all_heldout(),
            preparation,
            max_bad_fraction=config.max_bad_fraction,
            written=written_by(output, before.score),
        )
        if "exact_match" in config.measures:
            _check_answers(heldout, config.generate.sources)
        left_out = _leave_out(run, output)
        check_left(heldout, left_out)
        at_once, pool = plan_trials(recipe, before.score, config.arms_at_once)
        setting = _setting(config, before, run, output, preparation, pool)
        trials = _Plan(config=config, finished=finished, output=output, recipe=recipe, setting=setting).trials()
        run_trials(trials, at_once, lambda done: _tell(output, done, len(trials)))
        output.remember(dump(config))
        _report(config, before, recipe, output, trials, left_out)
    return output


def _inputs(config: CompareConfig) -> list[str]:
    paths = [path for source in config.all_heldout() for path in source.paths]
    return paths + ([config.instructions] if config.instructions else [])


def _check_output(run: Run, output: Run) -> None:
    """A comparison's folder is its own: stages of a run would take its parts for theirs."""
    if str(output) == str(run) or set((output / "manifests").names()) - {f"{_STAGE}.json"}:
        raise OutputError(f"{output} holds a run of jobs/score.py; choose another --output for the comparison")


def _finished(run: Run, before: RunConfig) -> FinishedRun:
    """The run, once it is known that its configuration is that of its selection."""
    for stage, own in (("rank", before.rank), ("select", before.select)):
        made_with = run.require(stage).fingerprint
        now = json.loads(json.dumps(dataclasses.asdict(own)))
        if (made_with["rule"] if stage == "select" else {name: made_with[name] for name in now}) != now:
            raise OutputError(f"{run} was not {stage}ed with what its config.yaml says; run jobs/rank.py with it again")
    trained = None if before.reference else run.require("finetune")
    changed = differences(trained.fingerprint["recipe"], what_matters(before.finetune)) if trained else []
    if changed:
        raise OutputError(
            f"the reference of {run} was trained with another recipe than its config.yaml says "
            f"({'; '.join(changed)}); run jobs/score.py with what it was made with, which skips what is complete"
        )
    return FinishedRun(run, before.rank, before.select)


def _recipe(before: RunConfig, changes: dict[str, Any]) -> FinetuneConfig:
    """The run's recipe with the changes; ConfigError where one is of the wrong type, or the run's is not known."""
    if before.reference and not changes:
        raise ConfigError(
            f"the run's reference was given ({before.reference}), so how it was trained is not known here; say how the "
            "arms are trained with --recipe '{epochs: 3, learning_rate: 2e-5}' or another recipe (lora_rank for LoRA)"
        )
    if before.finetune.max_steps is not None and "epochs" not in changes:
        raise ConfigError(
            f"the run's reference was trained for finetune.max_steps = {before.finetune.max_steps}, but the arms are "
            "compared at equal epochs; say how many with --recipe '{epochs: 1}'"
        )
    fields = {**dataclasses.asdict(before.finetune), **changes, "max_steps": None, "export_epochs": False}
    return load(RunConfig, json.dumps({"finetune": fields})).finetune


def _preparation(run: Run, before: RunConfig, config: CompareConfig) -> Preparation:
    """How the run's data became tokens, for the held-out data."""
    base = scored_with(run, "base", before.base or "", config.trust_remote_code)
    if changed := differences(run.require("score").fingerprint["base"], base.weights_digest()):
        raise ModelError(f"{base.uri} is not the base that {run} was scored with ({'; '.join(changed)})")
    template = read_template(before.chat_template)
    small = dataclasses.replace(before.prepare, shard_rows=min(_SHARD_ROWS, before.prepare.shard_rows))
    preparation = Preparation(base=base, config=small, chat_template=template, limit=config.heldout_limit)
    check_base(preparation, config.all_heldout())
    spec, own = run.require("prepare").fingerprint["encoding"], scoring_spec(preparation, config.all_heldout())
    if not (spec["chat_template"] and own["chat_template"]):  # one of the two has no messages
        own["chat_template"] = spec["chat_template"]
    if changed := differences(spec, own):
        raise ModelError(f"{base.uri} encodes text otherwise than when {run} was made ({'; '.join(changed)})")
    return preparation


def _setting(
    config: CompareConfig, before: RunConfig, run: Run, output: Run, preparation: Preparation,
    pool: ScoreConfig,
) -> Setting:  # fmt: skip
    """What all fine-tunes share; the instructions are prepared, if there are any."""
    instructions = output.within("instructions") if config.instructions else None
    if instructions:
        chat = config.instructions_chat
        if chat is None:
            chat = all(source.format == "messages" for source in before.all_sources())
        prepare_instructions(
            instructions, config.instructions or "", dataclasses.replace(preparation, limit=None),
            chat=chat, written=written_by(output, before.score),
        )  # fmt: skip
    return Setting(
        base=preparation.base,
        spec=run.require("prepare").fingerprint["encoding"],
        chat_template=preparation.chat_template,
        heldout=output.within(HELDOUT),
        score=dataclasses.replace(pool, base_cache=pool.base_cache or str(output / "base_cache")),
        generate=config.generate,
        matches="exact_match" in config.measures,
        instructions=instructions,
        keep_models=config.keep_models,
    )


def _leave_out(run: Run, output: Run) -> npt.NDArray[np.int64]:
    """Content hashes of held-out rows that the models may have been trained on, and a file of them."""
    hashes = in_training_pool(run, output.within(HELDOUT))
    if len(hashes):
        log.warning("compare: %d held-out texts are in the run's training pool and are left out", len(hashes))
    write_parquet(output / LEFT_OUT, pa.table({"content_hash": pa.array(hashes, pa.int64())}))
    return hashes


def _check_answers(heldout: Run, sources: list[str]) -> None:
    """ConfigError where there is nothing that a generated answer could be compared with."""
    if not num_expected(heldout, sources):
        raise ConfigError(
            "measures has exact_match, but no held-out response of "
            f"{', '.join(sources) or 'any source'} ends in an answer (#### or \\boxed, or a number in the record's "
            "column `answer`); leave it out, or name other sources in generate.sources"
        )


def _tell(output: Run, done: int, total: int) -> None:
    # The report is written again, also where nothing is to be trained.
    (output / "manifests" / f"{_STAGE}.json").remove()
    output.write_progress(Progress(stage=_STAGE, unit="arms", done=done, total=total))


@dataclass(kw_only=True)
class _Plan:
    """Which fine-tunes make up the comparison, on which rows; each set of rows is written once."""

    config: CompareConfig
    finished: FinishedRun
    output: Run
    recipe: FinetuneConfig
    setting: Setting
    _written: dict[str, Run] = dataclasses.field(default_factory=dict, init=False)
    """Sets of rows by name: finding the rows of one takes scans of the run."""

    def trials(self) -> list[Trial]:
        """Every fine-tune, its rows written; all arms with their first seed come first."""
        own = self.finished.selection(None)
        own_size = self.finished.size_of(own)
        trials: dict[str, Trial] = {}
        for size in self.config.sizes or [own_size]:
            selection = own if size == own_size else self.finished.selection(size)
            if self.finished.size_of(selection) != size:
                most = self.finished.size_of(selection)
                raise ConfigError(f"sizes has {size}, but the run's rule can take {most} rows only; leave it out")
            for seed in range(self.config.seeds):
                for arm in self.config.arms:
                    trials |= self._readings(arm, selection, size, seed)
        return sorted(trials.values(), key=lambda trial: trial.name.seed)

    def _readings(self, arm: str, selection: pa.Table, size: int, seed: int) -> dict[str, Trial]:
        """The fine-tunes of one arm with one seed, by name; of the full set both readings are the same."""
        if arm == "full":
            examples, readings = self._full_rows, ["epochs"]
            rows = examples.require("prepare").counts["prepared"]
        else:
            rows, readings = size, list(self.config.readings)
            examples = self._rows(arm, selection, size, seed)
        trials = {}
        for reading in readings:
            name = TrialName(arm, rows, reading, seed)
            steps = self._full_steps if reading == "steps" else None
            recipe = dataclasses.replace(self.recipe, seed=seed, max_steps=steps)
            trials[str(name)] = Trial(
                name=name,
                place=self.output.within(f"arms/{name}"),
                examples=examples,
                recipe=recipe,
                setting=self.setting,
            )
        return trials

    def _rows(self, arm: str, selection: pa.Table, size: int, seed: int) -> Run:
        """Write an arm's rows; drawn ones for each seed, others once."""
        name = f"{arm}-{size}" + (f"-seed{seed}" if arm in DRAWN else "")
        if name not in self._written:
            self._written[name] = self.output.within(f"sets/{name}")
            write_set(self._written[name], self.finished, self.finished.rows_of(arm, selection, seed))
        return self._written[name]

    @cached_property
    def _full_rows(self) -> Run:
        """Every prepared example; of a run with a mixture those of its sources, as often as it takes their rows."""
        if not self.finished.repeats:
            return self.finished.place
        place = self.output.within("sets/full")
        write_set(place, self.finished, None)
        return place

    @cached_property
    def _full_steps(self) -> int:
        """Optimiser steps of a fine-tune on the full set, as many of its rows as can be trained on."""
        counts = self._full_rows.require("prepare").counts
        trainable = counts.get("trainable")
        if trainable is None:  # the run's own examples
            trainable = counts["prepared"] - self.finished.place.require("score").counts.get(Status.NO_PREDICTOR, 0)
        return num_steps(trainable, self.recipe.batch_size, self.recipe.epochs)


def _report(
    config: CompareConfig, before: RunConfig, recipe: FinetuneConfig, output: Run, trials: list[Trial],
    left_out: npt.NDArray[np.int64],
) -> None:  # fmt: skip
    """Write the table, the facts and the page."""
    started, prepared = time.monotonic(), output.within(HELDOUT).require("prepare")
    losses = {trial.name: read_losses(trial.place, output.within(HELDOUT)) for trial in trials}
    first = losses[trials[0].name]
    leaked = np.isin(first.hashes, left_out)
    valued = np.isfinite(np.stack([first.base_nll, *(found.nll for found in losses.values())])).all(axis=0)
    measures = [_loss_of(losses, first, ~leaked, np.asarray(valued))] if "loss" in config.measures else []
    if "exact_match" in config.measures:
        measures += _matches_of(trials, first, leaked)
    facts, table = summarise_comparison(
        ComparisonInputs(
            settings=dataclasses.asdict(config),
            run=config.run or "",
            base=before.base or "",
            recipe=dataclasses.asdict(recipe),
            heldout=prepared.counts,
            in_training_pool=int(leaked.sum()),
            trials={trial.name: _facts_of(trial) for trial in trials},
            measures=measures,
        )
    )
    facts_json = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
    files = [
        committed_parquet(output / LEFT_OUT)[0],
        write_parquet(output / "comparison.parquet", pa.Table.from_pylist(table, TABLE)),
        write_parquet(output / "results.parquet", pa.Table.from_pylist(results_rows(facts), RESULTS)),
        write_file(output / "comparison.json", facts_json.encode()),
        write_file(output / "comparison.html", render_comparison(facts).encode()),
    ]
    made_of = {str(trial.name): trial.place.require(STAGE).content for trial in trials}
    fingerprint = {"heldout": prepared.content, "arms": made_of}
    seconds = time.monotonic() - started
    output.commit(
        Manifest(stage=_STAGE, fingerprint=fingerprint, counts={"arms": len(trials)}, files=files, seconds=seconds)
    )


def _loss_of(
    losses: dict[TrialName, Losses], first: Losses, new: npt.NDArray[np.bool_], valued: npt.NDArray[np.bool_]
) -> Measured:
    """Nats by tokens, of the held-out examples that no model was trained on and all have a loss of."""
    kept = new & valued
    return Measured(
        measure=LOSS,
        sources=first.sources[kept],
        weights=first.num_tokens[kept].astype(np.float64),
        values={name: found.nll[kept] for name, found in losses.items()},
        base=first.base_nll[kept],
        without_value=int((new & ~valued).sum()),
    )


def _matches_of(trials: list[Trial], first: Losses, leaked: npt.NDArray[np.bool_]) -> list[Measured]:
    """Right answers by questions, of the held-out examples that have an expected answer."""
    found = {trial.name: read_matches(trial.place) for trial in trials}
    ids = next(iter(found.values())).example_ids
    place = {example_id: row for row, example_id in enumerate(first.example_ids.tolist())}
    rows = np.array([place[example_id] for example_id in ids.tolist()], dtype=np.int64)
    new, valued = ~leaked[rows], np.isfinite(np.stack([matches.strict for matches in found.values()])).all(axis=0)
    kept, without_value = new & valued, int((new & ~valued).sum())
    return [
        Measured(
            measure=measure,
            sources=first.sources[rows][kept],
            weights=np.ones(int(kept.sum())),
            values={name: getattr(matches, field)[kept] for name, matches in found.items()},
            without_value=without_value,
        )
        for measure, field in ((STRICT, "strict"), (FLEXIBLE, "flexible"))
    ]


def _facts_of(trial: Trial) -> TrialFacts:
    measured, rows = trial.place.require(STAGE), trial.examples.require("prepare")
    return TrialFacts(
        num_examples=measured.counts["examples"],
        num_response_tokens=rows.counts["num_response_tokens"],
        num_steps=measured.counts["steps"],
        final_loss=measured.details["final_loss"],
        seconds=measured.seconds,
    )
