"""The plan of selected/: which rows each of its files holds, and how many there are of each group and source."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from davir_ray.config.selection import RankConfig
from davir_ray.data.task_report import TEXT_BYTES
from davir_ray.engine.shuffle import collect
from davir_ray.errors import ConfigError
from davir_ray.run.files import FileEntry
from davir_ray.run.folder import Run
from davir_ray.stages.rank import Bins, order_keys
from davir_ray.stages.select.candidates import Candidates, Choice

BIN_ROWS = 50_000
"""Maximum number of rows with their text that one task sorts and writes; about 100 MB."""

_BIN_BYTES = 128 * 2**20
"""Bytes of text that make fewer rows enough: the task holds them four times."""

_PIECES = pa.schema({
    "file": pa.string(), "start": pa.int64(), "group": pa.string(), "source": pa.string(),
    "rows": pa.int64(), "tokens": pa.int64(),
    "first_key": pa.uint64(), "first_id": pa.int64(), "last_key": pa.uint64(), "last_id": pa.int64(),
})  # fmt: skip
"""The selected rows of one range, group and source: their counts, and the first and last composite key."""

CompositeKey = tuple[int, int]
"""Ordering key and example_id: ascending, the best row first."""


class RowRange(NamedTuple):
    """Consecutive selected rows of one file of ranked/, which become one file of selected/."""

    file: str
    start: int
    """Index of its first row among the selected rows of the file."""
    rows: int
    first: CompositeKey


class Total(NamedTuple):
    """The selected rows of a group or a source."""

    rows: int
    tokens: int
    """Scored tokens."""
    last: CompositeKey


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The files of selected/ in rank order, and what is selected of each group and source."""

    ranges: list[RowRange]
    groups: dict[str, Total]
    sources: dict[str, Total]

    @classmethod
    def of(cls, choice: Choice, files: list[FileEntry]) -> Self:
        """Plan the files by one scan of the selected rows; raises ConfigError if there are none."""
        range_rows = rows_with_text(choice.candidates.run, BIN_ROWS)
        cut = partial(_cut_into_pieces, candidates=choice.candidates, range_rows=range_rows)
        pieces = collect(choice.shards(files), cut, _PIECES)
        if not pieces.num_rows:
            raise ConfigError(
                "select selects no row: the first in rank order has more scored tokens than the rule allows"
            )
        return cls(ranges=_ranges(pieces), groups=_totals(pieces, "group"), sources=_totals(pieces, "source"))

    @property
    def num_rows(self) -> int:
        """Rows that are selected."""
        return sum(each.rows for each in self.ranges)

    def bins(self, config: RankConfig) -> Bins:
        """The ranges as bins of the order: each begins at its first row."""
        keys, ids = zip(*(each.first for each in self.ranges), strict=True)
        return Bins(
            config=config, boundary_keys=np.array(keys[1:], np.uint64), boundary_ids=np.array(ids[1:], np.int64)
        )


def rows_with_text(run: Run, most: int) -> int:
    """At most so many rows of a run whose text fits a task; versions that did not count the text's bytes took most."""
    row_bytes = int(run.require("prepare").details.get(TEXT_BYTES, 0))
    return max(1, min(most, _BIN_BYTES // max(1, row_bytes)))


def _cut_into_pieces(table: pa.Table, candidates: Candidates, range_rows: int) -> pa.Table:
    """The selected rows of one file, counted by range, group and source; each piece with its first and last key."""
    _, keys, ids = order_keys(table, candidates.rank_config)
    rows = {
        "file": table["file"],
        "start": np.arange(table.num_rows) // range_rows * range_rows,
        "group": candidates.groups(table),
        "source": table["source"],
        "tokens": table["num_response_tokens"],
        "key": keys,
        "id": ids,
    }
    counted = [([], "count_all"), ("tokens", "sum")]
    ends = [("key", "first"), ("id", "first"), ("key", "last"), ("id", "last")]
    pieces = pa.table(rows).group_by(["file", "start", "group", "source"], use_threads=False)
    return pieces.aggregate(counted + ends).rename_columns(_PIECES.names)


def _ranges(pieces: pa.Table) -> list[RowRange]:
    ascending = pieces.sort_by([("first_key", "ascending"), ("first_id", "ascending")])
    grouped = ascending.group_by(["file", "start"], use_threads=False)
    found = grouped.aggregate([("rows", "sum"), ("first_key", "first"), ("first_id", "first")])
    return sorted(RowRange(file, start, rows, (key, id)) for file, start, rows, key, id in _rows(found))


def _totals(pieces: pa.Table, by: str) -> dict[str, Total]:
    ascending = pieces.sort_by([("last_key", "ascending"), ("last_id", "ascending")])
    grouped = ascending.group_by(by, use_threads=False)
    found = grouped.aggregate([("rows", "sum"), ("tokens", "sum"), ("last_key", "last"), ("last_id", "last")])
    return {name: Total(rows, tokens, (key, id)) for name, rows, tokens, key, id in _rows(found)}


def _rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    return zip(*(column.to_pylist() for column in table.columns), strict=True)
