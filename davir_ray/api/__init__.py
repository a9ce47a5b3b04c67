"""DavIR in a pipeline of Ray Data: score, rank, select.

    import davir_ray, ray
    rows = ray.data.read_json("instructions.jsonl")                                   # prompt, response
    scored = davir_ray.score(rows, base="org/model", reference="org/model-finetuned")
    best = davir_ray.select(davir_ray.rank(scored), top_fraction=0.06)
    best.write_parquet("best")

A dataset of Ray Data gives one of Ray Data. A `datasets.Dataset` gives a `datasets.Dataset`, its features kept; it is
scored on Ray, and ranked and selected in this process.

`score` is lazy for Ray Data. `rank` runs the dataset, once: it needs the values several times, and keeps the rows with
all their columns in Ray's object store, which spills to disk. A million rows of instructions are a few GB; drop columns
that you do not need, and for a corpus use the jobs (jobs/score.py), which work through files and can be continued.

The scores are those of the jobs, by the same workers: nats, summed over the scored tokens, the end-of-sequence token
included. davir_ray/schema.py says what every column means.

Where Ray has not been started, `score` starts it as the jobs do: it connects to RAY_ADDRESS or the submitted job's
cluster, else starts one on this machine. Call `ray.init` before for another. Ray is never shut down here. The workers
must be able to import davir_ray: install it on the cluster's nodes, or give it in the runtime environment.
"""

from collections.abc import Iterable
from typing import Any, TypeVar, get_args

import datasets
import numpy as np
import pyarrow as pa
import ray.data

from davir_ray.api.ranking import TIES, check_rankable, no_value, rank_rows
from davir_ray.api.scoring import BLOCK_ROWS, RowScoring, score_rows
from davir_ray.api.selection import check_selectable, prefix, reaching, select_rows, selects_nothing, tokens_of
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.selection import Order, RankConfig, SelectConfig
from davir_ray.config.sources import Format, Source, check_chat_template
from davir_ray.data.formats import columns
from davir_ray.engine.connect import ensure_started, own_errors
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.formulas import order as ranking
from davir_ray.formulas.shares import Limit
from davir_ray.inputs import check_base, check_reference
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.stages.prepare import Preparation
from davir_ray.stages.rank import key_columns, order_keys, value_column
from davir_ray.stages.select.limits import limits_by_file
from davir_ray.text import decoded

__all__ = ["rank", "score", "select"]

Rows = TypeVar("Rows", ray.data.Dataset, datasets.Dataset)

