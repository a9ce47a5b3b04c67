"""The whole chain, read aloud: prepare, finetune, score, rank, select, report."""

import dataclasses
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from davir_ray.access import check_readable, probe_output, storage_errors, translated
from davir_ray.cli import dump, load
from davir_ray.config import RunConfig
from davir_ray.errors import ConfigError, DataError, ModelError, OutputError, StorageError, UserError
from davir_ray.estimate import estimate, told
from davir_ray.lease import Lease
from davir_ray.manifest import Manifest
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.size import ModelSize
from davir_ray.progress import Progress
from davir_ray.stages.cluster import SUBMITTED_JOB, connected, num_nodes
from davir_ray.stages.pairing import check_base, check_reference
from davir_ray.stages.prepare import Preparation, prepare, scoring_spec
from davir_ray.stages.preview import device_rate, preview
from davir_ray.stages.ranking import rank
from davir_ray.stages.reporting import report
from davir_ray.stages.resume import CONFIG_FILE, check_claim, claim, remember, require
from davir_ray.stages.scoring import score
from davir_ray.stages.selection import check_count, select
from davir_ray.stages.streaming import plan_pool
from davir_ray.stages.training import finetune
from davir_ray.stages.verification import Verification, verify
from davir_ray.storage import Location, remove_leftovers

log = logging.getLogger(__name__)


def run_all(config: RunConfig) -> Location:
    """From raw data to a ranked, selected set and its report; stages that are complete are skipped."""
    config.require("output", "base", "data", "select")
    run, base, preparation = _check(config)
    reference = _outside_reference(config, preparation)
    with _writing(run, config):
        prepared = _prepare(run, config, preparation)
        check_count(config.select, prepared.counts["prepared"], "prepared")
        if reference is None:
            spec = scoring_spec(preparation, config.all_sources())
            finetune(run, base, config.finetune, spec, overwrite=config.overwrite)
            reference = Checkpoint.find(str(run / "reference"))
        score(run, base, reference, config.score, keep_token_nll=config.keep_token_nll, overwrite=config.overwrite)
        _rank_and_report(run, config)
    return run


def finetune_only(config: RunConfig) -> Location:
    """Prepare and fine-tune; returns where the reference is."""
    config.require("output", "base", "data")
    run, base, preparation = _check(config)
    with _writing(run, config):
        _prepare(run, config, preparation)
        spec = scoring_spec(preparation, config.all_sources())
        finetune(run, base, config.finetune, spec, overwrite=config.overwrite)
    return run / "reference"


def rank_only(config: RunConfig) -> Location:
    """Rank and select again from the scores of a finished run; only output, rank and select are used."""
    config.require("output", "select")
    run = _output(config)
    probe_output(run)
    with storage_errors(run):
        check_count(config.select, require(run, "score").counts["scored"], "scored")
        before = _remembered(run)
        shared = config.output_is_shared or before.output_is_shared
        config = dataclasses.replace(before, rank=config.rank, select=config.select, output_is_shared=shared)
    with _writing(run, config):
        _rank_and_report(run, config)
    return run


def dry_run(config: RunConfig) -> list[str]:
    """Check settings, files, tokenizers and the cluster without loading a weight; returns what to tell the user."""
    config.require("output", "base", "data", "select")
    run, base, preparation = _check(config)
    reference = _outside_reference(config, preparation)
    lines, data = preview(config.all_sources(), preparation)
    with _connected(run, config):
        check_claim(run)
        pool = plan_pool(config.score)
        rate = device_rate(config.estimate)
    found = estimate(ModelSize.of(base), data, config.prepare.shard_rows, None if reference else config.finetune)
    lines += told(found, *rate, pool.at_start, config.estimate.price_per_device_hour)
    lines.append(f"cluster: {pool} to score")
    lines.append(f"output: {run}; reference: {reference.uri if reference else 'fine-tuned in this run'}")
    return lines


def verify_only(output: str, num_rows: int, seed: int) -> Verification:
    """Check the files of a finished run, and score random rows again one at a time."""
    run = _output(RunConfig(output=output))
    check_readable([(str(run), OutputError)])
    with storage_errors(run):
        require(run, "score")
        config = _remembered(run)
        base = _scored(run, "base", config.base or "", config.trust_remote_code)
        reference = _scored(run, "reference", config.reference or str(run / "reference"), config.trust_remote_code)
        with _connected(run, config):
            return verify(run, base, reference, num_rows, seed)


def _scored(run: Location, role: str, uri: str, trust_remote_code: bool) -> Checkpoint:
    """The model that the run was scored with: of the hub the commit, whatever its branch is by now."""
    commit = require(run, "score").fingerprint[role].get("commit")
    return Checkpoint.find(f"{uri.partition('@')[0]}@{commit}" if commit else uri, trust_remote_code)


