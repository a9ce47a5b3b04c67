"""score: the score columns, added to the rows of a dataset.

The reader, the scorer and the pool are those of the jobs; a block takes the place of a shard.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from davir_ray.api.rows import Rows, check_choice, check_dataset
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.sources import Format, Source
from davir_ray.data.formats import FORMATS, check_chat_template, check_columns, columns, names_read
from davir_ray.data.reader import ExampleRows
from davir_ray.data.records import LeftOut, Record, Reject, table_records
from davir_ray.engine.connect import ensure_started, own_errors
from davir_ray.engine.resources import actor_cpus, num_gpus_of, plan_pool
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.inputs import check_base, check_reference
from davir_ray.models.base_cache import BaseCache, base_cache
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.scorer import INPUT_COLUMNS, Scorer
from davir_ray.schema import EXAMPLES, SCORES
from davir_ray.stages.prepare import Preparation
from davir_ray.stages.score import scorer_settings
from davir_ray.text import decoded

log = logging.getLogger(__name__)

BLOCK_ROWS = 1024
"""Maximum number of rows that one call of an actor scores: the same for any pool, as the last bits of a score depend on
it."""

_EXAMPLES = pa.schema([EXAMPLES.field(name) for name in INPUT_COLUMNS])
_TOKEN_LOSSES = ["base_token_nll", "reference_token_nll"]
LEFT_OUT = "left_out"
"""Status of a row that the data's own marks leave out."""
_NOT_ADDED = ["example_id", "source"]
_ROW = "davir_ray_row"
"""Temporary column with a row's index in a `datasets.Dataset`: scores are computed in any order."""


def score(
    dataset: Rows,
    *,
    base: str | Checkpoint,
    reference: str | Checkpoint,
    format: Format = "prompt_response",
    prompt_column: str = "prompt",
    response_column: str = "response",
    messages_column: str = "messages",
    chat_template: str | None = None,
    max_tokens: int = 512,
    config: ScoreConfig | None = None,
    keep_token_nll: bool = False,
    trust_remote_code: bool = False,
) -> Rows:
    """Add score columns to every row, by one forward pass of each model over its response.

    Every row comes back once, with all its columns. `status` is "ok", or says why there is no score: a Status of the
    jobs, the reason for which they would reject the row, or left_out; then the scores are null. The columns:
    content_hash, num_prompt_tokens, num_response_tokens, truncated, base_nll, reference_nll and rho_sum (nats),
    rho_mean (nats a token), davir, status; with `keep_token_nll` also base_token_nll and reference_token_nll (nats of
    each token).

    The call checks settings, the models' configurations, tokenizers and column names; where Ray does not know the
    columns, it runs the preceding steps on the first rows. The workers load the weights when the dataset runs. Ray Data
    returns rows in any order unless its preserve_order is set.

    Args:
        dataset: Rows in one of the formats of the jobs.
        base: The pre-trained causal language model: a folder, s3://… or a hub name.
        reference: Its fine-tune, or a folder with a LoRA adapter. jobs/finetune.py makes one.
        format: How a row becomes prompt and response: a format of one response (docs/formats.md).
        prompt_column: Column of the prompt, for the format prompt_response.
        response_column: Column of the response, for the format prompt_response.
        messages_column: Column of the list of {role, content}, for the format messages.
        chat_template: Jinja text of a chat template, for the format messages. None: the base's own.
        max_tokens: Maximum number of tokens of prompt and response. A longer response is truncated; a prompt that fills
            it gives the row the status prompt_too_long.
        config: Actors, their CPUs and GPUs, precision, pack budget, base cache. None: as many actors as there is work
            for and the cluster has room for, one CPU left free. Its no_progress_timeout_s applies to a
            `datasets.Dataset`; Ray Data has execution_no_progress_timeout_s in its DataContext.
        keep_token_nll: Also add the loss of every scored token.
        trust_remote_code: Run Python code that comes with a hub checkpoint.

    Raises:
        ConfigError: A setting is invalid or not used by the format; a column is missing, or has the name of a score
            column.
        ModelError: A model cannot be used, or the two do not belong together.
        ClusterError: The requested actors do not fit the cluster.
    """
    check_dataset(dataset)
    check_choice("format", format, tuple(name for name, spec in FORMATS.items() if not spec.is_pairs))
    source = Source(
        name="dataset",
        path="dataset",
        format=format,
        prompt_column=prompt_column,
        response_column=response_column,
        messages_column=messages_column,
    )
    check_columns(source)
    if chat_template is not None:
        chat_template = decoded(chat_template.encode())  # as if read from a file
    prepare = PrepareConfig(max_tokens=max_tokens)
    check_chat_template(chat_template, [source], prepare)
    base, reference = (_checkpoint(model, trust_remote_code) for model in (base, reference))
    preparation = Preparation(base=base, config=prepare, chat_template=chat_template, keep_record=False)
    check_base(preparation, [source])
    check_reference(reference, preparation, [source])
    ensure_started()
    scoring = RowScoring(
        source=source,
        preparation=preparation,
        reference=reference,
        config=config or ScoreConfig(),
        keep_token_nll=keep_token_nll,
    )
    if isinstance(dataset, datasets.Dataset):
        scoring.check_columns(dataset.column_names)
        return _score_here(dataset, scoring)
    if (names := dataset.columns()) is not None:  # None: there is no row
        scoring.check_columns(names)
    return _score_on_ray(dataset, scoring)


