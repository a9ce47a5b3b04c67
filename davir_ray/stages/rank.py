"""rank: scores/ → ranked/, an exact total order in files, rank 1 first.

There is no global sort. A sample of composite keys gives the boundaries of bins. One scan counts the rows of every bin
exactly and exchanges those of the bins that are needed, then each bin is sorted and written by one task that knows its
first rank. The ranks are the same for any number of ties, shards and workers, and the driver holds a few numbers per
bin.
"""

import logging
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray import __version__
from davir_ray.config.selection import ALIGNED, REPEATED, RankConfig
from davir_ray.engine.shards import Shards, read_columns, read_side_by_side
from davir_ray.engine.shuffle import Change, Scattered, collect, scatter
from davir_ray.errors import DataError, IntegrityError, OutputError
from davir_ray.formulas import hashing
from davir_ray.formulas import order as ranking
from davir_ray.run.files import FINGERPRINT_KEY, FileEntry, digest, in_folder, total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import EXTRA, RANKED

log = logging.getLogger(__name__)

BIN_ROWS = 200_000
"""Rows that one task sorts and writes; about 20 MB of scores."""

_SAMPLES_PER_BIN = 200
"""Keys drawn for each bin: the largest bin is then within a third of the mean, whatever the distribution."""

_DEVIATIONS = 5
"""Standard deviations by which the first bins may hold fewer rows than on average before they are sent again."""

_BY_TOKEN = {"base_mean_nll": "base_nll", "reference_mean_nll": "reference_nll"}
"""Orders by a loss per response token, and the column of the loss."""

_SAMPLED = pa.schema({"key": pa.uint64(), "example_id": pa.int64()})
_COUNTED = pa.schema({"bin": pa.int64(), "rows": pa.int64()})


class Collect(Protocol):
    """Makes a small table, with this schema, of each part of the rows; see engine.shuffle.collect."""

    def __call__(
        self, summarise: Change, schema: pa.Schema, /, *, merge: Change | None = None, finish: Change | None = None
    ) -> pa.Table:
        """Return the tables merged and finished."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Consecutive ranges of an order; each but the first begins at a boundary, which is a composite key."""

    config: RankConfig
    boundary_keys: hashing.Keys
    boundary_ids: hashing.Ids
    id_column: str = "example_id"
    """The column that breaks ties."""

    def __len__(self) -> int:
        return len(self.boundary_keys) + 1

    def numbers(self, keys: hashing.Keys, ids: hashing.Ids) -> npt.NDArray[np.int64]:
        """The bin of each composite key, from 0."""
        return ranking.bins(keys, ids, self.boundary_keys, self.boundary_ids)

    def assign(self, table: pa.Table, column: str = "bin") -> pa.Table:
        """The rankable rows, with their bin in an additional column."""
        rankable, keys, ids = order_keys(table, self.config, self.id_column)
        if not rankable.all():  # else the table need not be copied
            table = table.filter(pa.array(rankable))
        return table.append_column(column, pa.array(self.numbers(keys, ids), pa.int64()))


def rank(run: Run, config: RankConfig) -> Manifest:
    """Rank every row that has a value in the chosen order; the others stay in scores/ only."""
    started = time.monotonic()
    scored = run.require("score")
    fingerprint = {"scores": scored.content, **config.as_order()}
    if (extra := require_extra(run, config)) is not None:
        fingerprint["extra"] = extra.content
    if done := run.completed("rank", fingerprint):
        return done
    shards = scored.files_in("scores")
    keys = Shards(shards, partial(read_scores, run, config, key_columns(config)))
    bins = find_bins(partial(collect, keys), total_rows(shards), config, BIN_ROWS)
    scattered, rows_by_bin = _scatter(
        Shards(shards, partial(read_scores, run, config, None)), bins, config.most, scored.counts["scored"]
    )
    num_rankable = int(rows_by_bin.sum())
    if not num_rankable:
        statuses = scored.counts if extra is None else extra.counts
        raise DataError(f"no example can be ranked by {config.by}; statuses: {statuses}")
    last_rank = min(config.most or num_rankable, num_rankable)
    last_bin = int(np.searchsorted(np.cumsum(rows_by_bin), last_rank))
    num_examples = scored.counts["examples"]
    log.info("rank: %d of %d rows by %s, in %d of %d bins", last_rank, num_examples, config.by, last_bin + 1, len(bins))
    run.clear("rank")
    write = partial(
        write_bin,
        folder=run / "ranked",
        config=config,
        rows_by_bin=rows_by_bin,
        last_rank=last_rank,
        metadata=file_metadata(run, config, fingerprint),
    )
    written = scattered.make(lambda rows: write(int(rows["bin"][0].as_py()), rows))
    files = sorted((entry for entry in written if entry), key=lambda entry: entry.name)
    if total_rows(files) != last_rank:
        raise IntegrityError(f"{last_rank} rows were to be ranked but {total_rows(files)} were written")
    manifest = Manifest(
        stage="rank",
        fingerprint=fingerprint,
        counts={
            "examples": num_examples,
            "rankable": num_rankable,
            "unranked": num_examples - num_rankable,
            "ranked": last_rank,
        },
        files=in_folder("ranked", files),
        details={"rows_by_bin": rows_by_bin.tolist()},
        seconds=time.monotonic() - started,
    )
    return run.commit(manifest)


