"""The job of a comparison: does the run's selection train a better model than other sets of rows do?

finished runs ─► sets of rows ─► a fine-tune for each arm, size, schedule and seed ─► held-out measures ─► the page

<output>/
  heldout/            the held-out data, prepared as the run's data were
  sets/               the rows of each arm; the full set is the run's own examples
  instructions/       the instructions to answer, if a list is given
  arms/               a folder for each fine-tune: its manifests, scores/ of the held-out examples and, on request,
                      their generations/ and matches/, and answers/ with outputs.json for alpaca_eval
  base_cache/         losses of the base, computed once
  left_out.parquet    held-out rows that are in the run's training pool: word for word, by their prompt or as near
                      copies
  comparison.json, comparison.html, results.parquet, tests.parquet, comparison.parquet, and their manifest
  manifests/compare.json
"""

import dataclasses
import json
import logging
from collections import Counter
from contextlib import ExitStack
from itertools import product
from typing import Any

from davir_ray.compare.arms import FinishedRun
from davir_ray.compare.copies import LeftOut, Reason, find_left_out
from davir_ray.compare.exact_match import check_expected
from davir_ray.compare.heldout import check_left
from davir_ray.compare.outputs import prepare_instructions
from davir_ray.compare.report import LEFT_OUT, report_comparison
from davir_ray.compare.sets import RowSets
from davir_ray.compare.trials import Trial, TrialSettings, plan_trials, run_trials
from davir_ray.config.compare import FULL, MAX_PASSES, CompareConfig, TrialName, order_of
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import RunConfig, Tracker
from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.config.yaml import dump, load
from davir_ray.data.detection import with_format
from davir_ray.data.files import list_files
from davir_ray.data.formats import needs_chat
from davir_ray.engine.connect import connected_to
from davir_ray.engine.trackers import check_tracker
from davir_ray.engine.tracking import Tracking
from davir_ray.errors import ConfigError, DataError, ModelError, OutputError
from davir_ray.inputs import check_base, last_config, scored_with
from davir_ray.places import read_template, written_by
from davir_ray.run.access import check_readable, probe_output
from davir_ray.run.files import digest, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import differences
from davir_ray.run.progress import Progress
from davir_ray.stages.finetune import what_matters
from davir_ray.stages.prepare import Preparation, prepare, scoring_spec
from davir_ray.stages.rank import require_extra
from davir_ray.stages.training_plan import plan_training

log = logging.getLogger(__name__)

_SHARD_ROWS = 128
"""Rows in a shard of held-out data or instructions. One actor generates the texts of a shard, which takes minutes: with
the thousands of rows that scoring takes at a time, one actor would do a whole benchmark, and lose it all if it dies."""