def _remembered(run: Location) -> RunConfig:
    """The configuration of the run's last command."""
    try:
        return load((run / CONFIG_FILE).read_bytes().decode())
    except FileNotFoundError as error:
        raise OutputError(f"{run} has no {CONFIG_FILE}; run jobs/score.py with this --output again") from error


def _rank_and_report(run: Location, config: RunConfig) -> None:
    Progress("rank").write(run)
    rank(run, config.rank)
    Progress("select").write(run)
    select(run, config.rank, config.select)
    remember(run, dump(config))
    Progress("report").write(run)
    report(run, config, _tokenizer(run, config))


def _tokenizer(run: Location, config: RunConfig) -> Any:
    """The base's tokenizer, to spell tokens in the report; None if it cannot be loaded any more."""
    try:
        return _scored(run, "base", config.base or "", config.trust_remote_code).tokenizer()
    except ModelError as error:
        log.warning("the report shows no tokens: %s", error)
        return None


def _check(config: RunConfig) -> tuple[Location, Checkpoint, Preparation]:
    """What can be wrong with the settings is found here, before Ray starts or a weight is loaded."""
    run = _output(config)
    _check_access(run, config)
    base = Checkpoint.find(config.base or "", config.trust_remote_code)
    template = _read_template(config.chat_template)
    preparation = Preparation(base, config.prepare, template, config.keep_record, config.limit)
    check_base(preparation, config.all_sources())
    return run, base, preparation


def _check_access(run: Location, config: RunConfig) -> None:
    """Use the output and list the inputs, before anything that takes time."""
    paths = [path for source in config.all_sources() for path in source.paths]
    inputs: list[tuple[str, type[UserError]]] = [(path, DataError) for path in paths]
    inputs += [(model, ModelError) for model in (config.base, config.reference) if model]
    inputs += [(place, ConfigError) for place in (config.chat_template, config.score.base_cache) if place]
    probe_output(run)
    check_readable(inputs)


def _output(config: RunConfig) -> Location:
    output = config.output or ""
    if os.environ.get(SUBMITTED_JOB) and "://" not in output and not Path(output).is_absolute():
        raise ConfigError(
            f"output {output!r} is relative, and would be lost with the submitted job's folder; "
            "give s3://… or an absolute path"
        )
    with translated(output, OutputError):
        return Location.of(output if "://" in output else Path(output).expanduser().resolve())


def _read_template(file: str | None) -> str | None:
    if file is None:
        return None
    with translated(f"chat_template {file}", ConfigError):
        return Location.of(file).read_bytes().decode()


def _outside_reference(config: RunConfig, preparation: Preparation) -> Checkpoint | None:
    """The given reference, once it is known to belong to the base."""
    if config.reference is None:
        return None
    reference = Checkpoint.find(config.reference, config.trust_remote_code)
    check_reference(reference, preparation, config.all_sources())
    return reference


@contextmanager
def _writing(run: Location, config: RunConfig) -> Iterator[None]:
    """Connect to Ray and hold the output, alone, with what dead attempts left behind cleared away."""
    with _connected(run, config):
        check_claim(run)
        with Lease(run), _end_told(run), storage_errors(run):
            claim(run, dump(config))
            remove_leftovers(run)
            yield


@contextmanager
def _end_told(run: Location) -> Iterator[None]:
    """Leave in progress.json how the run ended; one that is interrupted, or loses its lease, leaves it as it is."""
    try:
        yield
    except OutputError:  # a refusal: the run that is there did not fail
        raise
    except Exception as error:
        with suppress(StorageError), storage_errors(run):
            Progress.end(run, "failed", " ".join(f"{error}".split()) or type(error).__name__)
        raise
    with storage_errors(run):
        Progress.end(run, "complete")


@contextmanager
def _connected(run: Location, config: RunConfig) -> Iterator[None]:
    """Connect to Ray; ConfigError if not every node sees the output."""
    with connected():
        if run.is_local and num_nodes() > 1 and not config.output_is_shared:
            raise ConfigError(
                f"output {run} is local, but the cluster has {num_nodes()} nodes; give s3://…, or --output_is_shared "
                "if every node sees this path"
            )
        yield


def _prepare(run: Location, config: RunConfig, preparation: Preparation) -> Manifest:
    sources = config.all_sources()
    manifest = prepare(run, sources, preparation, max_bad_fraction=config.max_bad_fraction, overwrite=config.overwrite)
    remember(run, dump(config))
    return manifest
