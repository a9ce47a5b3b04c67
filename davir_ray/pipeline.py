"""The whole chain, read aloud: prepare, finetune, score, rank, select, report."""

import logging
from typing import Any

from davir_ray.config.rank import RankOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.yaml import dump
from davir_ray.engine.session import connected_to, place_of, writing
from davir_ray.errors import ConfigError, ModelError, OutputError
from davir_ray.inputs import check_inputs, foretell, prepare_inputs
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.access import check_readable, probe_output
from davir_ray.run.location import Location
from davir_ray.run.progress import Progress
from davir_ray.run.stages import remember, require
from davir_ray.stages.finetune import finetune
from davir_ray.stages.finished import remembered, scored_with
from davir_ray.stages.pairing import check_reference
from davir_ray.stages.prepare import Preparation, scoring_spec
from davir_ray.stages.rank import rank
from davir_ray.stages.report import report
from davir_ray.stages.score import score
from davir_ray.stages.select.rule import check_count, select
from davir_ray.stages.verify import Verification, verify

log = logging.getLogger(__name__)


def run_all(config: RunConfig) -> Location:
    """From raw data to a ranked, selected set and its report; stages that are complete are skipped."""
    config.require_input()
    config.require_select()
    run, base, preparation = check_inputs(config, config.reference)
    reference = _outside_reference(config, preparation)
    with writing(run, config):
        examples = prepare_inputs(run, config, preparation)
        check_count(config.select, examples.counts["prepared"], "prepared")
        if reference is None:
            spec = scoring_spec(preparation, config.all_sources())
            finetune(run, base, config.finetune, spec, overwrite=config.overwrite)
            reference = Checkpoint.find(str(run / "reference"), config.trust_remote_code)
        score(run, base, reference, config.score, keep_token_nll=config.keep_token_nll, overwrite=config.overwrite)
        remember(run, dump(config))
        _rank_and_report(run, config, config.trust_remote_code)
    return run


def finetune_only(config: RunConfig) -> Location:
    """Prepare and fine-tune; returns where the reference is. What jobs/score.py does afterwards is not looked at."""
    if config.dry_run:
        raise ConfigError("--dry_run is of jobs/score.py, which takes the same options; nothing was done")
    if config.reference is not None:
        raise ConfigError(f"reference is {config.reference!r}, so there is nothing to train; leave it out")
    config.require_input()
    run, base, preparation = check_inputs(config)
    with writing(run, config):
        prepare_inputs(run, config, preparation)
        spec = scoring_spec(preparation, config.all_sources())
        finetune(run, base, config.finetune, spec, overwrite=config.overwrite)
        remember(run, dump(config))
    return run / "reference"


def rank_only(options: RankOptions) -> Location:
    """Rank and select again from the scores of a finished run, by its own settings with some of them changed."""
    run = place_of(options.output)
    probe_output(run)
    scored = require(run, "score").counts["scored"]
    config = options.applied_to(remembered(run))
    config.require_select()
    check_count(config.select, scored, "scored")
    with writing(run, config):
        _rank_and_report(run, config, options.trust_remote_code)
    return run


def dry_run(config: RunConfig) -> list[str]:
    """Check settings, files, tokenizers and the cluster without loading a weight; returns what to tell the user."""
    config.require_input()
    config.require_select()
    run, _, preparation = check_inputs(config, config.reference)
    reference = _outside_reference(config, preparation)
    lines = foretell(run, config, preparation, None if reference else config.finetune)
    return [*lines, f"reference: {reference.uri if reference else 'fine-tuned in this run'}"]


def verify_only(output: str, num_rows: int, seed: int, *, trust_remote_code: bool = False) -> Verification:
    """Check the files of a finished run, and score random rows again one at a time.

    Code that comes with a model is run only if this command says so, whatever the run's configuration does.
    """
    run = place_of(output)
    check_readable([(str(run), OutputError)])
    require(run, "score")
    config = remembered(run)
    base = scored_with(run, "base", config.base or "", trust_remote_code)
    reference = scored_with(run, "reference", config.reference or str(run / "reference"), trust_remote_code)
    with connected_to(run, is_shared=config.output_is_shared):
        return verify(run, base, reference, num_rows, seed)


def _rank_and_report(run: Location, config: RunConfig, trust_remote_code: bool) -> None:
    Progress("rank").write(run)
    rank(run, config.rank)
    Progress("select").write(run)
    select(run, config.rank, config.select)
    remember(run, dump(config))
    Progress("report").write(run)
    report(run, config, _tokenizer(run, config, trust_remote_code))


def _tokenizer(run: Location, config: RunConfig, trust_remote_code: bool) -> Any:
    """The base's tokenizer, to spell tokens in the report; None if it cannot be loaded any more."""
    try:
        return scored_with(run, "base", config.base or "", trust_remote_code).tokenizer()
    except ModelError as error:
        log.warning("the report shows no tokens: %s", error)
        return None


def _outside_reference(config: RunConfig, preparation: Preparation) -> Checkpoint | None:
    """The given reference, once it is known to belong to the base."""
    if config.reference is None:
        return None
    reference = Checkpoint.find(config.reference, config.trust_remote_code)
    check_reference(reference, preparation, config.all_sources())
    return reference
