"""Scores beside rows that stay as they are, for who has a dataset of Ray Data instead of files.

The reader, the scorer and the pool are those of the jobs; a block takes the place of a shard.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.sources import Source
from davir_ray.data.formats import columns
from davir_ray.data.records import Record, Reject, table_records
from davir_ray.engine.connect import actor_cpus
from davir_ray.engine.pool import num_gpus_of, plan_pool
from davir_ray.errors import ConfigError
from davir_ray.models.base_cache import BaseCache
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.scorer import INPUT_COLUMNS, Scorer
from davir_ray.schema import EXAMPLES, SCORES
from davir_ray.stages.prepare import Preparation
from davir_ray.stages.score import base_cache, scorer_settings

log = logging.getLogger(__name__)

BLOCK_ROWS = 1024
"""Most rows that a call of an actor scores: the same for any pool, since the last bits of a score depend on it."""

_EXAMPLES = pa.schema([EXAMPLES.field(name) for name in INPUT_COLUMNS])
_TOKEN_LOSSES = ["base_token_nll", "reference_token_nll"]
_NOT_ADDED = ["example_id", "source"]


@dataclass(frozen=True, kw_only=True)
class RowScoring:
    """What the scores of rows depend on."""

    source: Source
    """The format and its columns; name and path mean nothing here."""
    preparation: Preparation
    reference: Checkpoint
    config: ScoreConfig
    keep_token_nll: bool

    @property
    def added(self) -> pa.Schema:
        """The score columns."""
        left_out = _NOT_ADDED if self.keep_token_nll else [*_NOT_ADDED, *_TOKEN_LOSSES]
        return pa.schema([field for field in SCORES if field.name not in left_out])

    def check_columns(self, names: Iterable[str]) -> None:
        """ConfigError if the format's columns are not among the names, or a score column is."""
        there = set(names)
        absent = [name for name, needed in columns(self.source).items() if needed and name not in there]
        if absent:
            raise ConfigError(
                f"the format {self.source.format} needs the column {absent[0]!r}; the dataset has "
                f"{', '.join(sorted(there))}; rename a column, or choose format, prompt_column, response_column or "
                "messages_column"
            )
        self.check_new(there)

    def check_new(self, names: Iterable[str]) -> None:
        """ConfigError if a score column would stand twice."""
        if twice := sorted(set(names) & set(self.added.names)):
            raise ConfigError(f"the dataset has a column {twice[0]!r} already; rename or drop it before scoring")


def score_rows(dataset: ray.data.Dataset, scoring: RowScoring, num_blocks: int | None = None) -> ray.data.Dataset:
    """The dataset's rows with score columns, once it runs; ClusterError if the pool does not fit the cluster.

    A pool that is not given a size grows with what there is to do: other steps of the pipeline need room, too.
    """
    config = scoring.config
    planned = plan_pool(config)
    least = 1 if config.num_actors is None and config.autoscale is None else planned.min_size
    if num_blocks is None:
        pool = ray.data.ActorPoolStrategy(min_size=least, max_size=planned.max_size)
    else:
        pool = ray.data.ActorPoolStrategy(size=max(1, min(planned.initial_size, num_blocks)))
    # Also keeps Ray from fusing what comes before into the actors, where it would not overlap with scoring (2.60).
    # map_batches refuses whole blocks on GPUs (2.60); otherwise it is the same as map_batches_internal.
    return dataset.repartition(target_num_rows_per_block=BLOCK_ROWS).map_batches_internal(
        ScoreRows,
        fn_constructor_kwargs={"scoring": scoring, "cache": base_cache(scoring.preparation.base, config)},
        batch_size=None,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=actor_cpus(config.num_cpus),
        num_gpus=num_gpus_of(config),
    )


class ScoreRows:
    """Actor: adds score columns to blocks of rows."""

    def __init__(self, scoring: RowScoring, cache: BaseCache | None) -> None:
        self._scoring = scoring
        self._reader = scoring.preparation.reader([scoring.source])
        settings = scorer_settings(scoring.config, "all" if scoring.keep_token_nll else "none")
        self._scorer = Scorer(scoring.preparation.base, scoring.reference, settings, cache)

    def __call__(self, block: pa.Table) -> pa.Table:
        """The block with score columns; a row that is no example has nulls, and the reason as its status."""
        self._scoring.check_new(block.column_names)
        items = list(self._reader.convert(self._scoring.source, self._records(block)))
        rejects = [item for item in items if isinstance(item, Reject)]
        scores = self._scores([row for item in items if not isinstance(item, Reject) for row in item])
        place = iter(range(scores.num_rows))
        rows = scores.take(pa.array([None if isinstance(item, Reject) else next(place) for item in items], pa.int64()))
        reasons = pa.array([str(item.reason) if isinstance(item, Reject) else None for item in items], pa.string())
        for name in self._scoring.added.names:
            column = pc.coalesce(rows[name], reasons) if name == "status" else rows[name]
            block = block.append_column(name, column)
        if rejects:
            _tell(rejects, len(items))
        return block

    def _records(self, block: pa.Table) -> Iterator[Record | Reject]:
        names = [name for name in columns(self._scoring.source) if name in block.column_names]
        if names:
            return table_records(block.select(names))
        return (Record("", row, {}) for row in range(block.num_rows))

    def _scores(self, examples: list[dict[str, Any]]) -> pa.Table:
        """Scores of examples; equal ones need no telling apart, so the hash of the content is their id."""
        if not examples:
            return SCORES.empty_table()
        rows = [{**example, "example_id": example["content_hash"]} for example in examples]
        return self._scorer(pa.Table.from_pylist(rows, _EXAMPLES))


def _tell(rejects: list[Reject], num_rows: int) -> None:
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(r.reason for r in rejects).items()))
    first = rejects[0].detail[:200]
    log.warning("%d of %d rows of a block cannot be scored (%s); the first: %s", len(rejects), num_rows, reasons, first)
