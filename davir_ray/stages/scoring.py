"""score: examples + base + reference → scores/, one file for each shard, through a pool of Ray actors.

The shard is the unit of work, commit and resume: a shard whose scores file is there is done.
"""

import json
import logging
import time
import uuid
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.data

from davir_ray.access import translated
from davir_ray.config import ScoreConfig
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.manifest import Manifest, differences
from davir_ray.models.base_cache import BaseCache
from davir_ray.models.checkpoint import Checkpoint, tokenizer_digest
from davir_ray.models.likelihood import NUMERICS_VERSION
from davir_ray.models.scorer import INPUT_COLUMNS, Scorer, ScorerSettings
from davir_ray.progress import Progress
from davir_ray.schema import SCORES
from davir_ray.stages.cluster import (
    configure_worker_logging,
    has_gpu,
    own_errors,
    pool_size,
    room_for,
    side_cpus,
    whole_block_context,
)
from davir_ray.stages.identity import check_ids
from davir_ray.stages.resume import clear, completed, other_attempt, require
from davir_ray.stages.shards import (
    NAMED,
    NUMERICS_KEY,
    ScoredShard,
    ScoreSink,
    Shards,
    count_statuses,
    num_tokens,
    read_named,
    sealed,
)
from davir_ray.stages.tally import Sums, Tally, tallied
from davir_ray.storage import (
    FINGERPRINT_KEY,
    FileEntry,
    Location,
    committed_parquet,
    digest,
    each,
    in_folder,
    total_rows,
)

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
    started = time.monotonic()
    holder = examples_of or run
    prepared = require(holder, "prepare")
    num_rows = prepared.counts["prepared"]
    settings = _settings(config, keep_token_nll, num_rows)
    fingerprint = _fingerprint(base, reference, prepared, _what_matters(config, settings))
    if done := completed(run, "score", fingerprint, overwrite=overwrite):
        return done
    committed = _committed(run, prepared, fingerprint, overwrite)
    pending = _pending(prepared, committed)
    log.info("score: %d shards to score, %d already scored", len(pending), len(committed))
    source = Shards(pending, partial(read_named, holder / "examples", INPUT_COLUMNS))
    scorer = {"base": base, "reference": reference, "settings": settings, "base_cache": base_cache(base, config)}
    with tallied(run, _before(prepared, committed)) as tally:
        scored = _run(run, source, scorer, config, json.dumps(fingerprint), tally) if pending else []
        sums = tally.sums()
    shards = sorted(committed + scored, key=lambda shard: shard.entry.name)
    check_ids(run, [shard.entry for shard in shards])
    manifest = _manifest(shards, fingerprint, num_rows, len(scored), time.monotonic() - started, sums)
    return manifest.commit(run)


def _before(prepared: Manifest, committed: list[ScoredShard]) -> Progress:
    """Where the stage begins: with what an earlier attempt committed."""
    rows = total_rows([shard.entry for shard in committed])
    unscored = rows - sum(shard.statuses.get("ok", 0) for shard in committed)
    counts = prepared.counts
    return Progress(
        "score", unit="rows", done=rows, total=counts["prepared"], rows=rows,
        rejects=counts["rejected"], unscored=unscored,
    )  # fmt: skip


def _settings(config: ScoreConfig, keep_token_nll: str, num_rows: int) -> ScorerSettings:
    # Twice the wanted rows in expectation: a draw by hash may fall short of its mean, and at least 200 are promised.
    return scorer_settings(config, keep_token_nll, min(1.0, 2 * _SAMPLED_ROWS / num_rows))


def scorer_settings(config: ScoreConfig, keep_token_nll: str, sample_share: float = 0.0) -> ScorerSettings:
    """What one actor needs of the settings."""
    num_threads = max(1, int(config.num_cpus))
    return ScorerSettings(config.precision, config.tokens_per_pack, num_threads, keep_token_nll, sample_share)


def _fingerprint(
    base: Checkpoint, reference: Checkpoint, prepared: Manifest, settings: dict[str, Any]
) -> dict[str, Any]:
    return {
        "base": base.weights_digest(),
        "reference": reference.weights_digest(),
        "examples": prepared.content,
        "settings": settings,
        "numerics": NUMERICS_VERSION,
    }


def _what_matters(config: ScoreConfig, settings: ScorerSettings) -> dict[str, Any]:
    """Settings that scores depend on: not the pack budget, which an out-of-memory halving may change on the way."""
    kept = asdict(settings)
    del kept["tokens_per_pack"]
    return kept | {"device": "cuda" if num_gpus_of(config) else "cpu"}


def _committed(run: Location, prepared: Manifest, fingerprint: dict[str, Any], overwrite: bool) -> list[ScoredShard]:
    """Shards that earlier attempts with the same settings have scored; a damaged one is scored again.

    OutputError names what differs if they were scored with other settings, unless they may be overwritten.
    """
    folder = run / "scores"
    rows = {entry.name: entry.rows for entry in prepared.files_in("examples")}
    found = each(lambda name: _describe(folder / name, rows.get(name)), folder.names(".parquet"))
    shards = [shard for shard in found if shard is not None]
    now = json.loads(json.dumps(fingerprint))
    changed = [line for shard in shards for line in differences(shard.fingerprint, now)]
    if not changed:
        return [shard.scored for shard in shards]
    if overwrite:
        clear(run, "score")
        return []
    raise other_attempt(run, "score", list(dict.fromkeys(changed)))


class _Committed(NamedTuple):
    """A scored shard, and the fingerprint it was scored under."""

    scored: ScoredShard
    fingerprint: dict[str, Any]


