"""Preference training, read aloud: prepare, freeze, align, score, margins, report."""

from dataclasses import replace

from davir_ray.align.margins import margins
from davir_ray.align.report import report_margins
from davir_ray.align.sweep import check_finished, check_sweep
from davir_ray.align.training import align, check_arithmetic
from davir_ray.config.align import AlignRunConfig
from davir_ray.config.yaml import dump
from davir_ray.engine.session import writing
from davir_ray.inputs import check_inputs, foretell, prepare_inputs
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.run.progress import Progress
from davir_ray.run.stages import remember
from davir_ray.stages.finetune import check_workers
from davir_ray.stages.prepare import scoring_spec
from davir_ray.stages.score import freeze, score

FROZEN_CACHE = "frozen_cache"
"""In the run, until it is scored: the frozen policy's token losses, which scoring the trained one reads again where the
training's arithmetic is scoring's."""


def run_alignment(config: AlignRunConfig) -> Location:
    """From preference data to a trained policy and its report; stages that are complete are skipped."""
    config.require_input()
    run, base, preparation = check_inputs(config)
    others = check_finished(config.beside)
    spec = scoring_spec(preparation, config.all_sources())
    scoring = replace(config.score, base_cache=config.score.base_cache or str(run / FROZEN_CACHE))
    with writing(run, config):
        if Manifest.read(run, "align") is None:
            check_workers(config.finetune)
            check_arithmetic(config.finetune, config.score)
        prepare_inputs(run, config, preparation)
        check_sweep(run, others, is_shared=config.output_is_shared)
        freeze(run, base, scoring, config.finetune, overwrite=config.overwrite)
        align(run, base, config.finetune, config.align, spec, overwrite=config.overwrite)
        policy = Checkpoint.find(str(run / "policy"), config.trust_remote_code)
        score(run, base, policy, scoring, keep_token_nll="none", overwrite=config.overwrite)
        (run / FROZEN_CACHE).remove()
        remember(run, dump(config))
        Progress("margins").write(run)
        margins(run, config.align)
        Progress("report").write(run)
        report_margins(run, config, others)
    return run


def dry_run(config: AlignRunConfig) -> list[str]:
    """Check settings, files, tokenizers and the cluster without loading a weight; returns what to tell the user."""
    config.require_input()
    run, _, preparation = check_inputs(config)
    check_finished(config.beside)
    return foretell(run, config, preparation, config.finetune)