_ROW = "davir_ray_row"
_RULES = ("top_k", "top_fraction", "top_tokens", "min_score")


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
    jobs, or the reason for which they would reject the row; then the scores are null. The columns: content_hash,
    num_prompt_tokens, num_response_tokens, truncated, base_nll, reference_nll and rho_sum (nats), rho_mean (nats a
    token), davir, status; with `keep_token_nll` also base_token_nll and reference_token_nll (nats of each token).

    Settings, models' configurations, tokenizers and column names are checked by the call: Ray runs what comes before on
    its first rows if it does not know the columns. Weights are loaded by the workers when the dataset runs. Rows of Ray
    Data stand in any order, as Ray Data has it; set its preserve_order to keep theirs.

    Args:
        dataset: Rows in one of the formats of the jobs.
        base: The pre-trained causal language model: a folder, s3://… or a hub name.
        reference: Its fine-tune, or a folder with a LoRA adapter. jobs/finetune.py makes one.
        format: How a row becomes prompt and response: alpaca, gsm8k, prompt_response or messages.
        prompt_column: Column of the prompt, for the format prompt_response.
        response_column: Column of the response, for the format prompt_response.
        messages_column: Column of the list of {role, content}, for the format messages.
        chat_template: Jinja text of a chat template, for the format messages. None: the base's own.
        max_tokens: Tokens of prompt and response; a longer response loses its tail, a prompt that fills them is a
            status.
        config: Actors, their CPUs and GPUs, precision, pack budget, base cache. None: as many actors as there is work
            for and the cluster holds, one CPU left free. Its no_progress_timeout_s is for a `datasets.Dataset`; Ray
            Data has execution_no_progress_timeout_s in its DataContext.
        keep_token_nll: Also give the loss of every scored token.
        trust_remote_code: Run Python code that comes with a hub checkpoint.

    Raises:
        ConfigError: A setting, also one that the format does not read; a column that is absent, or has the name of a
            score column.
        ModelError: A model cannot be used, or the two do not belong together.
        ClusterError: The cluster does not hold the actors that are asked for.
    """
    _check_type(dataset)
    _check_choice("format", format, tuple(name for name in get_args(Format) if name != "preference"))
    source = Source(
        name="dataset",
        path="dataset",
        format=format,
        prompt_column=prompt_column,
        response_column=response_column,
        messages_column=messages_column,
    )
    source.check_columns()
    if chat_template is not None:
        chat_template = decoded(chat_template.encode())  # as of a file
    check_chat_template(chat_template, [format])
    base, reference = (_checkpoint(model, trust_remote_code) for model in (base, reference))
    preparation = Preparation(
        base=base, config=PrepareConfig(max_tokens=max_tokens), chat_template=chat_template, keep_record=False
    )
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
    return score_rows(dataset, scoring)


def rank(scored: Rows, order: Order = "davir", *, lowest: bool = False, seed: int = 0) -> Rows:
    """Add `rank`, 1 for the best, to the rows that have a value, in rank order; the others are left out.

    An exact, total order: the value, ties by ascending content_hash, then (the same prompt and response) as the rows
    stand. Rows with null or NaN have no rank; -0.0 equals 0.0. For the orders length and random, rows whose status is
    ok have one.

    Args:
        scored: What `score` returned. A dataset of Ray Data runs now, once.
        order: The column to rank by (length: num_response_tokens), or random.
        lowest: The lowest value first.
        seed: Of the random order.

    Raises:
        ConfigError: A setting, a column that is absent, or a column `rank` that is there already.
        DataError: No row has a value.
    """
    _check_type(scored)
    _check_choice("order", order, get_args(Order))
    config = RankConfig(order=order, lowest=lowest, seed=seed)
    return _rank_here(scored, config) if isinstance(scored, datasets.Dataset) else rank_rows(scored, config)


def select(
    ranked: Rows,
    *,
    top_k: int | None = None,
    top_fraction: float | None = None,
    top_tokens: int | None = None,
    min_score: float | None = None,
    order: Order = "davir",
    lowest: bool = False,
) -> Rows:
    """Take the best rows by exactly one rule, with the jobs' meaning; they stay in rank order.

    Rows that you have left out since `rank`, by a filter of Ray Data, count for no rule.

    Args:
        ranked: What `rank` returned. A dataset of Ray Data runs now, unless it has.
        top_k: The first N rows.
        top_fraction: This share of the rows: floor of the exact decimal times the rows, at least 1.
        top_tokens: The longest prefix whose scored tokens fit.
        min_score: Every row whose value is at least this; with `lowest`, at most.
        order: The order that was ranked by; only min_score needs it.
        lowest: Whether the lowest value came first; only min_score needs it.

    Raises:
        ConfigError: No rule, more than one, a value out of range, fewer rows than top_k, or no row left.
    """
    _check_type(ranked)
    _check_choice("order", order, get_args(Order))
    config = SelectConfig(top_k=top_k, top_fraction=top_fraction, top_tokens=top_tokens, min_score=min_score)
    if not config.rules:
        raise ConfigError(f"no selection rule is given; give one of {', '.join(_RULES)}")
    if config.min_score is not None and order == "random":
        raise ConfigError("min_score has no meaning with the order random; choose top_k or top_fraction")
    rank_config = RankConfig(order=order, lowest=lowest)
    if isinstance(ranked, datasets.Dataset):
        return _select_here(ranked, rank_config, config)
    return select_rows(ranked, rank_config, config)


def _check_type(dataset: Any) -> None:
    if not isinstance(dataset, ray.data.Dataset | datasets.Dataset):
        kind = type(dataset)
        raise ConfigError(
            f"the dataset is a {kind.__module__}.{kind.__name__}; it must be a ray.data.Dataset or a datasets.Dataset "
            "(of a DatasetDict, one split)"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _checkpoint(model: str | Checkpoint, trust_remote_code: bool) -> Checkpoint:
    if not isinstance(model, Checkpoint):
        return Checkpoint.find(model, trust_remote_code)
    if trust_remote_code and not model.trust_remote_code:
        raise ConfigError(f"trust_remote_code is of models by name; give it to Checkpoint.find for {model.uri}, too")
    return model


# --- datasets.Dataset ------------------------------------------------------------------------------------------------


def _score_here(dataset: datasets.Dataset, scoring: RowScoring) -> datasets.Dataset:
    """Only the columns of the format go to the workers; the score columns are put beside the dataset's own."""
    names = [name for name in columns(scoring.source) if name in dataset.column_names]
    starts = range(0, len(dataset), BLOCK_ROWS)
    refs = [ray.put(_table(dataset, names, range(start, min(start + BLOCK_ROWS, len(dataset))))) for start in starts]
    scores = scoring.added.append(pa.field(_ROW, pa.int64())).empty_table()
    if refs:
        context = ray.data.DataContext.get_current().copy()
        context.execution_no_progress_timeout_s = scoring.config.no_progress_timeout_s
        with own_errors("ScoreConfig.no_progress_timeout_s"), ray.data.DataContext.current(context):
            scored = score_rows(ray.data.from_arrow_refs(refs), scoring, len(refs)).select_columns(scores.column_names)
            scores = pa.concat_tables(ray.get(scored.to_arrow_refs())).sort_by(_ROW)
    if not np.array_equal(scores[_ROW], np.arange(len(dataset))):
        raise IntegrityError(f"{len(dataset)} rows were to be scored but {scores.num_rows} came back")
    beside = datasets.Dataset(scores.drop_columns([_ROW]))
    return datasets.concatenate_datasets([dataset.with_format(None), beside], axis=1)