def require_extra(run: Run, config: RankConfig) -> Manifest | None:
    """The manifest of the extra score that the order is by; None if it needs none.

    Raises OutputError if the score was not computed.
    """
    if config.extra is None:
        return None
    if (manifest := run.manifest(config.extra)) is None:
        has_none = f"{run} has no complete extra/{config.extra}, which the order {config.by} is by"
        if config.by == ALIGNED:
            raise OutputError(f"{has_none}; only a run with folds has it (--prepare.folds)")
        if config.by == REPEATED:
            raise OutputError(f"{has_none}; give jobs/rank.py --rank.repeats")
        raise OutputError(
            f"{has_none}; give its command of jobs/score.py again and add --score.also '[{config.extra}]'"
        )
    return manifest


def read_scores(run: Run, config: RankConfig, columns: list[str] | None, name: str) -> pa.Table:
    """Columns of a shard's scores, and the extra score that the order is by; None: all columns."""
    if config.extra is None:
        return read_columns(run / "scores", columns, name)
    own = None if columns is None else [column for column in columns if column != config.by]
    return read_side_by_side(run / "scores", own, run / "extra" / config.extra, [config.by], name)


def with_order(schema: pa.Schema, config: RankConfig) -> pa.Schema:
    """The schema of ranked/ or selected/: the extra score that the order is by comes last."""
    return schema if config.extra is None else schema.append(EXTRA[config.extra].field(config.by))


def _scatter(scores: Shards, bins: Bins, most: int | None, num_ok: int) -> tuple[Scattered, npt.NDArray[np.int64]]:
    """Count the rows of each bin, and send those of the bins that hold the first `most` ranks; returns both.

    One scan does it: how many bins that takes is estimated for `num_ok` rankable rows, with a margin for the sample
    that the bins are cut by. Where it takes more, a second scan sends as many as the counts say.
    """
    num_needed = len(bins)
    if most is not None:
        bins_of_ranks = most * len(bins) / max(1, num_ok)
        slack = _DEVIATIONS * math.sqrt(bins_of_ranks / _SAMPLES_PER_BIN)
        num_needed = min(len(bins), math.ceil(bins_of_ranks + slack))
    while True:
        scattered = scatter(scores, bins.assign, "bin", len(bins), num_needed=num_needed, kept=num_needed / len(bins))
        rows_by_bin = scattered.rows_by_group()
        last_rank = min(rows_by_bin.sum(), most or rows_by_bin.sum())
        if rows_by_bin[:num_needed].sum() >= last_rank:
            return scattered, rows_by_bin
        num_needed = 1 + int(np.searchsorted(np.cumsum(rows_by_bin), last_rank))


