"""A cut of ranked rows that are in no files, by the rules of stages/limits.py.

Rows may have been left out since they were ranked: a rule counts those that are there, in rank order.
"""

from collections.abc import Iterable
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from davir_ray.api.blocks import Blocks
from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.errors import ConfigError
from davir_ray.formulas.shares import Limit, prefix_rows
from davir_ray.stages.rank import value_column
from davir_ray.stages.select.limits import limits_by_file

STRETCH = 50_000
"""Ranks that are counted together; those of the one in which the cut lies come to the driver."""

_COUNTED = pa.schema([("stretch", pa.int64()), ("rows", pa.int64()), ("tokens", pa.int64())])
_RANKS = pa.schema([("rank", pa.int64()), ("tokens", pa.int64())])

Ints = npt.NDArray[np.int64]


def select_rows(dataset: ray.data.Dataset, rank_config: RankConfig, config: SelectConfig) -> ray.data.Dataset:
    """The rows that the rule means, in the order in which they come. ConfigError if there are too few, or none.

    The dataset runs once; what it gives is held in Ray's object store.
    """
    blocks = Blocks.of(dataset)
    if blocks.num_rows:
        check_selectable(blocks.dataset().schema().names, rank_config, config)
    if config.min_score is not None:
        selected = blocks.then(partial(_reaching, rank_config=rank_config, min_score=config.min_score))
    else:
        selected = blocks.then(partial(_up_to, last_rank=_last_rank(blocks, config)))
    if not selected.num_rows:
        raise selects_nothing()
    return selected.dataset()


def check_selectable(names: Iterable[str], rank_config: RankConfig, config: SelectConfig) -> None:
    """ConfigError if a column that the rule needs is absent."""
    needed = {"top_tokens": ["num_response_tokens"], "min_score": [value_column(rank_config)]}
    for name in ["rank", *needed.get(config.rules[0], [])]:
        if name not in set(names):
            raise ConfigError(f"the dataset has no column {name!r}; select from what rank returns")


def selects_nothing() -> ConfigError:
    """The rule leaves no row."""
    return ConfigError("select selects no row; loosen its rule")


def reaching(values: pa.ChunkedArray, rank_config: RankConfig, min_score: float) -> npt.NDArray[np.bool_]:
    """Rows whose value is at least this, at most where the lowest come first; those without a value are not."""
    numbers = values.to_numpy().astype(np.float64)
    return np.asarray(numbers <= min_score if rank_config.lowest else numbers >= min_score)


def tokens_of(table: pa.Table) -> Ints:
    """Scored tokens; they matter to one rule only."""
    if "num_response_tokens" not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    return np.asarray(table["num_response_tokens"]).astype(np.int64)


def prefix(ranks: Ints, tokens: Ints, limit: Limit) -> npt.NDArray[np.intp]:
    """Indices of the rows that a limit allows, in rank order; ConfigError if a rank stands twice."""
    by_rank = np.argsort(ranks, kind="stable")
    repeated = ranks[by_rank][1:][np.diff(ranks[by_rank]) == 0]
    if len(repeated):
        raise ConfigError(f"two rows have the rank {repeated[0]}; select before rows are repeated or joined")
    return by_rank[: prefix_rows(limit, tokens[by_rank])]


def _last_rank(blocks: Blocks, config: SelectConfig) -> int:
    """The rank at which the rule cuts."""
    length = STRETCH
    counted = blocks.collect(partial(_count_ranks, length=length), _COUNTED).group_by("stretch")
    stretches = counted.aggregate([("rows", "sum"), ("tokens", "sum")]).sort_by("stretch").to_pylist()
    rows = [
        {"group": "", "name": str(row["stretch"]), "rows": row["rows_sum"], "tokens": row["tokens_sum"]}
        for row in stretches
    ]
    limits = limits_by_file(rows, config)
    for row in rows:
        limit = limits[row["name"]][""]
        if (limit.rows is not None and limit.rows < row["rows"]) or (
            limit.tokens is not None and limit.tokens < row["tokens"]
        ):
            return _last_rank_within(blocks, int(row["name"]), length, limit)
    return (int(stretches[-1]["stretch"]) + 1) * length


def _last_rank_within(blocks: Blocks, stretch: int, length: int, limit: Limit) -> int:
    table = blocks.collect(partial(_ranks_within, stretch=stretch, length=length), _RANKS)
    ranks, tokens = np.asarray(table["rank"]), np.asarray(table["tokens"])
    chosen = prefix(ranks, tokens, limit)
    return int(ranks[chosen[-1]]) if len(chosen) else stretch * length


def _stretches(table: pa.Table, length: int) -> Ints:
    """Stretch of each row: ranks 1 to `length` are in the first, and so on."""
    return (np.asarray(table["rank"]).astype(np.int64) - 1) // length


def _count_ranks(table: pa.Table, length: int) -> pa.Table:
    numbers, place, rows = np.unique(_stretches(table, length), return_inverse=True, return_counts=True)
    tokens = np.zeros(len(numbers), np.int64)
    np.add.at(tokens, place, tokens_of(table))
    return pa.table({"stretch": numbers, "rows": rows, "tokens": tokens})


def _ranks_within(table: pa.Table, stretch: int, length: int) -> pa.Table:
    within = _stretches(table, length) == stretch
    return pa.table({"rank": np.asarray(table["rank"])[within], "tokens": tokens_of(table)[within]})


def _up_to(table: pa.Table, last_rank: int) -> pa.Table:
    return table.filter(pa.array(np.asarray(table["rank"]) <= last_rank))


def _reaching(table: pa.Table, rank_config: RankConfig, min_score: float) -> pa.Table:
    return table.filter(pa.array(reaching(table[value_column(rank_config)], rank_config, min_score)))