def compare(config: CompareConfig) -> Run:
    """Train every arm, measure it, and write the table and its page; arms that are complete are skipped."""
    config.require()
    config.warn_without_effect()
    runs, output = [Run.at(run) for run in config.runs], Run.at(config.output or "", overwrite=config.overwrite)
    check_tracker(config.track, output)
    inputs = [path for source in config.all_heldout() for path in source.paths]
    inputs += [config.instructions] if config.instructions else []
    check_readable([*((str(run), OutputError) for run in runs), *((path, DataError) for path in inputs)])
    output.check_claim(probe_output(output.folder))
    run_configs = [last_config(run) for run in runs]
    run, run_config = runs[0], run_configs[0]
    config = _with_formats(config, run_config, output)
    finished = [_finished(*of_run) for of_run in zip(runs, run_configs, strict=True)]
    for one, arm in product(runs, config.arms):
        if (order := order_of(arm)) is not None:
            require_extra(one, RankConfig(order=order))
    _check_replicates(runs, run_configs)
    recipe = _recipe(run_config, config.recipe)
    preparation = _preparation(run, run_config, config)
    # A comparison has its own folder: stages of a run would take its files for theirs.
    if str(output) in map(str, runs) or set((output / "manifests").names()) - {"compare.json"}:
        raise OutputError(f"{output} holds a run of jobs/score.py; choose another --output for the comparison")
    with ExitStack() as opened:
        for place in (*runs, output):
            opened.enter_context(connected_to(place, is_shared=config.output_is_shared))
        opened.enter_context(output.writing(dump(config)))
        heldout = output.within("heldout")
        prepare(
            heldout,
            config.all_heldout(),
            preparation,
            max_bad_fraction=config.max_bad_fraction,
            written=written_by(output, run_config.score),
        )
        if "exact_match" in config.measures:
            check_expected(heldout, config.generate.sources)
        sources = {"run": run_config.all_sources(), "heldout": config.all_heldout()}
        left_out = find_left_out(output / LEFT_OUT, run, heldout, sources, run_config.prepare)
        _log_left_out(left_out)
        check_left(heldout, left_out)
        planned = plan_training(preparation.base, recipe).config
        one_each = recipe.num_workers is None and planned.strategy == "ddp"  # then several arms train at once
        recipe = dataclasses.replace(planned, num_workers=1) if one_each else planned
        at_once, pool = plan_trials(recipe, run_config.score, config.arms_at_once)
        settings = TrialSettings(
            base=preparation.base,
            spec=run.require("prepare").fingerprint["encoding"],
            chat_template=preparation.chat_template,
            heldout=heldout,
            score=dataclasses.replace(pool, base_cache=pool.base_cache or str(output / "base_cache")),
            generate=config.generate,
            matches="exact_match" in config.measures,
            instructions=_instructions(config, run_config, preparation, output),
            keep_models=config.keep_models,
        )
        trials = _trials(config, finished, recipe, settings, output)
        run_trials(trials, at_once, lambda done: _write_progress(output, done, len(trials)), config.track)
        output.remember(dump(config))
        report_comparison(config, run_config.base or "", recipe, output, trials, left_out)
        if config.track is not None:
            _track_measures(output, trials, config.track)
    return output


def _log_left_out(left_out: LeftOut) -> None:
    """Log the held-out rows that are left out, and the rows of the pool whose text is not known."""
    if left_out.rows.num_rows:
        counts = left_out.counts
        log.warning(
            "compare: %d held-out rows are in the run's training pool and are left out: %d word for word, %d by their "
            "prompt, %d as near copies",
            left_out.rows.num_rows, *(counts[reason] for reason in Reason),
        )  # fmt: skip
    if left_out.num_not_read:
        log.warning(
            "compare: of %d rows of the pool only the rendered text is compared, because a chat template rendered them "
            "and the run kept no records (--keep_record false)",
            left_out.num_not_read,
        )


def _with_formats(config: CompareConfig, run_config: RunConfig, output: Run) -> CompareConfig:
    """The settings with the format of every held-out source, found where it is auto."""
    written = written_by(output, run_config.score)
    sources = [with_format(source, list_files(source, written), run_config.prepare) for source in config.all_heldout()]
    if config.heldout is not None:
        return dataclasses.replace(config, heldout_format=sources[0].format)
    return dataclasses.replace(config, heldout_sources=sources)


def _track_measures(output: Run, trials: list[Trial], tracker: Tracker) -> None:
    """Log what was measured of each trial, as in comparison.parquet, to its tracking run."""
    rows = read_parquet(output / "comparison.parquet").to_pylist()
    for trial in trials:
        of_trial = [row for row in rows if all(row[name] == value for name, value in trial.name._asdict().items())]
        names = ["/".join(filter(None, ("heldout", row["measure"], row["source"]))) for row in of_trial]
        with Tracking(trial.run, tracker, str(trial.name)) as tracking:
            tracking.log_results(dict(zip(names, (row["value"] for row in of_trial), strict=True)))


