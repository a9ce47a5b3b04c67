"""rank: scores/ → ranked/, an exact total order in files, rank 1 first.

No global sort: a sample of composite keys gives boundaries, one scan gives the exact count of each bin, then only bins
that are needed are exchanged, and each is sorted and written by one task that knows its first rank. Any number of ties,
shards and workers gives the same ranks, and the driver holds a few numbers for each bin.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray import __version__
from davir_ray.config.selection import RankConfig
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import collect, entry_row, exchange
from davir_ray.errors import DataError, IntegrityError
from davir_ray.formulas import hashing
from davir_ray.formulas import order as ranking
from davir_ray.run.files import (
    FINGERPRINT_KEY,
    FileEntry,
    digest,
    in_folder,
    write_parquet,
)
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import RANKED

log = logging.getLogger(__name__)

BIN_ROWS = 200_000
"""Rows that one task sorts and writes; about 20 MB of scores."""

_SAMPLES_PER_BIN = 200
"""Keys drawn for each bin: the largest bin is then within a third of the mean, whatever the distribution."""

_SAMPLED = pa.schema([pa.field("key", pa.uint64()), pa.field("example_id", pa.int64())])
_COUNTED = pa.schema([pa.field("bin", pa.int64()), pa.field("rows", pa.int64())])

Collect = Callable[[Callable[[pa.Table], pa.Table], pa.Schema], pa.Table]
"""Makes a small table, with a schema, of each part of the rows; returns them together."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Bins of the order: their boundaries and exact counts."""

    config: RankConfig
    boundary_keys: hashing.Keys
    boundary_ids: hashing.Ids
    counts: npt.NDArray[np.int64]
    id_column: str = "example_id"
    """Column that breaks ties."""

    def first_rank(self, number: int) -> int:
        """Rank of the first row of a bin."""
        return 1 + int(self.counts[:number].sum())


def rank(run: Run, config: RankConfig) -> Manifest:
    """Rank every row that has a value in the chosen order; the others stay in scores/ only."""
    started = time.monotonic()
    scored = run.require("score")
    fingerprint = {"scores": scored.content, **asdict(config)}
    if done := run.completed("rank", fingerprint):
        return done
    cut = cut_into_bins(run, config, scored.files_in("scores"))
    if not cut.counts.sum():
        raise DataError(f"no example can be ranked by {config.order}; statuses: {scored.counts}")
    last_rank = min(config.most or cut.counts.sum(), cut.counts.sum())
    last_bin = int(np.searchsorted(np.cumsum(cut.counts), last_rank))
    log.info(
        "rank: %d of %d rows by %s, in %d of %d bins",
        last_rank, scored.counts["examples"], config.order, last_bin + 1, len(cut.counts),
    )  # fmt: skip
    run.clear("rank")
    files = exchange(
        Shards(scored.files_in("scores"), partial(read_columns, run / "scores", None)),
        partial(assign_bins, cut=cut, last_bin=last_bin),
        last_bin + 1,
        BinWriter(run / "ranked", cut, last_rank, file_metadata(run, config, digest(fingerprint))).write,
    )
    manifest = _manifest(files, cut, last_rank, fingerprint, scored, time.monotonic() - started)
    return run.commit(manifest)


def order_keys(
    table: pa.Table, config: RankConfig, id_column: str = "example_id"
) -> tuple[npt.NDArray[np.bool_], hashing.Keys, hashing.Ids]:
    """Which rows are rankable, and the composite keys of those: rows without a value, or with NaN, have no rank."""
    ids = np.asarray(pc.fill_null(table[id_column], 0))  # null where the row has no value either
    values = table[value_column(config)].to_numpy().astype(np.float64)
    rankable = ~np.isnan(values)
    if config.order in ("random", "length"):
        rankable = np.asarray(pc.equal(table["status"], "ok").fill_null(False))
    if config.order == "random":
        return rankable, hashing.random_keys(ids[rankable], config.seed, lowest=config.lowest), ids[rankable]
    return rankable, ranking.value_keys(values[rankable], lowest=config.lowest), ids[rankable]


def key_columns(config: RankConfig, id_column: str = "example_id") -> list[str]:
    """What the order compares."""
    status = ["status"] if config.order in ("random", "length") else []
    return [id_column, value_column(config), *status]


def value_column(config: RankConfig) -> str:
    """The column that the order compares; a random order compares none, its rows are told by length."""
    return "num_response_tokens" if config.order in ("length", "random") else config.order


def cut_into_bins(run: Run, config: RankConfig, shards: list[FileEntry], bin_rows: int = BIN_ROWS) -> Cut:
    """The bins of scores/."""
    keys = Shards(shards, partial(read_columns, run / "scores", key_columns(config)))
    num_rows = sum(shard.rows for shard in shards)
    return cut_rows(partial(collect, keys), num_rows, config, bin_rows)


