"""The main job from start to end: prepare, finetune, score, rank, select, report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from davir_ray.complete import found_inputs, record_complete
from davir_ray.config.rank import RankOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.selection import ALIGNED, NOT_MEASURED, REPEATED
from davir_ray.config.yaml import dump
from davir_ray.engine.connect import connected_to
from davir_ray.engine.tracking import Tracking, counts_of
from davir_ray.errors import ConfigError, DataError, ModelError, OutputError, UserError
from davir_ray.inputs import (
    check_inputs,
    check_reference,
    last_config,
    prepare_inputs,
    scored_with,
    with_formats,
)
from davir_ray.models.reference import Reference, by_fold
from davir_ray.places import written_by
from davir_ray.references import check_same_folds, given_reference, trained_reference
from davir_ray.run.access import check_readable, probe_output
from davir_ray.run.folder import Run
from davir_ray.run.progress import Progress
from davir_ray.stages.aligned_scores import align_scores
from davir_ray.stages.folds import Folds
from davir_ray.stages.prepare import TOKENIZER_CLASS, Preparation, scoring_spec
from davir_ray.stages.rank import rank, require_extra
from davir_ray.stages.repeats import check_prepared, check_recipe, check_repeats, open_repeats, repeat_scores
from davir_ray.stages.report import report
from davir_ray.stages.select.rule import check_count, select
from davir_ray.stages.stability import measure_stability

# Stages that load a model are imported by the functions that run them, because torch takes seconds to import.
if TYPE_CHECKING:
    from davir_ray.stages.verify import Verification

log = logging.getLogger(__name__)


def run_all(config: RunConfig) -> Run:
    """Run the chain from raw data to a ranked, selected set and its report; complete stages are skipped."""
    config.require_input()
    config.select.require_rule()
    config, files = with_formats(config)
    run, preparation = check_inputs(config, config.reference)
    _warn_of_quotas(config)
    reference = _given_reference(config, preparation)
    repeats = _repeats(run, config)
    inputs = found_inputs(preparation.base, reference, preparation.chat_template)
    with (
        connected_to(run, *repeats, is_shared=config.output_is_shared),
        run.writing(dump(config)) as there,
        Tracking(run, config.track) as tracking,
    ):
        examples = prepare_inputs(run, config, preparation, files, there)
        check_count(config.select, examples.counts["prepared"], "prepared")
        check_same_folds(config, examples)
        check_prepared(run, repeats)
        if reference is None:
            _finetune(run, config, preparation, tracking, repeats)
            reference = trained_reference(run, config.trust_remote_code)
        from davir_ray.stages.score import ifd, score, score_anchor, score_seen

        score(run, preparation.base, reference, config.score, keep_token_nll=config.keep_token_nll)
        if config.prepare.anchor > 0 and isinstance(reference, Mapping):
            score_anchor(run, preparation.base, reference, config.score)
        if config.score.both and isinstance(reference, Mapping):
            score_seen(run, preparation.base, reference, config.score)
        if "ifd" in config.score.also:
            ifd(run, preparation.base, config.score)
        run.remember(dump(config))
        _rank_and_report(run, config, repeats, config.trust_remote_code)
        record_complete(run, inputs)
        tracking.log_results(counts_of(run, "score", "rank", "select"))
    return run


def finetune_only(config: RunConfig) -> Run:
    """Prepare and fine-tune; the settings of later stages are not used."""
    if config.dry_run:
        raise ConfigError("--dry_run is an option of jobs/score.py, which takes the same options; nothing was done")
    if config.reference is not None:
        raise ConfigError(f"reference is {config.reference!r}, so there is nothing to train; leave it out")
    config.require_input()
    config, files = with_formats(config)
    run, preparation = check_inputs(config)
    with (
        connected_to(run, is_shared=config.output_is_shared),
        run.writing(dump(config)) as there,
        Tracking(run, config.track) as tracking,
    ):
        prepare_inputs(run, config, preparation, files, there)
        _finetune(run, config, preparation, tracking)
        run.remember(dump(config))
    return run


def rank_only(options: RankOptions) -> Run:
    """Rank and select again from the scores of a finished run, with its settings as changed by the options."""
    run = Run.at(options.output)
    probe_output(run.folder)
    scored = run.require("score").counts["scored"]
    config = options.applied_to(last_config(run))
    config.select.require_rule()
    check_count(config.select, scored, "scored")
    _warn_of_quotas(config)
    if config.rank.by not in (ALIGNED, REPEATED):  # which are computed here, if they are not there yet
        require_extra(run, config.rank)
    repeats = _repeats(run, config)
    check_repeats(run, repeats)
    with connected_to(run, *repeats, is_shared=config.output_is_shared), run.writing(dump(config)):
        _rank_and_report(run, config, repeats, options.trust_remote_code)
    return run


def dry_run(config: RunConfig) -> list[str]:
    """Check settings, files, tokenizers and the cluster without loading weights; returns lines for the user."""
    from davir_ray.stages.dry_run import describe_run

    config.require_input()
    config.select.require_rule()
    config, _ = with_formats(config)
    run, preparation = check_inputs(config, config.reference)
    _warn_of_quotas(config)
    reference = _given_reference(config, preparation)
    _repeats(run, config)
    training = None if reference else config.finetune
    lines = describe_run(run, config, preparation, training, written_by(run, config.score))
    return [*lines, f"reference: {config.reference or 'fine-tuned in this run'}"]


def verify_only(output: str, num_rows: int, seed: int, *, trust_remote_code: bool = False) -> Verification:
    """Check the files of a finished run, and score random rows again one at a time.

    Code that comes with a model is run only with `trust_remote_code`, whatever the run's configuration says.
    """
    from davir_ray.stages.verify import verify

    run = Run.at(output)
    check_readable([(str(run), OutputError)])
    run.require("score")
    config = last_config(run)
    base = scored_with(run, "base", config.base or "", trust_remote_code)
    if Folds.of(run.require("prepare")):
        given = given_reference(replace(config, trust_remote_code=trust_remote_code))
        reference = given or trained_reference(run, trust_remote_code)
    else:
        reference = scored_with(run, "reference", config.reference or str(run / "reference"), trust_remote_code)
    with connected_to(run, is_shared=config.output_is_shared):
        return verify(run, base, reference, num_rows, seed)


def _warn_of_quotas(config: RunConfig) -> None:
    """Warn where the order takes equal shares of folds that may differ in what they have."""
    column = config.prepare.fold_by
    if column is not None and not config.prepare.anchor and config.rank.by in (ALIGNED, REPEATED):
        log.warning(
            "folds by %r without --prepare.anchor: %s is of places within the fold, so a selection takes equal shares "
            "of every fold, which are quotas where the values of %r differ in what they have; with --prepare.anchor "
            "0.03 the scores are linked instead",
            column, config.rank.by, column,
        )  # fmt: skip


def _finetune(
    run: Run, config: RunConfig, preparation: Preparation, tracking: Tracking, repeats: Sequence[Run] = ()
) -> None:
    """Fine-tune the reference on all prepared examples, or that of each fold on the others.

    Raises OutputError before, if a repeat has been scored with the reference that this would make again.
    """
    from davir_ray.stages.finetune import finetune, what_matters
    from davir_ray.stages.fold_training import finetune_folds

    check_recipe(run, repeats, what_matters(config.finetune))
    spec = scoring_spec(preparation, config.all_sources())
    if folds := Folds.of(run.require("prepare")):
        finetune_folds(run, preparation.base, config.finetune, spec, folds, track=config.track)
    else:
        finetune(run, preparation.base, config.finetune, spec, steps=tracking.steps)


def _repeats(run: Run, config: RunConfig) -> list[Run]:
    """The repeats of a run, each complete; none where the order takes no account of them."""
    return open_repeats(run, config.rank.repeats) if config.rank.is_by_davir else []


def _rank_and_report(run: Run, config: RunConfig, repeats: list[Run], trust_remote_code: bool) -> None:
    run.write_progress(Progress(stage="rank"))
    if folds := Folds.of(run.require("prepare")):
        try:
            align_scores(run, folds)
        except UserError as error:
            if config.rank.by == ALIGNED:
                raise
            if repeats:
                raise DataError(f"{error}; or leave the repeats out, with --rank.repeats '[]'") from error
            log.warning("extra/%s is not written: %s", ALIGNED, error)
    if repeats:
        repeat_scores(run, repeats)
    rank(run, config.rank)
    run.write_progress(Progress(stage="select"))
    select(run, config.rank, config.select)
    if repeats:
        measure_stability(run, config.rank)
    else:
        log.info(NOT_MEASURED)
    run.remember(dump(config))
    run.write_progress(Progress(stage="report"))
    report(run, config, _tokenizer(run, config, trust_remote_code))


def _tokenizer(run: Run, config: RunConfig, trust_remote_code: bool) -> Any:
    """The base's tokenizer, for the tokens that the report shows; None if it can no longer be loaded."""
    try:
        base = scored_with(run, "base", config.base or "", trust_remote_code)
        return base.tokenizer(run.require("prepare").details.get(TOKENIZER_CLASS))
    except ModelError as error:
        log.warning("the report shows no tokens: %s", error)
        return None


def _given_reference(config: RunConfig, preparation: Preparation) -> Reference | None:
    """The user's reference, after checking that it belongs to the base; None if the run fine-tunes one."""
    reference = given_reference(config)
    if reference is not None:
        for checkpoint in by_fold(reference).values():
            check_reference(checkpoint, preparation, config.all_sources())
    return reference
