"""select: the best rows of a ranked dataset, by the rules of the select stage.

Rows may have been filtered out since they were ranked: a rule counts the remaining rows, in rank order.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import get_args

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from davir_ray.api.rows import Rows, check_choice, check_dataset, collect_blocks, in_order, read_here, run_blocks
from davir_ray.config.selection import Order, RankConfig, SelectConfig
from davir_ray.engine.shuffle import Change
from davir_ray.errors import ConfigError
from davir_ray.formulas.shares import prefix_rows
from davir_ray.stages.rank import value_columns
from davir_ray.stages.select.candidates import reaches
from davir_ray.stages.select.limits import GroupCount, limits_by_file

BIN_RANKS = 50_000
"""Ranks that are counted together."""

_COUNTED = pa.schema([("bin", pa.int64()), ("rows", pa.int64()), ("tokens", pa.int64())])
_RANKS = pa.schema([("rank", pa.int64()), ("tokens", pa.int64())])

Collect = Callable[[Change, pa.Schema], pa.Table]
"""Makes a small table, with this schema, of each part of the rows; returns these tables as one."""


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
        columns += value_columns(rank_config)
    if not isinstance(ranked, datasets.Dataset):
        return _select_on_ray(ranked, columns, rank_config, config)
    _check_columns(ranked.column_names, columns)
    table = read_here(ranked, columns)
    taken = _rule(lambda summarise, _: summarise(table), rank_config, config)(table)
    (selected,) = np.nonzero(taken)
    if not len(selected):
        raise _no_row()
    return ranked.select(selected[np.argsort(np.asarray(table["rank"])[selected])])


def _select_on_ray(
    dataset: ray.data.Dataset, columns: list[str], rank_config: RankConfig, config: SelectConfig
) -> ray.data.Dataset:
    """Filter the rows in tasks; this process holds a few numbers for each bin of ranks."""
    blocks = run_blocks(dataset)
    if not blocks:
        raise _no_row()
    with in_order():
        rows = ray.data.from_arrow_refs(blocks)
        _check_columns(rows.schema().names, columns)
        takes = _rule(partial(collect_blocks, rows, columns), rank_config, config)
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


def _rule(
    collected: Collect, rank_config: RankConfig, config: SelectConfig
) -> Callable[[pa.Table], npt.NDArray[np.bool_]]:
    """The rule as a function that says for each row of a table whether it is selected."""
    if config.min_score is not None:
        return partial(reaches, rank_config=rank_config, min_score=config.min_score)
    last_rank = _last_rank(collected, config)
    return lambda table: np.asarray(table["rank"]) <= last_rank


def _last_rank(collected: Collect, config: SelectConfig) -> int:
    """The rank of the last row that the rule takes; 0 if it takes none. ConfigError if a rank stands twice there.

    Rows and tokens are counted by bins of ranks; only the ranks of the bin in which the rule cuts are read.
    """
    length = BIN_RANKS
    counted = collected(partial(_count_bins, length=length), _COUNTED).group_by("bin")
    bins = counted.aggregate([("rows", "sum"), ("tokens", "sum")]).sort_by("bin").to_pydict()
    counts = [GroupCount(str(number), "", rows, tokens) for number, rows, tokens in zip(*bins.values(), strict=True)]
    limits = limits_by_file(counts, config)
    for count in counts:
        if count.file not in limits:  # the rule cuts where the bin begins
            return int(count.file) * length
        limit = limits[count.file][""]
        if (limit.rows is None or limit.rows >= count.rows) and (limit.tokens is None or limit.tokens >= count.tokens):
            continue  # the whole bin is taken
        within = collected(partial(_ranks_in_bin, number=int(count.file), length=length), _RANKS).sort_by("rank")
        ranks = np.asarray(within["rank"])
        repeated = ranks[1:][np.diff(ranks) == 0]
        if len(repeated):
            raise ConfigError(f"two rows have the rank {repeated[0]}; select before rows are repeated or joined")
        num_rows = prefix_rows(limit, np.asarray(within["tokens"]))
        return int(ranks[num_rows - 1]) if num_rows else int(count.file) * length
    return (int(counts[-1].file) + 1) * length


def _binned(table: pa.Table, length: int) -> pa.Table:
    """The bin, rank and scored tokens of each row; ranks 1 to `length` are in bin 0. Only top_tokens needs tokens."""
    ranks = np.asarray(table["rank"]).astype(np.int64)
    names = table.column_names
    tokens = np.asarray(table["num_response_tokens"]) if "num_response_tokens" in names else np.zeros(len(ranks))
    return pa.table({"bin": (ranks - 1) // length, "rank": ranks, "tokens": tokens.astype(np.int64)})


def _count_bins(table: pa.Table, length: int) -> pa.Table:
    counted = _binned(table, length).group_by("bin").aggregate([([], "count_all"), ("tokens", "sum")])
    return counted.rename_columns(_COUNTED.names)


def _ranks_in_bin(table: pa.Table, number: int, length: int) -> pa.Table:
    return _binned(table, length).filter(pc.field("bin") == number).select(_RANKS.names)


def _no_row() -> ConfigError:
    return ConfigError("select selects no row; loosen its rule")
