"""davir_aligned: the scores of a run with folds, on one scale.

The scores of two folds are of two references, one of which may have learnt more. Where rows were dealt at random, the
folds are alike, so a row's place within its fold says how learnable it is: `davir_aligned` is the share of the fold's
scored rows below it, and half of the row itself. Of equal scores that of the smaller example_id is above.

Folds by a column may differ in what they have, and equal shares of each would be quotas. With an anchor, their scores
are linked instead (stages/linked_scores.py).
"""

import time
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.selection import ALIGNED as ORDER
from davir_ray.config.selection import RankConfig
from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import Round, collect, scatter
from davir_ray.errors import IntegrityError, OutputError
from davir_ray.formulas import order as ranking
from davir_ray.run.files import FileEntry, in_folder, total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import ALIGNED
from davir_ray.stages.folds import ANCHORED_FOLDER, Folds
from davir_ray.stages.linked_scores import fit, write_linked
from davir_ray.stages.rank import BIN_ROWS, Bins, find_bins, key_columns, order_keys, read_scores

STAGE: str = ORDER
FOLDER = f"extra/{STAGE}"

WAY, LINKED, PLACE = "way", "linked", "place"
"""Key in the details of the manifest, and its two values."""

_DAVIR = RankConfig(order="davir")

_ROW_BYTES = 32
"""Bytes of a row on the way: its key, id, shard and place."""


def align_scores(run: Run, folds: Folds) -> Manifest:
    """Write extra/davir_aligned/, whose rows are in the order of scores/: linked with an anchor of folds by a column.

    Else it is the place within the fold, where the anchor counts as a fold of its own, and of equal scores the row with
    the smaller example_id is the better one, as in the ranking. A row without a score has none here.

    Raises OutputError if the anchor was not scored by all references, and DataError if it does not link the folds.
    """
    started, scored = time.monotonic(), run.require("score")
    fingerprint: dict[str, Any] = {"scores": scored.content, "folds": folds.num_folds}
    is_linked = folds.by is not None and folds.has_anchor
    if is_linked:
        anchored = run.manifest("anchor")
        fingerprint |= {WAY: LINKED, "anchor": None if anchored is None else anchored.content}
    if done := run.completed(STAGE, fingerprint):
        return done
    run.uncommit(STAGE)  # what is there, perhaps by places, is not what this run ranks by
    if is_linked:
        if anchored is None:
            raise OutputError(
                f"{run} has no complete {ANCHORED_FOLDER}, the anchor's scores by all references; give its command of "
                "jobs/score.py again, or rank by --rank.order davir"
            )
        lines, found = fit(run, folds)
        run.clear(STAGE)
        written = write_linked(run, scored, folds, lines, run / FOLDER)
        files, num_aligned = [one.entry for one in written], sum(one.facts["aligned"] for one in written)
        details = {WAY: LINKED, **found}
    else:
        run.clear(STAGE)
        num_aligned, files = _place(run, scored, folds)
        details = {WAY: PLACE}
    if total_rows(files) != scored.counts["examples"]:
        raise IntegrityError(f"{scored.counts['examples']} rows were scored but {total_rows(files)} aligned")
    manifest = Manifest(
        stage=STAGE,
        fingerprint=fingerprint,
        counts={"examples": scored.counts["examples"], "aligned": num_aligned},
        files=in_folder(FOLDER, sorted(files, key=lambda entry: entry.name)),
        details=details,
        seconds=time.monotonic() - started,
    )
    return run.commit(manifest)


def _place(run: Run, scored: Manifest, folds: Folds) -> tuple[int, list[FileEntry]]:
    """Write the places of all folds; returns the number of rows that have a score, and the entries."""
    by_fold: dict[int, list[FileEntry]] = {}
    for entry in scored.files_in("scores"):
        by_fold.setdefault(folds.of_file[entry.name], []).append(entry)
    num_aligned, files = 0, list[FileEntry]()
    for _, shards in sorted(by_fold.items()):
        num_rows, written = align_shards(run, shards, run / FOLDER)
        num_aligned += num_rows
        files += written
    return num_aligned, files


def align_shards(
    run: Run, shards: list[FileEntry], folder: Location, order: RankConfig = _DAVIR
) -> tuple[int, list[FileEntry]]:
    """Write the files of one fold's shards, or of all; returns the number of rows that have a score, and the entries.

    The rows are sorted in bins, as for a ranking, and go back to their shards.
    """
    keys = Shards(shards, partial(read_scores, run, order, key_columns(order)))
    bins = find_bins(partial(collect, keys), total_rows(shards), order, BIN_ROWS)
    numbers = {shard.name: number for number, shard in enumerate(shards)}
    placed = Shards(shards, lambda name: _with_bins(keys.read(name), bins, numbers[name]))
    kept = min(1.0, _ROW_BYTES * total_rows(shards) / max(1, keys.num_bytes))
    scattered = scatter(placed, lambda table: table, "bin", len(bins) + 1, kept=kept)
    rows_by_bin = scattered.rows_by_group()[:-1]  # without those that have no score
    names = [shard.name for shard in shards]
    back = Round("shard", len(shards), partial(_write_shard, folder, names))
    return int(rows_by_bin.sum()), scattered.make(partial(_placed, rows_by_bin), back)


def _with_bins(table: pa.Table, bins: Bins, number: int) -> pa.Table:
    """The rows of a shard with their keys, bins and places; those without a score are in a bin after the last."""
    rankable, keys, ids = order_keys(table, bins.config)
    key, bin_ = np.zeros(table.num_rows, np.uint64), np.full(table.num_rows, len(bins))
    key[rankable], bin_[rankable] = keys, bins.numbers(keys, ids)
    places = {"shard": np.full(table.num_rows, number), "row": np.arange(table.num_rows)}
    return pa.table({"bin": bin_, "key": key, "example_id": table["example_id"], **places})


def _placed(rows_by_bin: npt.NDArray[np.int64], rows: pa.Table) -> pa.Table:
    """The rows of one bin with their scores on the common scale."""
    number = int(rows["bin"][0].as_py())
    aligned = pa.nulls(rows.num_rows, pa.float64())
    if number < len(rows_by_bin):
        places = np.empty(rows.num_rows)
        places[ranking.order(np.asarray(rows["key"]), np.asarray(rows["example_id"]))] = np.arange(rows.num_rows)
        aligned = pa.array(1 - (rows_by_bin[:number].sum() + places + 0.5) / rows_by_bin.sum())
    return rows.select(["shard", "row", "example_id"]).append_column(STAGE, aligned)


def _write_shard(folder: Location, names: list[str], rows: pa.Table) -> FileEntry:
    """Write the file of one shard, its rows in the order of scores/."""
    name = names[int(rows["shard"][0].as_py())]
    return write_parquet(folder / name, rows.sort_by("row").select(ALIGNED.names).cast(ALIGNED))
