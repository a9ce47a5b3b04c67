"""select: the first ranks, cut by exactly one rule, with their text → selected/."""

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from davir_ray.config import RankConfig, SelectConfig
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.schema import SELECTED
from davir_ray.stages.ranking import BinWriter, Cut, assign_bins, collect, cut_into_bins, exchange, value_column
from davir_ray.stages.resume import clear, completed, require
from davir_ray.stages.shards import Shards
from davir_ray.storage import FileEntry, Location, Manifest, digest, in_folder, read_parquet, total_rows

log = logging.getLogger(__name__)

_BIN_ROWS = 50_000
"""Rows with their text that one task sorts and writes; about 100 MB."""

_TEXT_COLUMNS = ["prompt", "response", "record", "source_file", "source_row"]


_FILE_SUMMARY = pa.schema(
    [("name", pa.string()), ("rows", pa.int64()), ("num_response_tokens", pa.int64()), ("rows_above", pa.int64())]
)


@dataclass(frozen=True)
class _RankedFile:
    """What a rule needs to know of one file of ranked/."""

    name: str
    rows: int
    num_response_tokens: int
    rows_above: int


def select(run: Location, rank_config: RankConfig, config: SelectConfig) -> Manifest:
    """Take the prefix of the ranking that the rule means, text included."""
    started = time.monotonic()
    ranked, scored = require(run, "rank"), require(run, "score")
    fingerprint = {"ranked": ranked.content, "rule": asdict(config)}
    if done := completed(run, "select", fingerprint):
        return done
    last_rank = count_selected(run, ranked, rank_config, config)
    shards = scored.files_in("scores")
    cut = cut_into_bins(run, rank_config, shards, _BIN_ROWS)
    last_bin = int(np.searchsorted(np.cumsum(cut.counts), last_rank))
    clear(run, "select")
    files = exchange(
        Shards(shards, partial(_read_with_text, run, cut, last_bin)),
        cut,
        BinWriter(run, "selected", cut, digest(fingerprint), SELECTED, last_rank=last_rank),
        last_bin=last_bin,
    )
    manifest = _manifest(run, files, last_rank, fingerprint, ranked, rank_config, time.monotonic() - started)
    manifest.write(run)
    log.info("select: %d of %d ranked rows", last_rank, ranked.counts["ranked"])
    return manifest


def check_count(config: SelectConfig, num_rows: int, what: str) -> None:
    """Raise ConfigError if more rows are to be selected than there are: known before any model is loaded."""
    if config.top_k is not None and config.top_k > num_rows:
        raise ConfigError(f"select.top_k is {config.top_k}, but only {num_rows} rows are {what}; ask for fewer")


def count_selected(run: Location, ranked: Manifest, rank_config: RankConfig, config: SelectConfig) -> int:
    """Rows that the rule selects; ConfigError if it asks for more than there are, or selects none."""
    num_ranked = ranked.counts["ranked"]
    check_count(config, num_ranked, "ranked")
    if config.top_k is not None:
        return config.top_k
    if config.top_fraction is not None:
        return config.count_from_fraction(num_ranked)
    files = _ranked_files(run, ranked, rank_config, config)
    if config.min_score is not None:
        count = sum(file.rows_above for file in files)
        rule = f"select.min_score {config.min_score:g}"
    else:
        count = _prefix_within_tokens(run, files, config.top_tokens or 0)
        rule = f"select.top_tokens {config.top_tokens}"
    if count == 0:
        raise ConfigError(f"{rule} selects no row of {num_ranked}; choose another value")
    return count


def _ranked_files(run: Location, ranked: Manifest, rank_config: RankConfig, config: SelectConfig) -> list[_RankedFile]:
    column = value_column(rank_config)
    read = partial(_read_ranked, run, columns=sorted({"num_response_tokens", column}))
    summarise = partial(_summarise_file, column=column, lowest=rank_config.lowest, min_score=config.min_score)
    rows = collect(Shards(ranked.files_in("ranked"), read), summarise, _FILE_SUMMARY).sort_by("name").to_pylist()
    return [_RankedFile(**row) for row in rows]


def _read_ranked(run: Location, name: str, columns: list[str]) -> pa.Table:
    table = read_parquet(run / "ranked" / name, columns)
    return table.append_column("name", pa.repeat(name, table.num_rows))


def _summarise_file(table: pa.Table, *, column: str, lowest: bool, min_score: float | None) -> pa.Table:
    values = table[column].to_numpy().astype(np.float64)
    above = 0 if min_score is None else int((values <= min_score if lowest else values >= min_score).sum())
    return pa.table(
        {
            "name": table["name"][:1],
            "rows": [table.num_rows],
            "num_response_tokens": [int(np.asarray(table["num_response_tokens"]).astype(np.int64).sum())],
            "rows_above": [above],
        }
    )


def _prefix_within_tokens(run: Location, files: list[_RankedFile], most: int) -> int:
    """Rows of the longest prefix whose scored tokens fit: whole files first, then rows of the file where it ends."""
    rows = tokens = 0
    for file in files:
        if tokens + file.num_response_tokens > most:
            table = _read_ranked(run, file.name, ["num_response_tokens"])
            cumulative = tokens + np.cumsum(np.asarray(table["num_response_tokens"]).astype(np.int64))
            return rows + int(np.searchsorted(cumulative, most, side="right"))
        rows, tokens = rows + file.rows, tokens + file.num_response_tokens
    return rows


def _read_with_text(run: Location, cut: Cut, last_bin: int, name: str) -> pa.Table:
    """A shard's scores in the needed bins, with their text; both folders hold the same rows in the same order."""
    scores = read_parquet(run / "scores" / name)
    text = read_parquet(run / "examples" / name, ["example_id", *_TEXT_COLUMNS])
    if not scores["example_id"].equals(text["example_id"]):
        raise IntegrityError(
            f"scores/{name} and examples/{name} do not hold the same rows; score again with --overwrite"
        )
    for column in _TEXT_COLUMNS:
        scores = scores.append_column(column, text[column])
    return assign_bins(scores, cut, last_bin).drop_columns("bin")


def _manifest(
    run: Location,
    files: list[FileEntry],
    last_rank: int,
    fingerprint: dict[str, Any],
    ranked: Manifest,
    rank_config: RankConfig,
    seconds: float,
) -> Manifest:
    if total_rows(files) != last_rank:
        raise IntegrityError(f"{last_rank} rows were to be selected but {total_rows(files)} were written")
    counts = {"ranked": ranked.counts["ranked"], "selected": last_rank}
    details = {"cut": _cut_value(run, files[-1], rank_config)}
    return Manifest("select", fingerprint, counts, in_folder("selected", files), details, seconds=seconds)


def _cut_value(run: Location, last: FileEntry, rank_config: RankConfig) -> float | None:
    """The ordering key of the last row taken: where the ranking was cut."""
    if rank_config.order == "random":
        return None
    table = read_parquet(run / "selected" / last.name, [value_column(rank_config)])
    return float(table.column(0)[-1].as_py())