def _describe(place: Location, num_rows: int | None) -> _Committed | None:
    """What was committed there; None if it is damaged, or not the whole shard, and must be scored again."""
    try:
        entry, scores = committed_parquet(place)
        metadata = scores.schema.metadata or {}
        fingerprint = json.loads(metadata[FINGERPRINT_KEY])
        numerics = json.dumps(json.loads(metadata[NUMERICS_KEY]))
        whole = scores.schema.equals(SCORES) and num_rows in (None, scores.num_rows) and sealed(metadata) == metadata
    except (IntegrityError, KeyError, ValueError) as error:
        log.warning("%s is damaged (%s) and is scored again", place, " ".join(str(error).split()))
        return None
    if not whole:
        log.warning("%s is damaged (%d rows) and is scored again", place, scores.num_rows)
        return None
    return _Committed(ScoredShard(entry, count_statuses(scores), numerics), fingerprint)


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


def _pending(prepared: Manifest, committed: list[ScoredShard]) -> list[FileEntry]:
    """Shards of examples without scores, longest first, so that the pool does not end on one long shard."""
    done = {shard.entry.name for shard in committed}
    shards = [shard for shard in prepared.files_in("examples") if shard.name not in done]
    return sorted(shards, key=lambda shard: -shard.bytes)


def _run(
    run: Location,
    source: Shards,
    scorer: dict[str, Any],
    config: ScoreConfig,
    fingerprint: str,
    tally: Tally,
) -> list[ScoredShard]:
    """The stream: read a shard, score it in an actor, write its file. `scorer` holds the arguments of Scorer."""
    num_gpus = num_gpus_of(config)
    pool = plan_pool(config).at_most(source.num_tasks)
    log.info("score: %s of %g CPUs and %g GPUs", pool, config.num_cpus, num_gpus)
    sink = ScoreSink(run, fingerprint, tally.tell)
    with own_errors(), ray.data.DataContext.current(whole_block_context(config.no_progress_timeout_s)):
        (
            ray.data.read_datasource(source, **source.read_options | {"num_cpus": side_cpus(config.num_cpus) / 2})
            # map_batches refuses whole blocks on GPUs (2.60); otherwise they are the same.
            .map_batches_internal(
                ScoreShard,
                fn_constructor_kwargs=scorer | {"tally": tally},
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most, initial_size=pool.at_start),
                num_cpus=config.num_cpus,
                num_gpus=num_gpus,
            )
            .write_datasink(sink, ray_remote_args={"num_cpus": side_cpus(config.num_cpus)})
        )
    return sink.shards


class Pool(NamedTuple):
    """How many actors score."""

    least: int
    most: int
    at_start: int

    def at_most(self, num_shards: int) -> "Pool":
        """No more of them than there are shards."""
        return Pool(*(min(size, num_shards) for size in self))

    def __str__(self) -> str:
        return f"{self.at_start} actors" + (f" ({self.least} to {self.most})" if self.least < self.most else "")


def plan_pool(config: ScoreConfig) -> Pool:
    """The pool that the settings mean on this cluster; it begins at full size, loading models takes long.

    ClusterError if it does not fit; a pool that grows may wait for nodes that are not there yet.
    """
    num_gpus = num_gpus_of(config)
    if config.autoscale is None:
        size = pool_size(config.num_actors, config.num_cpus, num_gpus)
        return Pool(size, size, size)
    least, most = config.autoscale
    room = room_for(config.num_cpus, num_gpus)
    at_start = min(most, room) if room > 0 else least  # where there is none yet, waiting actors bring the nodes
    return Pool(min(least, at_start), most, at_start)


def num_gpus_of(config: ScoreConfig) -> float:
    """GPUs of one actor."""
    return (1.0 if has_gpu() else 0.0) if config.num_gpus is None else config.num_gpus


class ScoreShard:
    """Actor: a Scorer for blocks that are whole shards."""

    def __init__(self, tally: Tally, **scorer: Any) -> None:
        configure_worker_logging()
        self._tally = tally
        self._scorer = Scorer(**scorer)
        self._numerics = json.dumps(self._scorer.numerics)
        log.info("score: an actor is ready on node %s", ray.get_runtime_context().get_node_id()[:8])

    def __call__(self, block: pa.Table) -> pa.Table:
        """Columns of examples in, columns of scores out, the shard's name beside both."""
        started, shard = time.monotonic(), str(block["shard"][0])
        self._tally.begin(shard)
        scores = self._scorer(block.select(INPUT_COLUMNS))
        rate = num_tokens(block) / (time.monotonic() - started)
        log.debug("score: %s, %d rows, %.0f tokens/s", shard, block.num_rows, rate)
        for name in NAMED:
            scores = scores.append_column(name, block[name])
        return scores.append_column("numerics", pa.repeat(self._numerics, scores.num_rows))


def _manifest(
    shards: list[ScoredShard],
    fingerprint: dict[str, Any],
    num_rows: int,
    num_scored_now: int,
    seconds: float,
    sums: Sums | None,
) -> Manifest:
    statuses = Counter[str]()
    for shard in shards:
        statuses.update(shard.statuses)
    entries = [shard.entry for shard in shards]
    if total_rows(entries) != num_rows:
        raise IntegrityError(f"{num_rows} examples were prepared but {total_rows(entries)} rows of scores written")
    numerics = sorted({shard.numerics for shard in shards})
    counts = {"examples": num_rows, "scored": statuses["ok"], **dict(sorted(statuses.items()))}
    details = {"numerics": [json.loads(text) for text in numerics], "shards_scored_by_this_driver": num_scored_now}
    if sums is not None:
        details |= {"throughput": sums.throughput, "retries": sums.retries}
    return Manifest("score", fingerprint, counts, in_folder("scores", entries), details, seconds=seconds)
