"""Which rows of ranked/ may be selected, how many of each group there are in each file, and which are selected."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import collect
from davir_ray.formulas.shares import prefix_rows
from davir_ray.run.files import FileEntry, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.stages.rank import key_columns, order_values
from davir_ray.stages.select.duplicates import read_duplicates
from davir_ray.stages.select.limits import GroupCount, Limits

_ELIGIBLE = "eligible"
_SKIPPED = "skipped"
_COUNTED = pa.schema({
    "file": pa.string(), "outcome": pa.string(), "group": pa.string(), "rows": pa.int64(), "tokens": pa.int64()
})  # fmt: skip

Filter = Callable[[pa.Table], npt.NDArray[np.bool_]]
"""Returns for each row whether it is left out."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The rows of ranked/ with their groups, and the filters that say which of them may be selected."""

    run: Run
    rank_config: RankConfig
    config: SelectConfig
    duplicates: frozenset[str]
    """Files of ranked/ that contain duplicates."""
    num_skipped: int = 0
    """Number of the first ranks that select.skip_top leaves out."""
    also: tuple[str, ...] = ()
    """Columns that are read besides those that a selection depends on."""

    def read(self, file: str) -> pa.Table:
        """The columns of a file of ranked/ that are needed, and its name in the column `file`."""
        columns = {"rank", "source", "num_response_tokens", *key_columns(self.rank_config), *self.also}
        table = read_parquet(self.run / "ranked" / file, sorted(columns))
        return table.append_column("file", pa.repeat(file, table.num_rows))

    @property
    def filters(self) -> dict[str, Filter]:
        """The filters that the configuration asks for, by the reason for leaving a row out."""
        filters: dict[str, Filter] = {}
        shortest, longest = self.config.min_response_tokens, self.config.max_response_tokens
        min_score, max_score, num_skipped = self.config.min_score, self.config.max_score, self.num_skipped
        lowest = self.rank_config.lowest
        if self.config.drop_duplicates:
            filters["duplicates"] = self._is_duplicate
        if shortest is not None:
            filters["too_short"] = lambda table: np.asarray(table["num_response_tokens"]) < shortest
        if longest is not None:
            filters["too_long"] = lambda table: np.asarray(table["num_response_tokens"]) > longest
        if min_score is not None:
            filters["beyond_min_score"] = lambda table: ~reaches(table, self.rank_config, min_score)
        if max_score is not None:
            beyond = replace(self.rank_config, lowest=not lowest)
            filters["beyond_max_score"] = lambda table: ~reaches(table, beyond, max_score)
        if num_skipped:
            filters[_SKIPPED] = lambda table: np.asarray(table["rank"]) <= num_skipped
        return filters

    def outcomes(self, table: pa.Table) -> npt.NDArray[np.object_]:
        """For each row of a file "eligible", or the reason of the first filter that leaves it out."""
        outcomes = np.full(table.num_rows, _ELIGIBLE, dtype=object)
        for reason, leaves_out in reversed(self.filters.items()):
            outcomes[leaves_out(table)] = reason
        return outcomes

    def eligible(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Whether each row of a file may be selected: no filter leaves it out."""
        return np.asarray(self.outcomes(table) == _ELIGIBLE)

    def groups(self, table: pa.Table) -> npt.NDArray[np.str_]:
        """The group of each row; without balance, quotas or mixture all rows are in one group."""
        parts = [self._labels(table, by) for by in (["source"] if self.config.mixture else self.config.balance)]
        if not parts:
            return np.full(table.num_rows, "", dtype=np.str_)
        return parts[0] if len(parts) == 1 else np.char.add(np.char.add(parts[0], "/"), parts[1])

    def count(self, files: list[FileEntry], *, tokens: bool = True) -> tuple[list[GroupCount], dict[str, int]]:
        """The rows that may be selected, in rank order, and how many rows each filter leaves out.

        Without the scored tokens, which are then 0, no file is read where ranks alone decide.
        """
        if not (tokens or self.config.balance or self.config.mixture or set(self.filters) - {_SKIPPED}):
            return self._count_ranks(files)
        counted = collect(Shards(files, self.read), partial(_count_file, candidates=self), _COUNTED)
        counts, left_out = [], dict.fromkeys(self.filters, 0)
        for row in counted.sort_by("file").to_pylist():
            outcome = row.pop("outcome")
            if outcome == _ELIGIBLE:
                counts.append(GroupCount(**row))
            else:
                left_out[outcome] += row["rows"]
        return counts, left_out

    def _count_ranks(self, files: list[FileEntry]) -> tuple[list[GroupCount], dict[str, int]]:
        counts, skipped = [], self.num_skipped
        for entry in files:
            rows = max(0, entry.rows - skipped)
            skipped -= entry.rows - rows
            if rows:
                counts.append(GroupCount(file=entry.name, group="", rows=rows, tokens=0))
        return counts, dict.fromkeys(self.filters, self.num_skipped)

    def _is_duplicate(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        file = table["file"][0].as_py()
        known = read_duplicates(self.run, file) if file in self.duplicates else np.empty(0, np.int64)
        return np.isin(np.asarray(table["rank"]), known)

    def _labels(self, table: pa.Table, by: str) -> npt.NDArray[np.str_]:
        if by == "source":
            return np.asarray(table["source"].to_pylist(), dtype=np.str_)
        labels, tokens = np.array(self.config.length_ranges), np.asarray(table["num_response_tokens"])
        return labels[np.searchsorted(self.config.length_edges, tokens, side="right")]


@dataclass(frozen=True)
class Choice:
    """The first eligible rows of each group in each file, up to the limits."""

    candidates: Candidates
    limits: dict[str, Limits]
    """Limits by file of ranked/; no row of another file is selected."""

    def selected(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Whether each row of a file, as the candidates read it, is selected."""
        eligible, groups = self.candidates.eligible(table), self.candidates.groups(table)
        tokens = np.asarray(table["num_response_tokens"]).astype(np.int64)
        selected = np.zeros(table.num_rows, bool)
        for group, limit in self.limits[table["file"][0].as_py()].items():
            rows = np.flatnonzero(eligible & (groups == group))
            selected[rows[: prefix_rows(limit, tokens[rows])]] = True
        return selected

    def shards(self, files: list[FileEntry]) -> Shards:
        """The selected rows of these files of ranked/; files without selected rows are not read."""
        return Shards([entry for entry in files if entry.name in self.limits], self.read)

    def read(self, file: str) -> pa.Table:
        """The selected rows of one file, as the candidates read it."""
        table = self.candidates.read(file)
        return table.filter(pa.array(self.selected(table)))


def num_skipped(config: SelectConfig, ranked: Manifest) -> int:
    """Number of the first ranks that select.skip_top leaves out: floor of the exact decimal times the ranked rows."""
    return int(Decimal(str(config.skip_top or 0)) * ranked.counts["rankable"])


def reaches(table: pa.Table, rank_config: RankConfig, min_score: float) -> npt.NDArray[np.bool_]:
    """Whether each row's value is at least `min_score`, or at most if the lowest come first; false without a value."""
    values = order_values(table, rank_config)
    return np.asarray(values <= min_score if rank_config.lowest else values >= min_score)


def _count_file(table: pa.Table, candidates: Candidates) -> pa.Table:
    rows = {
        "file": table["file"],
        "outcome": pa.array(candidates.outcomes(table), pa.string()),
        "group": candidates.groups(table),
        "tokens": table["num_response_tokens"],
    }
    counted = pa.table(rows).group_by(["file", "outcome", "group"]).aggregate([([], "count_all"), ("tokens", "sum")])
    return counted.rename_columns(_COUNTED.names)
