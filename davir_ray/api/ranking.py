"""rank: the exact ranking of the rows of a dataset."""

from collections.abc import Iterable
from typing import get_args

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from davir_ray.api.rows import Rows, check_choice, check_dataset, in_order, read_here, run_blocks
from davir_ray.config.selection import Order, RankConfig
from davir_ray.errors import ConfigError, DataError, IntegrityError
from davir_ray.formulas import order as ranking
from davir_ray.stages.rank import key_columns, order_keys

BIN_ROWS = 50_000
"""Number of rows, with all their columns, that one task sorts."""

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
        ranks = _ranks(read_here(scored, key_columns(config, _TIES)), config)
        by_rank = np.argsort(ranks)[np.count_nonzero(ranks == 0) :]
        return scored.add_column("rank", ranks, feature=datasets.Value("int64")).select(by_rank)
    return _rank_on_ray(scored, config)


def _rank_on_ray(dataset: ray.data.Dataset, config: RankConfig) -> ray.data.Dataset:
    """Compute the ranks in this process, from the columns that the order depends on; sort the rows in tasks."""
    if (schema := dataset.schema(fetch_if_missing=False)) is not None:
        _check_columns(schema.names, config)  # known before anything runs
    blocks = run_blocks(dataset)
    if not blocks:
        raise DataError("the dataset to rank has no row")
    with in_order():
        rows = ray.data.from_arrow_refs(blocks)
        _check_columns(rows.schema().names, config)
        ranks = _ranks(read_here(rows, key_columns(config, _TIES)), config)
        num_ranked = int(ranks.max())
        ranked = rows.zip(ray.data.from_arrow(pa.table({"rank": ranks})))
        ranked = ranked.map_batches(_ranked_rows, batch_size=None, batch_format="pyarrow")
        ranked = ranked.sort("rank", boundaries=list(range(BIN_ROWS + 1, num_ranked + 1, BIN_ROWS)))
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
                f"the dataset has no column {name!r}, which the order {config.order} needs; rank what score returns"
            )
    if "rank" in there:
        raise ConfigError("the dataset has a column 'rank' already; drop it to rank again")


def _ranks(table: pa.Table, config: RankConfig) -> npt.NDArray[np.int64]:
    """The rank of each row, 0 for one without a value. DataError if no row has one."""
    rankable, keys, ids = order_keys(table, config, _TIES)
    if not rankable.any():
        raise DataError(f"no row can be ranked by {config.order}; the column status says why")
    ranks = np.zeros(table.num_rows, np.int64)
    ranks[np.flatnonzero(rankable)[ranking.order(keys, ids)]] = np.arange(1, len(ids) + 1)
    return ranks


def _ranked_rows(block: pa.Table) -> pa.Table:
    return block.filter(pc.greater(block["rank"], 0)) if block.num_rows else block