def _finished(run: Run, run_config: RunConfig) -> FinishedRun:
    """The run, after checking that it was ranked, selected and trained as its configuration says."""
    for stage, own in (("rank", run_config.rank), ("select", run_config.select)):
        made_with = run.require(stage).fingerprint
        settings = own.as_rule() if isinstance(own, SelectConfig) else own.as_order()
        now = json.loads(json.dumps(settings))
        if (made_with["rule"] if stage == "select" else {name: made_with[name] for name in now}) != now:
            raise OutputError(
                f"{run} was not {stage}ed with the settings in its config.yaml; run jobs/rank.py with them"
            )
    trained = None if run_config.reference else run.require("finetune")
    changed = differences(trained.fingerprint["recipe"], what_matters(run_config.finetune)) if trained else []
    if changed:
        raise OutputError(
            f"the reference of {run} was trained with another recipe than its config.yaml says "
            f"({'; '.join(changed)}); run jobs/score.py with the original settings, which skips what is complete"
        )
    return FinishedRun(run, run_config.rank, run_config.select)


def _check_replicates(runs: list[Run], configs: list[RunConfig]) -> None:
    """Check that several runs differ in the reference alone, and that each has a reference of its own."""

    def made_of(run: Run, config: RunConfig) -> dict[str, Any]:
        recipe = None if config.reference else {**what_matters(config.finetune), "seed": None}
        return {
            "prepared examples": run.require("prepare").content,
            "base": run.require("score").fingerprint["base"],
            "rank": config.rank.as_order(),
            "select": dataclasses.asdict(config.select),
            "finetune": recipe,
        }

    references: dict[str, Run] = {}
    for run, config in zip(runs, configs, strict=True):
        if changed := differences(made_of(runs[0], configs[0]), made_of(run, config)):
            raise ConfigError(
                f"{run} cannot be compared together with {runs[0]}, from which it differs in {'; '.join(changed)}; "
                "several runs differ in the reference's seed alone"
            )
        reference = digest(run.require("score").fingerprint["reference"])
        if other := references.get(reference):
            raise ConfigError(
                f"{run} and {other} have the same reference, so they are no replicates; train one anew with another "
                "--finetune.seed"
            )
        references[reference] = run


def _recipe(run_config: RunConfig, changes: dict[str, Any]) -> FinetuneConfig:
    """The run's recipe with the changes; ConfigError if one is of the wrong type, or the run's recipe is not known."""
    if run_config.reference and not changes:
        raise ConfigError(
            f"the run's reference was given ({run_config.reference}), so how it was trained is not known here; say how "
            "the arms are trained with --recipe '{epochs: 3, learning_rate: 2e-5}' or another recipe (lora_rank for "
            "LoRA)"
        )
    if run_config.finetune.max_steps is not None and "epochs" not in changes:
        raise ConfigError(
            f"the run's reference was trained for finetune.max_steps = {run_config.finetune.max_steps}, but the arms "
            "are compared at equal epochs; say how many with --recipe '{epochs: 1}'"
        )
    fixed = {"max_steps": None, "export_epochs": False}
    fields = {**dataclasses.asdict(run_config.finetune), **changes, **fixed}
    return load(RunConfig, json.dumps({"finetune": fields})).finetune


def _preparation(run: Run, run_config: RunConfig, config: CompareConfig) -> Preparation:
    """How the held-out data become tokens: as the run's data did."""
    base = scored_with(run, "base", run_config.base or "", config.trust_remote_code)
    if changed := differences(run.require("score").fingerprint["base"], base.weights_digest()):
        raise ModelError(f"{base.uri} is not the base that {run} was scored with ({'; '.join(changed)})")
    template = read_template(run_config.chat_template)
    shard_rows = min(_SHARD_ROWS, run_config.prepare.shard_rows or _SHARD_ROWS)
    every = PrepareConfig()  # held-out rows are not dealt, and none is left out as a near duplicate
    small = dataclasses.replace(
        run_config.prepare, shard_rows=shard_rows, folds=every.folds, fold_by=every.fold_by, anchor=every.anchor,
        near_duplicates=every.near_duplicates,
    )  # fmt: skip
    preparation = Preparation(base=base, config=small, chat_template=template, limit=config.heldout_limit)
    check_base(preparation, config.all_heldout())
    spec, own = run.require("prepare").fingerprint["encoding"], scoring_spec(preparation, config.all_heldout())
    if not (spec["chat_template"] and own["chat_template"]):  # one of the two data sets has no messages
        own["chat_template"] = spec["chat_template"]
    if changed := differences(spec, own):
        raise ModelError(f"{base.uri} does not encode text as it did when {run} was made ({'; '.join(changed)})")
    return preparation


