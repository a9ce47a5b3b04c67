"""davir_aligned: the scores of a run with folds, on one scale.

The scores of two folds are of two references, one of which may have learnt more. Where rows were dealt at random, the
folds are alike, so a row's place within its fold says how learnable it is: `davir_aligned` is the share of the fold's
scored rows below it, and half of the row itself. Of equal scores that of the smaller example_id is above.
"""

import time
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.selection import ALIGNED as ORDER
from davir_ray.config.selection import RankConfig
from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import Round, collect, scatter
from davir_ray.errors import IntegrityError
from davir_ray.formulas import order as ranking
from davir_ray.run.files import FileEntry, in_folder, total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import ALIGNED
from davir_ray.stages.folds import Folds
from davir_ray.stages.rank import BIN_ROWS, Bins, find_bins, key_columns, order_keys, read_scores

STAGE: str = ORDER
FOLDER = f"extra/{STAGE}"

_DAVIR = RankConfig(order="davir")

_ROW_BYTES = 32
"""Bytes of a row on the way: its key, id, shard and place."""


def align_scores(run: Run, folds: Folds) -> Manifest:
    """Write extra/davir_aligned/, whose rows are in the order of scores/; the anchor counts as a fold of its own.

    Of equal scores the row with the smaller example_id is the better one, as in the ranking. A row without a score has
    none here.
    """
    started, scored = time.monotonic(), run.require("score")
    fingerprint = {"scores": scored.content, "folds": folds.num_folds}
    if done := run.completed(STAGE, fingerprint):
        return done
    run.clear(STAGE)
    by_fold: dict[int, list[FileEntry]] = {}
    for entry in scored.files_in("scores"):
        by_fold.setdefault(folds.of_file[entry.name], []).append(entry)
    num_aligned, files = 0, list[FileEntry]()
    for _, shards in sorted(by_fold.items()):
        num_rows, written = align_shards(run, shards, run / FOLDER)
        num_aligned += num_rows
        files += written
    if total_rows(files) != scored.counts["examples"]:
        raise IntegrityError(f"{scored.counts['examples']} rows were scored but {total_rows(files)} aligned")
    manifest = Manifest(
        stage=STAGE,
        fingerprint=fingerprint,
        counts={"examples": scored.counts["examples"], "aligned": num_aligned},
        files=in_folder(FOLDER, sorted(files, key=lambda entry: entry.name)),
        seconds=time.monotonic() - started,
    )
    return run.commit(manifest)


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
