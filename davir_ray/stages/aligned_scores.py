"""davir_aligned: the scores of a run with folds, on one scale.

The scores of two folds are of two references, one of which may have learnt more. Where rows were dealt at random, the
folds are alike, so a row's place within its fold says how learnable it is: `davir_aligned` is the share of the fold's
scored rows that it is better than.
"""

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.selection import RankConfig
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import Round, collect, regroup
from davir_ray.errors import IntegrityError
from davir_ray.formulas import order as ranking
from davir_ray.run.files import FileEntry, in_folder, total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import ALIGNED
from davir_ray.stages.folds import Folds
from davir_ray.stages.rank import BIN_ROWS, Bins, count_bins, find_bins, key_columns, order_keys

STAGE = "davir_aligned"
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
        aligned = _Alignment.of(run, shards)
        num_aligned += aligned.num_rows
        files += aligned.write()
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


@dataclass(frozen=True, kw_only=True)
class _Alignment:
    """The places of one fold's rows: they are sorted in bins, as for a ranking, and go back to their shards."""

    scores: Location
    target: Location
    shards: list[FileEntry]
    bins: Bins
    rows_by_bin: npt.NDArray[np.int64]

    @classmethod
    def of(cls, run: Run, shards: list[FileEntry]) -> "_Alignment":
        keys = Shards(shards, partial(read_columns, run / "scores", key_columns(_DAVIR)))
        bins = find_bins(partial(collect, keys), total_rows(shards), _DAVIR, BIN_ROWS)
        rows_by_bin = count_bins(partial(collect, keys), bins)
        return cls(scores=run / "scores", target=run / FOLDER, shards=shards, bins=bins, rows_by_bin=rows_by_bin)

    @property
    def num_rows(self) -> int:
        """The rows of the fold that have a score."""
        return int(self.rows_by_bin.sum())

    def write(self) -> list[FileEntry]:
        """Write a file for each shard; returns their entries."""
        numbers = {shard.name: number for number, shard in enumerate(self.shards)}
        keys = Shards(self.shards, lambda name: self._keys(name, numbers[name]))
        kept = min(1.0, _ROW_BYTES * total_rows(self.shards) / max(1, keys.num_bytes))
        return regroup(
            keys,
            lambda table: table,
            Round("bin", len(self.bins) + 1, self._place),  # rows without a score are in a bin after the last
            Round("shard", len(self.shards), self._write_shard),
            kept=kept,
        )

    def _keys(self, name: str, number: int) -> pa.Table:
        """A shard's rows with their keys and bins."""
        table = read_columns(self.scores, key_columns(_DAVIR), name)
        rankable, keys, ids = order_keys(table, _DAVIR)
        key, bin_ = np.zeros(table.num_rows, np.uint64), np.full(table.num_rows, len(self.bins))
        key[rankable], bin_[rankable] = keys, self.bins.numbers(keys, ids)
        return pa.table(
            {
                "bin": bin_,
                "key": key,
                "example_id": table["example_id"],
                "shard": np.full(table.num_rows, number),
                "row": np.arange(table.num_rows),
            }
        )

    def _place(self, rows: pa.Table) -> pa.Table:
        """The rows of one bin with their scores on the common scale."""
        number = int(rows["bin"][0].as_py())
        aligned = pa.nulls(rows.num_rows, pa.float64())
        if number < len(self.bins):
            if rows.num_rows != self.rows_by_bin[number]:
                raise IntegrityError(f"a bin was counted at {self.rows_by_bin[number]} rows but has {rows.num_rows}")
            before = int(self.rows_by_bin[:number].sum())
            places = np.empty(rows.num_rows)
            places[ranking.order(np.asarray(rows["key"]), np.asarray(rows["example_id"]))] = np.arange(rows.num_rows)
            aligned = pa.array(1 - (before + places + 0.5) / self.num_rows)
        return rows.select(["shard", "row", "example_id"]).append_column(STAGE, aligned)

    def _write_shard(self, rows: pa.Table) -> FileEntry:
        """Write the file of one shard, its rows in the order of scores/."""
        name = self.shards[int(rows["shard"][0].as_py())].name
        table = rows.sort_by("row")
        return write_parquet(self.target / name, table.select(ALIGNED.names).cast(ALIGNED))