def _instructions(config: CompareConfig, run_config: RunConfig, preparation: Preparation, output: Run) -> Run | None:
    """Prepare the list of instructions; None if there is none."""
    if not config.instructions:
        return None
    chat = config.instructions_chat
    if chat is None:
        chat = all(needs_chat(source, run_config.prepare) for source in run_config.all_sources())
    run = output.within("instructions")
    every = dataclasses.replace(preparation, limit=None)
    prepare_instructions(run, config.instructions, every, chat=chat, written=written_by(output, run_config.score))
    return run


def _write_progress(output: Run, done: int, total: int) -> None:
    """Write how many fine-tunes are complete; the comparison is incomplete until its report is written again."""
    output.uncommit("compare")
    output.write_progress(Progress(stage="compare", unit="arms", done=done, total=total))


def _trials(
    config: CompareConfig, runs: list[FinishedRun], recipe: FinetuneConfig, settings: TrialSettings, output: Run
) -> list[Trial]:
    """Every fine-tune of the comparison, after its rows are written; the first seed of all arms comes first."""
    sets = RowSets(config, runs, output)
    readings = {size: sets.readings(size, recipe) for size in sets.sizes}
    others = [arm for arm in config.arms if arm != FULL]
    if others and not any(readings.values()):
        raise ConfigError(
            f"readings is {config.readings!r}, which is left out for all sizes ({', '.join(map(str, readings))}), as "
            f"it takes more than {MAX_PASSES} passes over a set; give --readings '[tokens]'"
        )
    trials: dict[TrialName, Trial] = {}
    for model in range(max(map(config.num_models, config.arms))):
        trained = [arm for arm in config.arms if model < config.num_models(arm)]
        for (size, schedules), arm in product(readings.items(), trained):
            if arm == FULL:  # every schedule is the same
                rows, num_rows, schedules = sets.full, sets.full.num_rows, ["epochs"]
            elif schedules:
                rows, num_rows = sets.of(arm, size, model), size
            for schedule in schedules:
                name = TrialName(arm, num_rows, schedule, model)
                steps = sets.max_steps(schedule, size, rows, recipe)
                trials[name] = Trial(
                    name=name,
                    run=output.within(f"arms/{name}"),
                    rows=rows,
                    recipe=dataclasses.replace(recipe, seed=model, max_steps=steps),
                    settings=settings,
                )
    _warn_of_equal_steps(trials, recipe)
    return list(trials.values())


def _warn_of_equal_steps(trials: dict[TrialName, Trial], recipe: FinetuneConfig) -> None:
    """Warn of arms several models of which take the same steps, as a batch has all of their rows."""
    models = Counter(
        (name.arm, name.rows, name.reading, trial.rows.number)
        for name, trial in trials.items()
        if trial.rows.fits_batch(recipe)
    )
    if same := sorted({f"{arm}-{rows}" for (arm, rows, *_), count in models.items() if count > 1}):
        log.warning(
            "compare: a batch of %d has all rows of %s, so models on the same rows take the same steps whatever "
            "their seed (but for the base's dropout, if it has any), and are no replicates; give --recipe "
            "'{batch_size: …}' below their rows",
            recipe.batch_size, ", ".join(same),
        )  # fmt: skip
