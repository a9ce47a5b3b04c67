"""Which fold each file of a run's examples is in: what prepare has dealt, for training and scoring.

Reference `fold` is trained on `files_outside(prepared, fold)` and scores `files(prepared, fold)`; all score the anchor,
the first in scores/ and the others in extra/anchor/. Each file holds rows of one fold.
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
"""The fold of rows that no reference is trained on; all score them."""

ANCHORED_FOLDER = "extra/anchor"
"""Folder of a run with the scores of the anchor's rows by all references but the first, in a file for each reference
and file of the anchor."""

REFERENCES = "reference_folds"
"""Folder of a run with a reference for each fold, in a folder of the fold's number."""


@dataclass(frozen=True, kw_only=True)
class Folds:
    """The folds of a run's examples."""

    num_folds: int
    of_file: dict[str, int]
    """The fold of each file, by its name relative to examples/; ANCHOR for a file of no fold."""
    by: str | None = None
    """The column whose equal values share a fold (prepare.fold_by): the folds may then differ in what they have. None:
    the rows were dealt at random."""

    @classmethod
    def of(cls, prepared: Manifest) -> Self | None:
        """The folds of a prepared run; None without folds (prepare.folds 1)."""
        found = prepared.details.get(FOLDS)
        if found is None:
            return None
        by = prepared.fingerprint.get("folds", {}).get("by")
        return cls(num_folds=found["num_folds"], of_file=found["of_file"], by=by)

    @property
    def has_anchor(self) -> bool:
        """Whether some rows are in no fold (prepare.anchor)."""
        return ANCHOR in self.of_file.values()

    def files(self, prepared: Manifest, fold: int) -> list[FileEntry]:
        """The files of a fold, or, with ANCHOR, those of the anchor; names are relative to examples/."""
        return self._where(prepared, lambda found: found == fold)

    def files_outside(self, prepared: Manifest, fold: int) -> list[FileEntry]:
        """The files of all other folds, without the anchor: what reference `fold` is trained on."""
        return self._where(prepared, lambda found: found not in (fold, ANCHOR))

    def _where(self, prepared: Manifest, holds: Callable[[int], bool]) -> list[FileEntry]:
        return [entry for entry in prepared.files_in("examples") if holds(self.of_file[entry.name])]


def anchored_file(name: str, fold: int) -> str:
    """The name in extra/anchor/ of the scores of a file of the anchor by the reference of this fold."""
    return f"{name.removesuffix('.parquet')}-r{fold}.parquet"


def source_of_anchored(name: str) -> tuple[str, int]:
    """The file of the anchor and the fold that `anchored_file` was named by."""
    stem, _, fold = name.removesuffix(".parquet").rpartition("-r")
    return f"{stem}.parquet", int(fold)
