"""select: the best rows of a ranked dataset, by the rules of the select stage.

Rows may have been filtered out since they were ranked: a rule counts the remaining rows, in rank order.
"""

from collections.abc import Callable, Iterable
from typing import get_args

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from davir_ray.api.rows import Rows, check_choice, check_dataset, in_order, read_here, run_blocks
from davir_ray.config.selection import Order, RankConfig, SelectConfig
from davir_ray.errors import ConfigError
from davir_ray.formulas.shares import prefix_rows
from davir_ray.stages.rank import value_column
from davir_ray.stages.select.candidates import Pool, reaches
from davir_ray.stages.select.limits import limits_by_file


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
        (selected,) = np.nonzero(_rule(ranked, columns, rank_config, config)(table))
        if not len(selected):
            raise _no_row()
        return ranked.select(selected[np.argsort(np.asarray(table["rank"])[selected])])
    return _select_on_ray(ranked, columns, rank_config, config)


def _select_on_ray(
    dataset: ray.data.Dataset, columns: list[str], rank_config: RankConfig, config: SelectConfig
) -> ray.data.Dataset:
    """Compute the cut in this process, from ranks and tokens; filter the rows in tasks."""
    blocks = run_blocks(dataset)
    if not blocks:
        raise _no_row()
    with in_order():
        rows = ray.data.from_arrow_refs(blocks)
        _check_columns(rows.schema().names, columns)
        takes = _rule(rows, columns, rank_config, config)
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
    dataset: Rows, columns: list[str], rank_config: RankConfig, config: SelectConfig
) -> Callable[[pa.Table], npt.NDArray[np.bool_]]:
    """A function that tests for each row of a table whether the rule selects it from this dataset."""
    if (min_score := config.min_score) is not None:
        return lambda table: reaches(table, rank_config, min_score)
    last_rank = _last_rank(read_here(dataset, columns), config)
    return lambda table: np.asarray(table["rank"]) <= last_rank


def _last_rank(table: pa.Table, config: SelectConfig) -> int:
    """The rank of the last row that the rule takes; 0 if it takes none. ConfigError if a rank occurs twice."""
    ranks = np.asarray(table["rank"])
    tokens = np.zeros(len(ranks), np.int64)
    if config.top_tokens is not None:
        tokens = np.asarray(table["num_response_tokens"]).astype(np.int64)
    by_rank = np.argsort(ranks)
    repeated = ranks[by_rank][1:][np.diff(ranks[by_rank]) == 0]
    if len(repeated):
        raise ConfigError(f"two rows have the rank {repeated[0]}; select before rows are repeated or joined")
    pool = Pool(file="", group="", rows=len(ranks), tokens=int(tokens.sum()))
    num_rows = prefix_rows(limits_by_file([pool], config)[""][""], tokens[by_rank])
    return int(ranks[by_rank][num_rows - 1]) if num_rows else 0


def _no_row() -> ConfigError:
    return ConfigError("select selects no row; loosen its rule")
