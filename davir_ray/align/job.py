"""The job of preference training: prepare, freeze, align, score, margins, report."""

from dataclasses import replace

from davir_ray.align.margins import margins
from davir_ray.align.report import report_margins
from davir_ray.align.sweep import check_comparable, finished_runs
from davir_ray.align.training import align, check_arithmetic
from davir_ray.config.align import AlignRunConfig
from davir_ray.config.yaml import dump
from davir_ray.engine.connect import connected_to
from davir_ray.engine.ray_train import check_workers
from davir_ray.engine.tracking import Tracking, counts_of
from davir_ray.inputs import check_inputs, prepare_inputs, with_formats
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.places import written_by
from davir_ray.run.folder import Run
from davir_ray.run.progress import Progress
from davir_ray.stages.dry_run import describe_run
from davir_ray.stages.prepare import scoring_spec
from davir_ray.stages.score import freeze, score

FROZEN_CACHE = "frozen_cache"
"""Folder in the run with the frozen policy's token losses, deleted once the trained policy has been scored. Scoring
reads them instead of computing them again, if training and scoring use the same arithmetic."""


def run_alignment(config: AlignRunConfig) -> Run:
    """Go from preference data to a trained policy and its report; stages that are complete are skipped."""
    config.require_input()
    config, files = with_formats(config, pairs=True)
    run, preparation = check_inputs(config)
    base, others = preparation.base, finished_runs(config.beside)
    spec = scoring_spec(preparation, config.all_sources())
    scoring = replace(config.score, base_cache=config.score.base_cache or str(run / FROZEN_CACHE))
    with (
        connected_to(run, is_shared=config.output_is_shared),
        run.writing(dump(config)) as there,
        Tracking(run, config.track) as tracking,
    ):
        if run.manifest("align") is None:
            check_workers(config.finetune)
            check_arithmetic(config.finetune, config.score)
        prepare_inputs(run, config, preparation, files, there)
        check_comparable(run, others, is_shared=config.output_is_shared)
        freeze(run, base, scoring, config.finetune)
        align(run, base, config.finetune, config.align, spec, tracking.steps)
        policy = Checkpoint.find(str(run / "policy"), config.trust_remote_code)
        score(run, base, policy, scoring, keep_token_nll="none")
        (run / FROZEN_CACHE).remove()
        run.remember(dump(config))
        run.write_progress(Progress(stage="margins"))
        measured = margins(run, config.align)
        run.write_progress(Progress(stage="report"))
        report_margins(run, config, others)
        held_out = measured.details.get("heldout_loss")
        results = counts_of(run, "score", "margins")
        tracking.log_results(results if held_out is None else results | {"heldout/loss": held_out})
    return run


def dry_run(config: AlignRunConfig) -> list[str]:
    """Check settings, files, tokenizers and the cluster without loading a weight; returns the lines to print."""
    config.require_input()
    config, _ = with_formats(config, pairs=True)
    run, preparation = check_inputs(config)
    finished_runs(config.beside)
    return describe_run(run, config, preparation, config.finetune, written_by(run, config.score))