def find_bins(
    collected: Collect, num_rows: int, config: RankConfig, bin_rows: int, id_column: str = "example_id"
) -> Bins:
    """Cut an order into bins of about so many rows, by a sample of the keys."""
    num_bins = -(-num_rows // bin_rows)
    keys, ids = np.empty(0, np.uint64), np.empty(0, np.int64)
    if num_bins > 1 and config.order == "random":  # its keys are spread evenly
        keys = np.arange(1, num_bins, dtype=np.uint64) * np.uint64(2**64 // num_bins)
        ids = np.zeros(num_bins - 1, np.int64)
    elif num_bins > 1:
        share = min(1.0, _SAMPLES_PER_BIN * num_bins / num_rows)

        def drawn_keys(table: pa.Table) -> pa.Table:
            _, keys, ids = order_keys(table, config, id_column)
            drawn = hashing.drawn(ids, share, "boundaries")
            return pa.table({"key": keys[drawn], "example_id": ids[drawn]})

        def boundaries(sample: pa.Table) -> pa.Table:
            keys, ids = ranking.boundaries(np.asarray(sample["key"]), np.asarray(sample["example_id"]), num_bins)
            return pa.table({"key": keys, "example_id": ids})

        found = collected(drawn_keys, _SAMPLED, finish=boundaries)
        keys, ids = np.asarray(found["key"]), np.asarray(found["example_id"])
    return Bins(config=config, boundary_keys=keys, boundary_ids=ids, id_column=id_column)


def count_bins(collected: Collect, bins: Bins) -> npt.NDArray[np.int64]:
    """The exact number of rankable rows of each bin."""

    def count(table: pa.Table) -> pa.Table:
        _, keys, ids = order_keys(table, bins.config, bins.id_column)
        numbers, rows = np.unique(bins.numbers(keys, ids), return_counts=True)
        return pa.table({"bin": numbers, "rows": rows})

    counted = collected(count, _COUNTED, merge=_summed)
    rows_by_bin = np.zeros(len(bins), np.int64)
    rows_by_bin[np.asarray(counted["bin"])] = np.asarray(counted["rows"])
    return rows_by_bin


def _summed(counted: pa.Table) -> pa.Table:
    return counted.group_by("bin").aggregate([("rows", "sum")]).rename_columns(_COUNTED.names)


def write_bin(
    number: int,
    rows: pa.Table,
    *,
    folder: Location,
    config: RankConfig,
    rows_by_bin: npt.NDArray[np.int64],
    last_rank: int,
    metadata: dict[bytes, bytes],
) -> FileEntry | None:
    """Sort one bin, give its rows their ranks, and write the file of those up to `last_rank`, if there are any."""
    if rows.num_rows != rows_by_bin[number]:
        raise IntegrityError(f"bin {number} was counted at {rows_by_bin[number]} rows but has {rows.num_rows}")
    first_rank = 1 + int(rows_by_bin[:number].sum())
    if first_rank > last_rank:
        return None
    _, keys, ids = order_keys(rows, config)
    by_rank = ranking.order(keys, ids)
    if (np.diff(ids[by_rank]) == 0).any():
        raise IntegrityError(f"two rows of bin {number} have the same example_id; rename a source to draw new ids")
    ranks = np.arange(first_rank, first_rank + rows.num_rows)
    table = rows.take(pa.array(by_rank)).append_column("rank", pa.array(ranks, pa.int64()))
    schema = with_order(RANKED, config)
    table = table.slice(0, last_rank - first_rank + 1).select(schema.names).cast(schema)
    return write_parquet(folder / f"part-{number:05d}.parquet", table, metadata)


def order_keys(
    table: pa.Table, config: RankConfig, id_column: str = "example_id"
) -> tuple[npt.NDArray[np.bool_], hashing.Keys, hashing.Ids]:
    """Whether each row is rankable (its value is neither null nor NaN), and the keys and ids of those that are."""
    ids = np.asarray(pc.fill_null(table[id_column], 0))  # an id is null only where the value is null, too
    values = order_values(table, config)
    rankable = ~np.isnan(values)
    if config.by in ("random", "length"):
        rankable = np.asarray(pc.equal(table["status"], "ok").fill_null(False))
    if config.by == "random":
        return rankable, hashing.random_keys(ids[rankable], config.seed, lowest=config.lowest), ids[rankable]
    return rankable, ranking.value_keys(values[rankable], lowest=config.lowest), ids[rankable]


def key_columns(config: RankConfig, id_column: str = "example_id") -> list[str]:
    """The columns that `order_keys` reads."""
    status = ["status"] if config.by in ("random", "length") else []
    return [id_column, *value_columns(config), *status]


def value_columns(config: RankConfig) -> list[str]:
    """The columns that `order_values` reads; for a random order, which has no value, the length is used."""
    if config.by in _BY_TOKEN:
        return [_BY_TOKEN[config.by], "num_response_tokens"]
    return ["num_response_tokens" if config.by in ("length", "random") else config.by]


def order_values(table: pa.Table, config: RankConfig) -> npt.NDArray[np.float64]:
    """The value of each row that the order is by; NaN where there is none."""
    values, *tokens = (table[name].to_numpy().astype(np.float64) for name in value_columns(config))
    if not tokens:
        return np.asarray(values)
    return np.asarray(np.divide(values, tokens[0], out=np.full_like(values, np.nan), where=tokens[0] > 0))


def file_metadata(run: Run, config: RankConfig, fingerprint: dict[str, Any]) -> dict[bytes, bytes]:
    """Parquet metadata that each file of ranked/ and selected/ carries."""
    return {
        FINGERPRINT_KEY: digest(fingerprint).encode(),
        b"davir_ray.run": str(run).encode(),
        b"davir_ray.order": config.by.encode(),
        b"davir_ray.version": __version__.encode(),
    }