def cut_rows(
    collected: Collect, num_rows: int, config: RankConfig, bin_rows: int, id_column: str = "example_id"
) -> Cut:
    """Boundaries from a sample, then the exact count of each bin."""
    num_bins = -(-num_rows // bin_rows)
    boundary_keys, boundary_ids = np.empty(0, np.uint64), np.empty(0, np.int64)
    if num_bins > 1:
        share = min(1.0, _SAMPLES_PER_BIN * num_bins / num_rows)
        sample = collected(partial(_sample, config=config, id_column=id_column, share=share), _SAMPLED)
        sampled = np.asarray(sample["key"]), np.asarray(sample["example_id"])
        boundary_keys, boundary_ids = ranking.boundaries(*sampled, num_bins)
    counts = np.zeros(len(boundary_keys) + 1, np.int64)
    cut = Cut(config=config, boundary_keys=boundary_keys, boundary_ids=boundary_ids, counts=counts, id_column=id_column)
    counted = collected(partial(_count, cut=cut), _COUNTED)
    np.add.at(counts, np.asarray(counted["bin"]), np.asarray(counted["rows"]))
    return replace(cut, counts=counts)


class BinWriter:
    """Sorts one bin, gives its rows their ranks and writes its file; returns the file's entry as a row."""

    def __init__(self, folder: Location, cut: Cut, last_rank: int, metadata: dict[bytes, bytes]) -> None:
        self._folder = folder
        self._cut = cut
        self._last_rank = last_rank
        self._metadata = metadata

    def write(self, group: pa.Table) -> pa.Table:
        """Write one bin, given whole and in any order."""
        number = int(group["bin"][0].as_py())
        by_rank, ids, ranks = ranked_bin(group, self._cut, number)
        if (np.diff(ids[by_rank]) == 0).any():
            raise IntegrityError(f"two rows of bin {number} have the same example_id; rename a source to draw new ids")
        table = group.take(pa.array(by_rank)).append_column("rank", pa.array(ranks, pa.int64()))
        table = table.slice(0, self._last_rank - int(ranks[0]) + 1).select(RANKED.names).cast(RANKED)
        entry = write_parquet(self._folder / f"part-{number:05d}.parquet", table, self._metadata)
        return entry_row(entry)


def ranked_bin(
    group: pa.Table, cut: Cut, number: int
) -> tuple[npt.NDArray[np.intp], hashing.Ids, npt.NDArray[np.int64]]:
    """Row indices of a bin from best to worst, the ids by row, and the ranks; IntegrityError if it is not whole."""
    if group.num_rows != cut.counts[number]:
        raise IntegrityError(f"bin {number} was counted at {cut.counts[number]} rows and came with {group.num_rows}")
    _, keys, ids = order_keys(group, cut.config, cut.id_column)
    first = cut.first_rank(number)
    return ranking.order(keys, ids), ids, np.arange(first, first + group.num_rows)


def file_metadata(run: Run, config: RankConfig, mark: str) -> dict[bytes, bytes]:
    """What each file of ranked/ and selected/ says of itself."""
    return {
        FINGERPRINT_KEY: mark.encode(),
        b"davir_ray.run": str(run).encode(),
        b"davir_ray.order": config.order.encode(),
        b"davir_ray.version": __version__.encode(),
    }


def _sample(table: pa.Table, *, config: RankConfig, id_column: str, share: float) -> pa.Table:
    """Keys of a share of the rows, drawn by hash, so that every run draws the same."""
    _, keys, ids = order_keys(table, config, id_column)
    drawn = hashing.drawn(ids, share, "boundaries")
    return pa.table({"key": keys[drawn], "example_id": ids[drawn]})


def _count(table: pa.Table, *, cut: Cut) -> pa.Table:
    _, keys, ids = order_keys(table, cut.config, cut.id_column)
    numbers, rows = np.unique(ranking.bins(keys, ids, cut.boundary_keys, cut.boundary_ids), return_counts=True)
    return pa.table({"bin": pa.array(numbers, pa.int64()), "rows": pa.array(rows, pa.int64())})


def assign_bins(table: pa.Table, cut: Cut, last_bin: int, column: str = "bin") -> pa.Table:
    """Rankable rows of the needed bins, with their bin in `column`."""
    rankable, keys, ids = order_keys(table, cut.config, cut.id_column)
    numbers = ranking.bins(keys, ids, cut.boundary_keys, cut.boundary_ids)
    needed = rankable.copy()
    needed[rankable] = numbers <= last_bin
    if not needed.all():  # else the table need not be copied
        table = table.filter(pa.array(needed))
    return table.append_column(column, pa.array(numbers[numbers <= last_bin], pa.int64()))


def _manifest(
    files: list[FileEntry], cut: Cut, last_rank: int, fingerprint: dict[str, Any], scored: Manifest, seconds: float
) -> Manifest:
    ranked, rankable = sum(entry.rows for entry in files), int(cut.counts.sum())
    if ranked != last_rank:
        raise IntegrityError(f"{last_rank} rows were to be ranked but {ranked} were written")
    num_examples = scored.counts["examples"]
    counts = {"examples": num_examples, "rankable": rankable, "unranked": num_examples - rankable, "ranked": ranked}
    return Manifest(
        stage="rank",
        fingerprint=fingerprint,
        counts=counts,
        files=in_folder("ranked", files),
        details={"rows_by_bin": cut.counts.tolist()},
        seconds=seconds,
    )