def _rank_here(dataset: datasets.Dataset, config: RankConfig) -> datasets.Dataset:
    check_rankable(dataset.column_names, config)
    table = _table(dataset, key_columns(config, TIES))
    rankable, keys, ids = order_keys(table, config, TIES)
    if not rankable.any():
        raise no_value(config)
    by_rank = np.flatnonzero(rankable)[ranking.order(keys, ids)]
    ranks = np.zeros(len(dataset), np.int64)
    ranks[by_rank] = np.arange(1, len(by_rank) + 1)
    return dataset.add_column("rank", ranks, feature=datasets.Value("int64")).select(by_rank)


def _select_here(dataset: datasets.Dataset, rank_config: RankConfig, config: SelectConfig) -> datasets.Dataset:
    check_selectable(dataset.column_names, rank_config, config)
    needed = {"rank", "num_response_tokens", value_column(rank_config)} & set(dataset.column_names)
    table = _table(dataset, sorted(needed))
    if config.min_score is not None:
        found = np.flatnonzero(reaching(table[value_column(rank_config)], rank_config, config.min_score))
        selected = found[np.argsort(np.asarray(table["rank"])[found])]
    else:
        tokens = tokens_of(table)
        counted = {"group": "", "name": "", "rows": table.num_rows, "tokens": int(tokens.sum())}
        limit: Limit = limits_by_file([counted] if table.num_rows else [], config)[""][""]
        selected = prefix(np.asarray(table["rank"]), tokens, limit)
    if not len(selected):
        raise selects_nothing()
    return dataset.select(selected)


def _table(dataset: datasets.Dataset, names: Iterable[str], rows: range | None = None) -> pa.Table:
    """Columns of a dataset; with a range of rows, those, and their number in a column of its own."""
    chosen = dataset.select_columns(list(names)).with_format("arrow")
    if rows is None:
        return chosen[:]
    return chosen[rows.start : rows.stop].append_column(_ROW, pa.array(rows, pa.int64()))
