"""rank: the exact ranking of the rows of a dataset."""

from collections.abc import Iterable
from functools import partial
from typing import get_args

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from ray.data.block import BlockAccessor

from davir_ray.api.rows import Rows, check_choice, check_dataset, collect_blocks, in_order, read_here, run_blocks
from davir_ray.config.selection import Order, RankConfig
from davir_ray.errors import ConfigError, DataError, IntegrityError
from davir_ray.formulas import order as ranking
from davir_ray.stages.rank import Bins, count_bins, find_bins, key_columns, order_keys

BIN_ROWS = 50_000
"""Number of rows, with all their columns, that one task sorts."""

_BIN = "davir_ray_bin"

_TIES = "content_hash"
"""Column that breaks ties; the rows of a dataset have no example_id."""


def rank(scored: Rows, order: Order = "davir", *, lowest: bool = False, seed: int = 0) -> Rows:
    """Add `rank`, 1 for the best, to the rows that have a value, and sort by it; the other rows are left out.

    The order is exact and total: by value, then by ascending content_hash, then, for rows with the same prompt and
    response, by their place in the dataset. Rows whose value is null or NaN have no rank; -0.0 equals 0.0. In the
    orders length and random, rows whose status is ok have one.

    Args:
        scored: The result of `score`. A dataset of Ray Data is executed now, once.
        order: The column to rank by (length: num_response_tokens), or random.
        lowest: Whether the lowest value comes first.
        seed: Seed of the random order.

    Raises:
        ConfigError: A setting is invalid, a column is missing, or there is already a column `rank`.
        DataError: No row has a value.
    """
    check_dataset(scored)
    check_choice("order", order, get_args(Order))
    config = RankConfig(order=order, lowest=lowest, seed=seed)
    if isinstance(scored, datasets.Dataset):
        _check_columns(scored.column_names, config)
        rankable, keys, ids = order_keys(read_here(scored, key_columns(config, _TIES)), config, _TIES)
        if not rankable.any():
            raise _no_value(config)
        by_rank = np.flatnonzero(rankable)[ranking.order(keys, ids)]
        ranks = np.zeros(len(scored), np.int64)
        ranks[by_rank] = np.arange(1, len(by_rank) + 1)
        return scored.add_column("rank", ranks, feature=datasets.Value("int64")).select(by_rank)
    return _rank_on_ray(scored, config)


def _rank_on_ray(dataset: ray.data.Dataset, config: RankConfig) -> ray.data.Dataset:
    """Cut the order into bins, which tasks sort; this process holds a few numbers for each bin."""
    if (schema := dataset.schema(fetch_if_missing=False)) is not None:
        _check_columns(schema.names, config)  # known before anything runs
    blocks = run_blocks(dataset)
    if not blocks:
        raise DataError("the dataset to rank has no row")
    with in_order():
        rows = ray.data.from_arrow_refs(blocks)
        _check_columns(rows.schema().names, config)
        collected = partial(collect_blocks, rows, key_columns(config, _TIES))
        bins = find_bins(collected, rows.count(), config, BIN_ROWS, _TIES)
        rows_by_bin = count_bins(collected, bins)
        num_ranked = int(rows_by_bin.sum())
        if not num_ranked:
            raise _no_value(config)
        first_ranks = 1 + np.cumsum(rows_by_bin) - rows_by_bin
        ranked = (
            rows.map_batches(
                lambda block: bins.assign(block, _BIN) if block.num_rows else block,
                batch_size=None,
                batch_format="pyarrow",
            )
            .sort(_BIN, boundaries=list(range(1, max(2, len(bins)))))
            .map_batches(
                partial(_rank_bin, bins=bins, first_ranks=first_ranks), batch_size=None, batch_format="pyarrow"
            )
        )
        blocks = run_blocks(ranked)
    result = ray.data.from_arrow_refs(blocks)
    if result.count() != num_ranked:
        raise IntegrityError(f"{num_ranked} rows were to be ranked but {result.count()} are")
    return result


def _check_columns(names: Iterable[str], config: RankConfig) -> None:
    """ConfigError if a column that the order needs is missing, or there is already a column rank."""
    there = set(names)
    for name in key_columns(config, _TIES):
        if name not in there:
            raise ConfigError(
                f"the dataset has no column {name!r}, which the order {config.by} needs; rank what score returns"
            )
    if "rank" in there:
        raise ConfigError("the dataset has a column 'rank' already; drop it to rank again")


def _no_value(config: RankConfig) -> DataError:
    return DataError(f"no row can be ranked by {config.by}; the column status says why")


def _rank_bin(block: pa.Table, bins: Bins, first_ranks: npt.NDArray[np.int64]) -> pa.Table:
    """Sort a block that is a whole bin, and give its rows their ranks."""
    if not block.num_rows:
        return block
    first_rank = int(first_ranks[block[_BIN][0].as_py()])
    _, keys, ids = order_keys(block, bins.config, _TIES)
    # Ray's take, which also knows its own types of columns.
    rows = BlockAccessor.for_block(block.drop_columns([_BIN])).take(ranking.order(keys, ids))
    return rows.append_column("rank", pa.array(np.arange(first_rank, first_rank + block.num_rows), pa.int64()))
