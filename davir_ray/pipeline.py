"""The main job from start to end: prepare, finetune, score, rank, select, report."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from davir_ray.complete import found_inputs, record_complete
from davir_ray.config.rank import RankOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.yaml import dump
from davir_ray.engine.connect import connected_to
from davir_ray.engine.tracking import Tracking, counts_of
from davir_ray.errors import ConfigError, ModelError, OutputError
from davir_ray.inputs import (
    check_inputs,
    check_reference,
    last_config,
    prepare_inputs,
    scored_with,
    with_formats,
)
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.places import written_by
from davir_ray.run.access import check_readable, probe_output
from davir_ray.run.folder import Run
from davir_ray.run.progress import Progress
from davir_ray.stages.prepare import TOKENIZER_CLASS, Preparation, scoring_spec
from davir_ray.stages.rank import rank
from davir_ray.stages.report import report
from davir_ray.stages.select.rule import check_count, select

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
    reference = _given_reference(config, preparation)
    inputs = found_inputs(preparation.base, reference, preparation.chat_template)
    with (
        connected_to(run, is_shared=config.output_is_shared),
        run.writing(dump(config)) as there,
        Tracking(run, config.track) as tracking,
    ):
        examples = prepare_inputs(run, config, preparation, files, there)
        check_count(config.select, examples.counts["prepared"], "prepared")
        from davir_ray.stages.finetune import finetune
        from davir_ray.stages.score import score

        if reference is None:
            spec = scoring_spec(preparation, config.all_sources())
            finetune(run, preparation.base, config.finetune, spec, steps=tracking.steps)
            reference = Checkpoint.find(str(run / "reference"), config.trust_remote_code)
        score(run, preparation.base, reference, config.score, keep_token_nll=config.keep_token_nll)
        run.remember(dump(config))
        _rank_and_report(run, config, config.trust_remote_code)
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
        from davir_ray.stages.finetune import finetune

        spec = scoring_spec(preparation, config.all_sources())
        finetune(run, preparation.base, config.finetune, spec, steps=tracking.steps)
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
    with connected_to(run, is_shared=config.output_is_shared), run.writing(dump(config)):
        _rank_and_report(run, config, options.trust_remote_code)
    return run


def dry_run(config: RunConfig) -> list[str]:
    """Check settings, files, tokenizers and the cluster without loading weights; returns lines for the user."""
    from davir_ray.stages.dry_run import describe_run

    config.require_input()
    config.select.require_rule()
    config, _ = with_formats(config)
    run, preparation = check_inputs(config, config.reference)
    reference = _given_reference(config, preparation)
    training = None if reference else config.finetune
    lines = describe_run(run, config, preparation, training, written_by(run, config.score))
    return [*lines, f"reference: {reference.uri if reference else 'fine-tuned in this run'}"]


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
    reference = scored_with(run, "reference", config.reference or str(run / "reference"), trust_remote_code)
    with connected_to(run, is_shared=config.output_is_shared):
        return verify(run, base, reference, num_rows, seed)


def _rank_and_report(run: Run, config: RunConfig, trust_remote_code: bool) -> None:
    run.write_progress(Progress(stage="rank"))
    rank(run, config.rank)
    run.write_progress(Progress(stage="select"))
    select(run, config.rank, config.select)
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


def _given_reference(config: RunConfig, preparation: Preparation) -> Checkpoint | None:
    """The user's reference, after checking that it belongs to the base; None if the run fine-tunes one."""
    if config.reference is None:
        return None
    reference = Checkpoint.find(config.reference, config.trust_remote_code)
    check_reference(reference, preparation, config.all_sources())
    return reference
