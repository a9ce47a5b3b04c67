"""Ranks for rows that are in no files: the bins of stages/ranking.py over the blocks of a dataset."""

from collections.abc import Iterable
from functools import partial

import pyarrow as pa
import ray.data
from ray.data.block import BlockAccessor

from davir_ray.api.blocks import Blocks
from davir_ray.config.selection import RankConfig
from davir_ray.errors import ConfigError, DataError, IntegrityError
from davir_ray.stages.rank import Cut, assign_bins, cut_rows, key_columns, ranked_bin

TIES = "content_hash"
"""Column that breaks ties; the rows of a dataset have no example_id."""

BIN_ROWS = 50_000
"""Rows, with all their columns, that one task sorts."""

_BIN = "davir_ray_bin"


def rank_rows(dataset: ray.data.Dataset, config: RankConfig) -> ray.data.Dataset:
    """The rows that have a value, with their rank, best first. DataError if none has.

    The dataset runs once; what it gives is held in Ray's object store.
    """
    if (schema := dataset.schema(fetch_if_missing=False)) is not None:
        check_rankable(schema.names, config)  # known before anything runs
    blocks = Blocks.of(dataset)
    if not blocks.num_rows:
        raise DataError("the dataset to rank has no row")
    check_rankable(blocks.dataset().schema().names, config)
    cut = cut_rows(blocks.collect, blocks.num_rows, config, BIN_ROWS, TIES)
    num_rows, num_bins = int(cut.counts.sum()), len(cut.counts)
    if not num_rows:
        raise no_value(config)
    assign = partial(assign_bins, cut=cut, last_bin=num_bins - 1, column=_BIN)
    ranked = blocks.exchange(assign, _BIN, num_bins, partial(_rank_bin, cut=cut))
    if ranked.num_rows != num_rows:
        raise IntegrityError(f"{num_rows} rows were to be ranked but {ranked.num_rows} are")
    return ranked.dataset()


def check_rankable(names: Iterable[str], config: RankConfig) -> None:
    """ConfigError if a column that the order needs is absent, or there is a rank."""
    there = set(names)
    for name in key_columns(config, TIES):
        if name not in there:
            raise ConfigError(
                f"the dataset has no column {name!r}, which the order {config.order} needs; rank what score returns"
            )
    if "rank" in there:
        raise ConfigError("the dataset has a column 'rank' already; drop it to rank again")


def no_value(config: RankConfig) -> DataError:
    """No row can be ranked."""
    return DataError(f"no row can be ranked by {config.order}; the column status says why")


def _rank_bin(block: pa.Table, cut: Cut) -> pa.Table:
    by_rank, _, ranks = ranked_bin(block, cut, int(block[_BIN][0].as_py()))
    # Ray's take, which also knows its own types of columns.
    rows = BlockAccessor.for_block(block.drop_columns([_BIN])).take(by_rank)
    return rows.append_column("rank", pa.array(ranks, pa.int64()))