def _checkpoint(model: str | Checkpoint, trust_remote_code: bool) -> Checkpoint:
    if not isinstance(model, Checkpoint):
        return Checkpoint.find(model, trust_remote_code)
    if trust_remote_code and not model.trust_remote_code:
        raise ConfigError(f"trust_remote_code is for models given by name; for {model.uri}, pass it to Checkpoint.find")
    return model


@dataclass(frozen=True, kw_only=True)
class RowScoring:
    """Everything that the scores of a dataset depend on."""

    source: Source
    """The format and its columns; its name and path are not used."""
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
        """ConfigError if the dataset has a score column already."""
        if twice := sorted(set(names) & set(self.added.names)):
            raise ConfigError(f"the dataset has a column {twice[0]!r} already; rename or drop it before scoring")


def _score_on_ray(dataset: ray.data.Dataset, scoring: RowScoring, num_blocks: int | None = None) -> ray.data.Dataset:
    """Add the score columns when the dataset is executed; ClusterError if the pool does not fit the cluster.

    A pool without a given size starts with one actor and grows with its work: other steps of the pipeline need room.
    """
    config = scoring.config
    planned = plan_pool(config)
    min_size = 1 if config.num_actors is None and config.autoscale is None else planned.min_size
    if num_blocks is None:
        pool = ray.data.ActorPoolStrategy(min_size=min_size, max_size=planned.max_size)
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


def _score_here(dataset: datasets.Dataset, scoring: RowScoring) -> datasets.Dataset:
    """Send only the format's columns to the workers, and add the score columns to the dataset."""
    names = [name for name in names_read(scoring.source) if name in dataset.column_names]
    chosen, starts = dataset.select_columns(names).with_format("arrow"), range(0, len(dataset), BLOCK_ROWS)
    places = [pa.array(range(start, min(start + BLOCK_ROWS, len(dataset))), pa.int64()) for start in starts]
    refs = [
        ray.put(chosen[start : start + BLOCK_ROWS].append_column(_ROW, rows))
        for start, rows in zip(starts, places, strict=True)
    ]
    scores = scoring.added.append(pa.field(_ROW, pa.int64())).empty_table()
    if refs:
        context = ray.data.DataContext.get_current().copy()
        context.execution_no_progress_timeout_s = scoring.config.no_progress_timeout_s
        with own_errors("ScoreConfig.no_progress_timeout_s"), ray.data.DataContext.current(context):
            scored = _score_on_ray(ray.data.from_arrow_refs(refs), scoring, len(refs))
            tables = ray.get(scored.select_columns(scores.column_names).to_arrow_refs())
            scores = pa.concat_tables(tables).sort_by(_ROW)
    if not np.array_equal(scores[_ROW], np.arange(len(dataset))):
        raise IntegrityError(f"{len(dataset)} rows were to be scored but {scores.num_rows} came back")
    added = datasets.Dataset(scores.drop_columns([_ROW]))
    return datasets.concatenate_datasets([dataset.with_format(None), added], axis=1)


def _reason(item: ExampleRows | Reject | LeftOut) -> str | None:
    """Why a row has no score; None if it is an example."""
    if isinstance(item, LeftOut):
        return LEFT_OUT
    return str(item.reason) if isinstance(item, Reject) else None


class ScoreRows:
    """Actor: adds score columns to blocks of rows."""

    def __init__(self, scoring: RowScoring, cache: BaseCache | None) -> None:
        self._scoring = scoring
        self._reader = scoring.preparation.reader([scoring.source])
        settings = scorer_settings(scoring.config, "all" if scoring.keep_token_nll else "none")
        self._scorer = Scorer(scoring.preparation.base, scoring.reference, settings, cache)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Add the score columns; a row that is not an example gets nulls, and the reason as its status."""
        self._scoring.check_new(block.column_names)
        items = list(self._reader.convert(self._scoring.source, self._records(block)))
        rejects = [item for item in items if isinstance(item, Reject)]
        scores = self._scores([row for item in items if not isinstance(item, Reject | LeftOut) for row in item])
        place = iter(range(scores.num_rows))
        reasons = pa.array([_reason(item) for item in items], pa.string())
        rows = scores.take(pa.array([None if reason else next(place) for reason in reasons.to_pylist()], pa.int64()))
        for name in self._scoring.added.names:
            column = pc.coalesce(rows[name], reasons) if name == "status" else rows[name]
            block = block.append_column(name, column)
        if rejects:
            counts = Counter(reject.reason for reject in rejects)
            log.warning(
                "%d of %d rows of a block cannot be scored (%s); the first: %s",
                len(rejects), len(items), ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())),
                rejects[0].detail[:200],
            )  # fmt: skip
        return block

    def _records(self, block: pa.Table) -> Iterator[Record | Reject]:
        names = [name for name in names_read(self._scoring.source) if name in block.column_names]
        if names:
            return table_records(block.select(names))
        return (Record("", row, {}) for row in range(block.num_rows))

    def _scores(self, examples: list[dict[str, Any]]) -> pa.Table:
        """Score examples. Equal ones may have the same id, so the hash of the content is used as it."""
        if not examples:
            return SCORES.empty_table()
        rows = [{**example, "example_id": example["content_hash"]} for example in examples]
        return self._scorer(pa.Table.from_pylist(rows, _EXAMPLES))
