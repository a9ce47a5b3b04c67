"""Which rows of a file of ranked/ are selected: filters, groups, and how much of each group the file may give."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.formulas.shares import Limit, prefix_rows
from davir_ray.run.folder import Run
from davir_ray.stages.rank import value_column
from davir_ray.stages.select.duplicates import read_duplicates

Limits = dict[str, Limit]
"""How much one file may give of each group."""


@dataclass(frozen=True)
class Choice:
    """What decides whether a row of a file of ranked/ is selected; the same wherever it is asked."""

    run: Run
    rank_config: RankConfig
    config: SelectConfig
    duplicates: frozenset[str]
    """Files that have any."""
    limits: dict[str, Limits]
    """By file; empty while the groups are still being counted."""

    def reasons(self, table: pa.Table, name: str) -> dict[str, npt.NDArray[np.bool_]]:
        """Rows that each filter leaves out; a row is counted by the first that does."""
        config, tokens = self.config, np.asarray(table["num_response_tokens"])
        left: dict[str, npt.NDArray[np.bool_]] = {}
        if config.drop_duplicates:
            known = read_duplicates(self.run, name) if name in self.duplicates else np.empty(0, np.int64)
            left["duplicates"] = np.isin(np.asarray(table["rank"]), known)
        if config.min_response_tokens is not None:
            left["too_short"] = tokens < config.min_response_tokens
        if config.max_response_tokens is not None:
            left["too_long"] = tokens > config.max_response_tokens
        if config.min_score is not None:
            values = table[value_column(self.rank_config)].to_numpy().astype(np.float64)
            left["beyond_min_score"] = ~(
                values <= config.min_score if self.rank_config.lowest else values >= config.min_score
            )
        return left

    def eligible(self, table: pa.Table, name: str) -> npt.NDArray[np.bool_]:
        """Rows that no filter leaves out."""
        left_out = np.zeros(table.num_rows, bool)
        for reason in self.reasons(table, name).values():
            left_out |= reason
        return ~left_out

    def groups(self, table: pa.Table) -> npt.NDArray[np.str_]:
        """Group of each row; one for all without balance, quotas or mixture."""
        if self.config.mixture:
            return np.asarray(table["source"].to_pylist(), dtype=np.str_)
        parts = [self._labels(table, dimension) for dimension in self.config.balance]
        if not parts:
            return np.full(table.num_rows, "", dtype=np.str_)
        return parts[0] if len(parts) == 1 else np.char.add(np.char.add(parts[0], "/"), parts[1])

    def selected(self, table: pa.Table, name: str) -> npt.NDArray[np.bool_]:
        """Which rows of the file are selected."""
        eligible, groups = self.eligible(table, name), self.groups(table)
        tokens = np.asarray(table["num_response_tokens"]).astype(np.int64)
        selected = np.zeros(table.num_rows, bool)
        for group, limit in self.limits[name].items():
            rows = np.flatnonzero(eligible & (groups == group))
            selected[rows[: prefix_rows(limit, tokens[rows])]] = True
        return selected

    def _labels(self, table: pa.Table, dimension: str) -> npt.NDArray[np.str_]:
        if dimension == "source":
            return np.asarray(table["source"].to_pylist(), dtype=np.str_)
        labels, tokens = np.array(self.config.length_ranges), np.asarray(table["num_response_tokens"])
        return labels[np.searchsorted(self.config.length_edges, tokens, side="right")]
