"""select: the best rows of a ranked dataset, by the rules of the select stage.

Rows may have been filtered out since they were ranked: a rule counts the remaining rows, in rank order.
"""

from collections.abc import Iterable
from functools import partial
from typing import get_args

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from davir_ray.api.rows import Rows, check_choice, check_dataset, collect_blocks, in_order, read_here, run_blocks
from davir_ray.config.selection import Order, RankConfig, SelectConfig
from davir_ray.errors import ConfigError
from davir_ray.formulas.shares import prefix_rows
from davir_ray.stages.rank import Collect, value_column
from davir_ray.stages.select.candidates import Pool, reaches
from davir_ray.stages.select.limits import limits_by_file

STRETCH = 50_000
"""Ranks that are counted together."""

_COUNTED = pa.schema([("stretch", pa.int64()), ("rows", pa.int64()), ("tokens", pa.int64())])
_RANKS = pa.schema([("rank", pa.int64()), ("tokens", pa.int64())])


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
    """Take the best rows by exactly one rule, with the same meaning as in the jobs; they stay in rank order.

    A rule counts only the rows of this dataset, not those filtered out since `rank`.

    Args:
        ranked: The result of `rank`. A dataset of Ray Data is executed now, unless it has been materialised.
        top_k: Number of rows.
        top_fraction: This share of the rows: floor of the exact decimal times the rows, at least 1.
        top_tokens: The longest prefix whose scored tokens fit.
        min_score: Every row whose value is at least this; with `lowest`, at most.
        order: The order of the ranking; only min_score needs it.
        lowest: Whether the lowest value came first; only min_score needs it.

    Raises:
        ConfigError: No rule or several rules are given, a value is out of range, there are fewer rows than top_k, or
            no row is selected.
    """
    check_dataset(ranked)
    check_choice("order", order, get_args(Order))
    config = SelectConfig(top_k=top_k, top_fraction=top_fraction, top_tokens=top_tokens, min_score=min_score)
    if not config.rules:
        raise ConfigError("no selection rule is given; give one of top_k, top_fraction, top_tokens, min_score")
    if config.min_score is not None and order == "random":
        raise ConfigError("min_score has no meaning with the order random; choose top_k or top_fraction")
    rank_config = RankConfig(order=order, lowest=lowest)
    columns = ["rank"]
    if top_tokens is not None:
        columns.append("num_response_tokens")
    if min_score is not None:
        columns.append(value_column(rank_config))
    if isinstance(ranked, datasets.Dataset):
        _check_columns(ranked.column_names, columns)
        table = read_here(ranked, columns)
        if config.min_score is not None:
            taken = reaches(table, rank_config, config.min_score)
        else:
            taken = np.asarray(table["rank"]) <= _last_rank(lambda summarise, _: summarise(table), config)
        (selected,) = np.nonzero(taken)
        if not len(selected):
            raise _no_row()
        return ranked.select(selected[np.argsort(np.asarray(table["rank"])[selected])])
    return _select_on_ray(ranked, columns, rank_config, config)


def _select_on_ray(
    dataset: ray.data.Dataset, columns: list[str], rank_config: RankConfig, config: SelectConfig
) -> ray.data.Dataset:
    """Filter the rows in tasks; this process holds a few numbers for each stretch of ranks."""
    blocks = run_blocks(dataset)
    if not blocks:
        raise _no_row()
    with in_order():
        rows = ray.data.from_arrow_refs(blocks)
        _check_columns(rows.schema().names, columns)
        if config.min_score is not None:
            takes = partial(reaches, rank_config=rank_config, min_score=config.min_score)
        else:
            takes = partial(_up_to, last_rank=_last_rank(partial(collect_blocks, rows, columns), config))
        selected = rows.map_batches(
            lambda block: block.filter(pa.array(takes(block))), batch_size=None, batch_format="pyarrow"
        )
        blocks = run_blocks(selected)
    if not blocks:
        raise _no_row()
    return ray.data.from_arrow_refs(blocks)


def _check_columns(names: Iterable[str], needed: list[str]) -> None:
    for name in needed:
        if name not in set(names):
            raise ConfigError(f"the dataset has no column {name!r}; select from what rank returns")


def _last_rank(collected: Collect, config: SelectConfig) -> int:
    """The rank of the last row that the rule takes; 0 if it takes none. ConfigError if a rank stands twice there.

    Rows and tokens are counted by stretches of ranks; only the ranks of the stretch in which the rule cuts are read.
    """
    length = STRETCH
    counted = collected(partial(_count_stretches, length=length), _COUNTED).group_by("stretch")
    stretches = counted.aggregate([("rows", "sum"), ("tokens", "sum")]).sort_by("stretch").to_pylist()
    pools = [
        Pool(file=str(row["stretch"]), group="", rows=row["rows_sum"], tokens=row["tokens_sum"]) for row in stretches
    ]
    limits = limits_by_file(pools, config)
    for pool in pools:
        limit = limits[pool.file][""]
        rows_suffice = limit.rows is None or limit.rows >= pool.rows
        if rows_suffice and (limit.tokens is None or limit.tokens >= pool.tokens):
            continue  # the whole stretch is taken
        within = collected(partial(_ranks_within, stretch=int(pool.file), length=length), _RANKS).sort_by("rank")
        ranks, tokens = np.asarray(within["rank"]), np.asarray(within["tokens"])
        repeated = ranks[1:][np.diff(ranks) == 0]
        if len(repeated):
            raise ConfigError(f"two rows have the rank {repeated[0]}; select before rows are repeated or joined")
        num_rows = prefix_rows(limit, tokens)
        return int(ranks[num_rows - 1]) if num_rows else int(pool.file) * length
    return (int(pools[-1].file) + 1) * length


def _stretches(table: pa.Table, length: int) -> npt.NDArray[np.int64]:
    """The stretch of each row: ranks 1 to `length` are in the first, and so on."""
    return (np.asarray(table["rank"]).astype(np.int64) - 1) // length


def _tokens(table: pa.Table) -> npt.NDArray[np.int64]:
    """Scored tokens of each row; only the rule top_tokens needs them."""
    if "num_response_tokens" not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    return np.asarray(table["num_response_tokens"]).astype(np.int64)


def _count_stretches(table: pa.Table, length: int) -> pa.Table:
    rows = pa.table({"stretch": _stretches(table, length), "tokens": _tokens(table)}).group_by("stretch")
    return rows.aggregate([([], "count_all"), ("tokens", "sum")]).rename_columns(_COUNTED.names)


def _ranks_within(table: pa.Table, stretch: int, length: int) -> pa.Table:
    within = _stretches(table, length) == stretch
    return pa.table({"rank": np.asarray(table["rank"])[within], "tokens": _tokens(table)[within]})


def _up_to(table: pa.Table, last_rank: int) -> npt.NDArray[np.bool_]:
    return np.asarray(table["rank"]) <= last_rank


def _no_row() -> ConfigError:
    return ConfigError("select selects no row; loosen its rule")
