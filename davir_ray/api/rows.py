"""The two kinds of dataset that the API accepts: their checks, and how their rows are read and executed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import datasets
import pyarrow as pa
import ray.data

from davir_ray.engine.connect import own_errors, whole_block_context
from davir_ray.engine.shuffle import Change
from davir_ray.errors import ConfigError

Rows = TypeVar("Rows", ray.data.Dataset, datasets.Dataset)


def check_dataset(dataset: Any) -> None:
    """ConfigError unless this is one of the two kinds of dataset."""
    if not isinstance(dataset, ray.data.Dataset | datasets.Dataset):
        kind = type(dataset)
        raise ConfigError(
            f"the dataset is a {kind.__module__}.{kind.__name__}; it must be a ray.data.Dataset or a datasets.Dataset "
            "(of a DatasetDict, one split)"
        )


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """ConfigError if an argument is not one of its choices."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def read_here(dataset: datasets.Dataset, names: Iterable[str]) -> pa.Table:
    """Columns of all rows, as a table in this process."""
    table: pa.Table = dataset.select_columns(list(names)).with_format("arrow")[:]
    return table


def collect_blocks(
    rows: ray.data.Dataset,
    names: Iterable[str],
    summarise: Change,
    schema: pa.Schema,
    *,
    merge: Change | None = None,
    finish: Change | None = None,
) -> pa.Table:
    """Bring a small table, with this schema, of some columns of each block here; returns them merged and finished."""

    def summary(block: pa.Table) -> pa.Table:
        return summarise(block) if block.num_rows else schema.empty_table()

    summaries = rows.select_columns(list(names)).map_batches(summary, batch_size=None, batch_format="pyarrow")
    with own_errors():
        tables = ray.get(summaries.to_arrow_refs())
    # An empty block comes back without its columns (2.60).
    whole = pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables if table.num_rows)])
    for change in (merge, finish):
        whole = whole if change is None else change(whole)
    return whole


def run_blocks(dataset: ray.data.Dataset) -> list[ray.ObjectRef[pa.Table]]:
    """Execute a dataset, unless it has been materialised; returns its blocks in Ray's object store.

    Empty blocks are left out: they may lack their columns (Ray 2.60).
    """
    with own_errors():
        refs = dataset.to_arrow_refs()
    num_rows = ray.get([_num_rows.remote(ref) for ref in refs])
    return [ref for ref, rows in zip(refs, num_rows, strict=True) if rows]


@contextmanager
def in_order() -> Iterator[None]:
    """Keep the blocks of datasets that are made in this context in order, and never split a block."""
    context = whole_block_context()
    context.execution_options.preserve_order = True
    with ray.data.DataContext.current(context):
        yield


_num_rows: Any = ray.remote(lambda table: table.num_rows)
