"""Which rows of each file of ranked/ are selected."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.engine.shards import Shards
from davir_ray.formulas.shares import prefix_rows
from davir_ray.run.files import FileEntry
from davir_ray.stages.select.candidates import Candidates
from davir_ray.stages.select.limits import Limits


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
