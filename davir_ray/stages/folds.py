"""Which fold each file of a run's examples is in: what prepare has dealt, for training and scoring.

Reference `fold` is trained on `files_outside(prepared, fold)` and scores `files(prepared, fold)`, and the first
scores the anchor. Each file holds rows of one fold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from davir_ray.run.files import FileEntry
from davir_ray.run.manifest import Manifest

FOLDS = "folds"
"""Key in the details of prepare's manifest: a dictionary of `num_folds`, `of_file` (see Folds), `rows` (the number of
rows by fold, as text; "-1" is the anchor) and the counts of the dealing (davir_ray.stages.deal)."""

ANCHOR = -1
"""The fold of rows that no reference is trained on; the first scores them."""

REFERENCES = "reference_folds"
"""Folder of a run with a reference for each fold, in a folder of the fold's number."""


@dataclass(frozen=True, kw_only=True)
class Folds:
    """The folds of a run's examples."""

    num_folds: int
    of_file: dict[str, int]
    """The fold of each file, by its name relative to examples/; ANCHOR for a file of no fold."""

    @classmethod
    def of(cls, prepared: Manifest) -> Self | None:
        """The folds of a prepared run; None without folds (prepare.folds 1)."""
        found = prepared.details.get(FOLDS)
        return None if found is None else cls(num_folds=found["num_folds"], of_file=found["of_file"])

    def files(self, prepared: Manifest, fold: int) -> list[FileEntry]:
        """The files of a fold, or, with ANCHOR, those of the anchor; names are relative to examples/."""
        return self._where(prepared, lambda found: found == fold)

    def files_outside(self, prepared: Manifest, fold: int) -> list[FileEntry]:
        """The files of all other folds, without the anchor: what reference `fold` is trained on."""
        return self._where(prepared, lambda found: found not in (fold, ANCHOR))

    def _where(self, prepared: Manifest, holds: Callable[[int], bool]) -> list[FileEntry]:
        return [entry for entry in prepared.files_in("examples") if holds(self.of_file[entry.name])]
