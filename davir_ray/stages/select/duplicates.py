"""Exact duplicates in a ranking: among rows with the same prompt and response, all but the highest-ranked."""

from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import Round, assign_part, exchange
from davir_ray.errors import IntegrityError
from davir_ray.run.files import FileEntry, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest

FOLDER = "duplicates"
"""Folder of the ranks of duplicates, with a file for each file of ranked/ that has any. The manifest of the selection
lists these files, so that a missing one is noticed."""

_ROWS_PER_PART = 2_000_000
"""Rows that one task compares; 32 MB."""


def find_duplicates(run: Run, files: list[FileEntry]) -> list[FileEntry]:
    """Write the ranks of duplicates; returns the files. Rows are grouped by hash, then ranks by file of ranked/."""
    num_parts = 1 + sum(entry.rows for entry in files) // _ROWS_PER_PART
    first_ranks = 1 + np.cumsum([0, *(entry.rows for entry in files)])[:-1]
    names = [entry.name for entry in files]
    return exchange(
        Shards(files, partial(read_columns, run / "ranked", ["content_hash", "rank"])),
        partial(assign_part, column="content_hash", num_parts=num_parts),
        len(files),
        partial(_write, folder=run / FOLDER, names=names),
        rounds_before=[Round("part", num_parts, partial(_later_copies, first_ranks=first_ranks))],
    )


def files_with_duplicates(run: Run, selected: Manifest) -> frozenset[str]:
    """Names of the files of ranked/ that have duplicates, by a complete selection.

    Older manifests count the duplicates without listing their files; raises IntegrityError if some of those are lost.
    """
    entries, counted = selected.files_in(FOLDER), selected.counts.get("duplicates", 0)
    if entries or not counted:
        return frozenset(entry.name for entry in entries)
    names = (run / FOLDER).names()
    found = sum(len(read_duplicates(run, name)) for name in names)
    if found != counted:
        raise IntegrityError(
            f"{run / FOLDER} holds {found} duplicates, but the selection counted {counted}; run jobs/rank.py again"
        )
    return frozenset(names)


def read_duplicates(run: Run, name: str) -> npt.NDArray[np.int64]:
    """The ranks of the duplicates in a file of ranked/ that has any."""
    return np.asarray(read_parquet(run / FOLDER / name)["rank"])


def _later_copies(group: pa.Table, first_ranks: npt.NDArray[np.int64]) -> pa.Table:
    """Ranks whose hash also occurs at a smaller rank, and the number of the file of ranked/ that each is in."""
    hashes, ranks = np.asarray(group["content_hash"]), np.asarray(group["rank"])
    order = np.lexsort((ranks, hashes))
    repeated = ranks[order][1:][hashes[order][1:] == hashes[order][:-1]]
    file = np.searchsorted(first_ranks, repeated, side="right") - 1
    return pa.table({"rank": pa.array(repeated, pa.int64()), "bin": pa.array(file, pa.int64())})


def _write(number: int, rows: pa.Table, folder: Location, names: list[str]) -> FileEntry:
    ranks = pa.array(np.sort(np.asarray(rows["rank"])), pa.int64())
    return write_parquet(folder / names[number], pa.table({"rank": ranks}))
