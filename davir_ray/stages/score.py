"""score: examples + base + reference → scores/, one file for each shard, through a pool of Ray actors."""

import logging
import time
import uuid
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.pool import ShardWorker, Stream, num_gpus_of
from davir_ray.engine.progress import Tally
from davir_ray.errors import ConfigError
from davir_ray.models.base_cache import BaseCache
from davir_ray.models.checkpoint import Checkpoint, tokenizer_digest, weights_precision
from davir_ray.models.kernel.likelihood import NUMERICS_VERSION
from davir_ray.models.scorer import INPUT_COLUMNS, Scorer, ScorerSettings
from davir_ray.run.access import translated
from davir_ray.run.digests import digest
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.run.stages import completed, require
from davir_ray.schema import SCORES
from davir_ray.stages.identity import check_ids

log = logging.getLogger(__name__)

_SAMPLED_ROWS = 200


def score(
    run: Location,
    base: Checkpoint,
    reference: Checkpoint,
    config: ScoreConfig,
    *,
    keep_token_nll: str = "sample",
    examples_of: Location | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Score every example with both models; rows of scores/ stand in the order of examples/.

    `examples_of` is the run that holds the examples; None: this one.
    """
    stage = _Stage("score", "scores", run, examples_of or run)
    return _score(stage, base, reference, config, keep_token_nll, overwrite=overwrite)


def freeze(
    run: Location, base: Checkpoint, config: ScoreConfig, training: FinetuneConfig, *, overwrite: bool = False
) -> Manifest:
    """The losses of every example under the base alone, the frozen policy: frozen/ has the columns of scores/.

    In the arithmetic of the training, whatever that of the config, so that the policy begins where the frozen one is:
    bfloat16 moves the log-probability of a response by tenths of a nat.
    """
    stage, weights = _Stage("freeze", "frozen", run, run), replace(config, precision=weights_precision(training))
    return _score(stage, base, None, weights, "none", autocast=training.precision, overwrite=overwrite)


class _Stage(NamedTuple):
    name: str
    folder: str
    run: Location
    holder: Location
    """The run that holds the examples."""


def _score(
    stage: _Stage,
    base: Checkpoint,
    reference: Checkpoint | None,
    config: ScoreConfig,
    keep_token_nll: str,
    *,
    autocast: str = "float32",
    overwrite: bool,
) -> Manifest:
    started = time.monotonic()
    name, folder, run, holder = stage
    prepared = require(holder, "prepare")
    num_rows = prepared.counts["prepared"]
    settings = replace(_settings(config, keep_token_nll, num_rows), autocast=autocast)
    fingerprint = _fingerprint(base, reference, prepared, _what_matters(config, settings))
    if done := completed(run, name, fingerprint, overwrite=overwrite):
        return done
    stream = Stream(
        stage=name,
        run=run,
        folder=folder,
        schema=SCORES,
        fingerprint=fingerprint,
        examples=holder / "examples",
        columns=INPUT_COLUMNS,
    )
    scorer = {"base": base, "reference": reference, "settings": settings, "base_cache": base_cache(base, config)}
    shards, rejects = prepared.files_in("examples"), prepared.counts["rejected"]
    filled = stream.fill(shards, ScoreShard, scorer, config, rejects=rejects, overwrite=overwrite)
    check_ids(run / folder, [shard.entry for shard in filled.shards])
    details = {"shards_scored_by_this_driver": filled.num_new}
    manifest = stream.manifest(filled, num_rows, "scored", details)
    return replace(manifest, seconds=time.monotonic() - started).commit(run)


def _settings(config: ScoreConfig, keep_token_nll: str, num_rows: int) -> ScorerSettings:
    # Twice the wanted rows in expectation: a draw by hash may fall short of its mean, and at least 200 are promised.
    return scorer_settings(config, keep_token_nll, min(1.0, 2 * _SAMPLED_ROWS / num_rows))


def scorer_settings(config: ScoreConfig, keep_token_nll: str, sample_share: float = 0.0) -> ScorerSettings:
    """What one actor needs of the settings."""
    num_threads = max(1, int(config.num_cpus))
    return ScorerSettings(
        precision=config.precision,
        tokens_per_pack=config.tokens_per_pack,
        num_threads=num_threads,
        keep_token_nll=keep_token_nll,
        sample_share=sample_share,
    )


def _fingerprint(
    base: Checkpoint, reference: Checkpoint | None, prepared: Manifest, settings: dict[str, Any]
) -> dict[str, Any]:
    fingerprint: dict[str, Any] = {
        "base": base.weights_digest(),
        "reference": None if reference is None else reference.weights_digest(),
        "examples": prepared.content,
        "settings": settings,
        "numerics": NUMERICS_VERSION,
    }
    # Scores without this entry were computed without these modules, and must not pass for complete.
    if reference is not None and (modules := reference.modules_to_save()):
        fingerprint["modules_to_save"] = modules
    return fingerprint


def _what_matters(config: ScoreConfig, settings: ScorerSettings) -> dict[str, Any]:
    """Settings that scores depend on: not the pack budget, which an out-of-memory halving may change on the way."""
    kept = asdict(settings)
    del kept["tokens_per_pack"]
    on_gpus = bool(num_gpus_of(config))
    if on_gpus:
        del kept["num_threads"]
    return kept | {"device": "cuda" if on_gpus else "cpu"}


def base_cache(base: Checkpoint, config: ScoreConfig) -> BaseCache | None:
    """The cache of base losses that the settings name; ConfigError if it cannot be written."""
    if config.base_cache is None:
        return None
    folder = config.base_cache if "://" in config.base_cache else Path(config.base_cache).expanduser().resolve()
    identity = digest([base.weights_digest(), tokenizer_digest(base.tokenizer())])
    with translated(config.base_cache, ConfigError):
        cache = BaseCache(Location.of(folder), identity)
        # Told now rather than by a warning for each shard.
        probe = cache.folder / f"probe-{uuid.uuid4().hex}"
        probe.write_text("")
        probe.remove()
        return cache


class ScoreShard(ShardWorker):
    """Actor: a Scorer for blocks that are whole shards."""

    def __init__(self, tally: Tally, **scorer: Any) -> None:
        super().__init__("score", tally, INPUT_COLUMNS, partial(Scorer, **scorer))
