"""A dataset that has run, as its blocks in order: what needs several passes over rows that are in no files."""

from functools import partial
from typing import Any

import pyarrow as pa
import ray.data

from davir_ray.engine.connect import own_errors, whole_block_context
from davir_ray.engine.shuffle import Change


class Blocks:
    """Arrow tables in Ray's object store, none of them empty (an empty one may come without its columns, 2.60)."""

    def __init__(self, refs: list[Any]) -> None:
        num_rows = ray.get([_num_rows.remote(ref) for ref in refs])
        self._refs = [ref for ref, rows in zip(refs, num_rows, strict=True) if rows]
        self.num_rows = sum(num_rows)

    @classmethod
    def of(cls, dataset: ray.data.Dataset) -> "Blocks":
        """Run the dataset, unless it has been materialised."""
        with own_errors():
            return cls(dataset.to_arrow_refs())

    def collect(self, summarise: Change, schema: pa.Schema) -> pa.Table:
        """A small table from each block, with this schema, together in the driver."""
        tables = ray.get(self.then(summarise)._refs)
        return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables)])

    def then(self, change: Change) -> "Blocks":
        """Each block changed, in the same order."""
        with own_errors(), _in_order():
            return Blocks(_mapped(ray.data.from_arrow_refs(self._refs), change).to_arrow_refs())

    def exchange(self, assign: Change, column: str, num_groups: int, work: Change) -> "Blocks":
        """Bring rows together that have the same number in `column`, below `num_groups`: one block each, in order.

        `assign` adds the column, `work` changes a whole group. A sort by given boundaries, where the jobs use groupby,
        after which blocks stand in no order; the boundaries spare Ray's own sampling of them, which is uneven.
        """
        boundaries = list(range(1, max(2, num_groups)))
        with own_errors(), _in_order():
            assigned = _mapped(ray.data.from_arrow_refs(self._refs), assign)
            return Blocks(_mapped(assigned.sort(column, boundaries=boundaries), work).to_arrow_refs())

    def dataset(self) -> ray.data.Dataset:
        """The blocks as a dataset that has run."""
        return ray.data.from_arrow_refs(self._refs)


def _mapped(dataset: ray.data.Dataset, change: Change) -> ray.data.Dataset:
    return dataset.map_batches(partial(_changed, change=change), batch_size=None, batch_format="pyarrow")


def _changed(block: pa.Table, change: Change) -> pa.Table:
    return change(block) if block.num_rows else block


def _in_order() -> Any:
    """Blocks are neither split nor overtake each other."""
    context = whole_block_context()
    context.execution_options.preserve_order = True
    return ray.data.DataContext.current(context)


def _rows_of(table: pa.Table) -> int:
    return int(table.num_rows)


_num_rows: Any = ray.remote(_rows_of)
