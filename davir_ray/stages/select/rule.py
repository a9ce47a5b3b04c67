"""select: ranked/ + text → selected/, by one rule, after filters, within groups where the rows are shared out.

The files of ranked/ stand in rank order, so what is taken of a group is a prefix of it. One scan counts each group in
each file, the driver says how much each file may give, a second scan finds the chosen rows, and only those are
exchanged with their text. Exact for any number of files and workers.
"""

import logging
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import collect, entry_row, exchange, table_of
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.formulas import hashing
from davir_ray.formulas import order as ranking
from davir_ray.run.files import (
    FileEntry,
    digest,
    in_folder,
    read_parquet,
    total_rows,
    write_parquet,
)
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import SELECTED
from davir_ray.stages.rank import file_metadata, key_columns, order_keys, value_column
from davir_ray.stages.select.choice import Choice
from davir_ray.stages.select.duplicates import FOLDER as DUPLICATES
from davir_ray.stages.select.duplicates import find_duplicates
from davir_ray.stages.select.limits import limits_by_file
from davir_ray.stages.select.mixture import write_jsonl, write_mixture

log = logging.getLogger(__name__)

BIN_ROWS = 50_000
"""Rows with their text that one task sorts and writes; about 100 MB."""

_TEXT_COLUMNS = ["prompt", "response", "record", "source_file", "source_row"]
_ELIGIBLE = "eligible"
_COUNTED = pa.schema(
    [("name", pa.string()), ("what", pa.string()), ("group", pa.string()), ("rows", pa.int64()), ("tokens", pa.int64())]
)
_CHOSEN = pa.schema(
    [
        ("name", pa.string()),
        ("what", pa.string()),
        ("of", pa.string()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("key", pa.uint64()),
        ("example_id", pa.int64()),
    ]
)


@dataclass
class Totals:
    """What is selected of a group or a source."""

    rows: int = 0
    tokens: int = 0
    """Scored tokens."""

    def add(self, row: dict[str, Any]) -> None:
        """Count what one file gives."""
        self.rows += row["rows"]
        self.tokens += row["tokens"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The selected rows, cut into the files of selected/, and what lies beyond them in each group."""

    choice: Choice
    groups: dict[str, Totals]
    sources: dict[str, Totals]
    files: list[str]
    """File of ranked/ that each file of selected/ is made of."""
    starts: list[int]
    """Where its rows begin among the selected rows of that file."""
    rows: list[int]
    boundary_keys: hashing.Keys
    boundary_ids: hashing.Ids
    last: dict[str, tuple[int, int]]
    """Composite key of the last selected row of each group."""


def select(run: Run, rank_config: RankConfig, config: SelectConfig) -> Manifest:
    """Take what the rule means of the rows that may be selected, text included, in rank order."""
    started = time.monotonic()
    ranked, scored = run.require("rank"), run.require("score")
    fingerprint = {"ranked": ranked.content, "rule": asdict(config)}
    if done := run.completed("select", fingerprint):
        return done
    check_count(config, ranked.counts["rankable"], "ranked")
    run.clear("select")
    mark = digest(fingerprint)
    duplicates = find_duplicates(run, ranked.files_in("ranked")) if config.drop_duplicates else []
    with_duplicates = frozenset(entry.name for entry in duplicates)
    choice, counted = choose(run, rank_config, config, ranked.files_in("ranked"), with_duplicates)
    plan = _plan(choice, ranked.files_in("ranked"))
    files = exchange(
        Shards(scored.files_in("scores"), partial(_read_with_text, plan)),
        partial(_assign_bins, plan=plan),
        len(plan.files),
        partial(_write_bin, plan=plan, metadata=file_metadata(run, rank_config, mark)),
    )
    written = {"selected": files, DUPLICATES: duplicates}
    if config.mixture:
        written["mixture"] = write_mixture(run, files, config, mark)
    if config.jsonl:
        source = "mixture" if config.mixture else "selected"
        written["jsonl"] = write_jsonl(run, source, written[source])
    manifest = _manifest(plan, written, counted, fingerprint, ranked, time.monotonic() - started)
    manifest = run.commit(manifest)
    log.info("select: %d of %d ranked rows", manifest.counts["selected"], ranked.counts["ranked"])
    return manifest


def choose(
    run: Run, rank_config: RankConfig, config: SelectConfig, files: list[FileEntry], duplicates: frozenset[str]
) -> tuple[Choice, list[dict[str, Any]]]:
    """What the rule takes of each file of ranked/, and the rows that were counted to know it.

    `duplicates` names the files that have any.
    """
    counted = _count(Choice(run, rank_config, config, duplicates, {}), files)
    eligible = [row for row in counted if row["what"] == _ELIGIBLE]
    return Choice(run, rank_config, config, duplicates, limits_by_file(eligible, config)), counted


def check_count(config: SelectConfig, num_rows: int, what: str) -> None:
    """Raise ConfigError if more rows are to be selected than there are: known before any model is loaded."""
    wanted = {"select.top_k": config.top_k or 0, "the sum of select.quotas": sum(config.quotas.values())}
    for name, rows in wanted.items():
        if rows > num_rows:
            raise ConfigError(f"{name} is {rows}, but only {num_rows} rows are {what}; ask for fewer")


def read_ranked(folder: Location, rank_config: RankConfig, name: str) -> pa.Table:
    """What a choice looks at of a file of ranked/, and the file's name in each row."""
    columns = {"rank", "source", "num_response_tokens", *key_columns(rank_config)}
    table = read_parquet(folder / name, sorted(columns))
    return table.append_column("name", pa.repeat(name, table.num_rows))


def _count(choice: Choice, files: list[FileEntry]) -> list[dict[str, Any]]:
    """Rows and scored tokens of each file: by filter for those left out, by group for the others."""
    ranked = Shards(files, partial(read_ranked, choice.run / "ranked", choice.rank_config))
    return list(collect(ranked, partial(_count_file, choice=choice), _COUNTED).sort_by("name").to_pylist())


def _count_file(table: pa.Table, choice: Choice) -> pa.Table:
    name = table["name"][0].as_py()
    tokens, groups = np.asarray(table["num_response_tokens"]).astype(np.int64), choice.groups(table)
    left = np.ones(table.num_rows, bool)
    rows = []
    for reason, mask in choice.reasons(table, name).items():
        rows.append((name, reason, "", int((left & mask).sum()), int(tokens[left & mask].sum())))
        left &= ~mask
    for group in np.unique(groups[left]):
        members = left & (groups == group)
        rows.append((name, _ELIGIBLE, str(group), int(members.sum()), int(tokens[members].sum())))
    return table_of(rows, _COUNTED)


def _plan(choice: Choice, files: list[FileEntry]) -> Plan:
    """Find the selected rows: their number, the keys that cut them into files, the last of each group."""
    needed = [entry for entry in files if entry.name in choice.limits]
    ranked = Shards(needed, partial(read_ranked, choice.run / "ranked", choice.rank_config))
    chosen = collect(ranked, partial(_choose_in_file, choice=choice, bin_rows=BIN_ROWS), _CHOSEN).to_pylist()
    groups: dict[str, Totals] = defaultdict(Totals)
    sources: dict[str, Totals] = defaultdict(Totals)
    last: dict[str, tuple[int, int]] = {}
    for row in chosen:
        if row["what"] == "source":
            sources[row["of"]].add(row)
        elif row["what"] == "group":
            groups[row["of"]].add(row)
            key = row["key"], row["example_id"]
            last[row["of"]] = max(last.get(row["of"], key), key)
    bins = sorted(
        (row for row in chosen if row["what"] == "stretch"),
        key=lambda row: (row["name"], row["key"], row["example_id"]),
    )
    if not bins:
        raise ConfigError("select selects no row: the first in rank order has more scored tokens than the rule allows")
    starts = [0]
    for before, row in pairwise(bins):
        starts.append(starts[-1] + before["rows"] if before["name"] == row["name"] else 0)
    return Plan(
        choice=choice,
        groups=groups,
        sources=sources,
        files=[row["name"] for row in bins],
        starts=starts,
        rows=[row["rows"] for row in bins],
        boundary_keys=np.array([row["key"] for row in bins[1:]], np.uint64),
        boundary_ids=np.array([row["example_id"] for row in bins[1:]], np.int64),
        last=last,
    )


def _choose_in_file(table: pa.Table, choice: Choice, bin_rows: int) -> pa.Table:
    """Of a file's selected rows: stretches of `bin_rows` with their first key, groups with their last, sources."""
    name = table["name"][0].as_py()
    selected = choice.selected(table, name)
    groups, tokens = choice.groups(table)[selected], np.asarray(table["num_response_tokens"]).astype(np.int64)[selected]
    sources = np.asarray(table["source"].to_pylist(), dtype=np.str_)[selected]
    _, keys, ids = order_keys(table.filter(pa.array(selected)), choice.rank_config)
    rows: list[tuple[Any, ...]] = []
    for start in range(0, len(ids), bin_rows):
        part = slice(start, start + bin_rows)
        rows.append((name, "stretch", "", len(ids[part]), int(tokens[part].sum()), keys[start], ids[start]))
    for group in np.unique(groups):
        (members,) = np.nonzero(groups == group)
        final = members[-1]
        rows.append((name, "group", str(group), len(members), int(tokens[members].sum()), keys[final], ids[final]))
    for source in np.unique(sources):
        members = sources == source
        rows.append((name, "source", str(source), int(members.sum()), int(tokens[members].sum()), None, None))
    return table_of(rows, _CHOSEN)


def _read_with_text(plan: Plan, name: str) -> pa.Table:
    """A shard's scores with their text, of rows that no group's last selected row precedes.

    Both folders hold the same rows in the same order. Some that a filter left out may be among them.
    """
    choice = plan.choice
    scores = read_parquet(choice.run / "scores" / name)
    rankable, keys, ids = order_keys(scores, choice.rank_config)
    groups = choice.groups(scores)[rankable]
    wanted = np.zeros(len(ids), bool)
    for group, (key, example_id) in plan.last.items():
        wanted |= (groups == group) & ((keys < np.uint64(key)) | ((keys == np.uint64(key)) & (ids <= example_id)))
    at = np.flatnonzero(rankable)[wanted]
    columns = _TEXT_COLUMNS if len(at) else []
    text = read_parquet(choice.run / "examples" / name, ["example_id", *columns])
    if not scores["example_id"].equals(text["example_id"]):
        raise IntegrityError(
            f"scores/{name} and examples/{name} do not hold the same rows; score again with --overwrite"
        )
    scores = scores.take(pa.array(at))
    for column in _TEXT_COLUMNS:
        values = text[column].take(pa.array(at)) if len(at) else pa.nulls(0, SELECTED.field(column).type)
        scores = scores.append_column(column, values)
    return scores


def _assign_bins(table: pa.Table, plan: Plan) -> pa.Table:
    _, keys, ids = order_keys(table, plan.choice.rank_config)
    numbers = ranking.bins(keys, ids, plan.boundary_keys, plan.boundary_ids)
    return table.append_column("bin", pa.array(numbers, pa.int64()))


def _write_bin(group: pa.Table, plan: Plan, metadata: dict[bytes, bytes]) -> pa.Table:
    """Write one file of selected/: the rows of ranked/ that are selected, with the text that came for them."""
    number = int(group["bin"][0].as_py())
    name, start, rows = plan.files[number], plan.starts[number], plan.rows[number]
    ranked = read_ranked(plan.choice.run / "ranked", plan.choice.rank_config, name)
    ranked = ranked.filter(pa.array(plan.choice.selected(ranked, name))).slice(start, rows)
    at = pc.index_in(ranked["example_id"], value_set=group["example_id"].combine_chunks())
    if at.null_count or ranked.num_rows != rows:
        raise IntegrityError(
            f"{rows} rows of ranked/{name} are selected, of which {at.null_count} came without text; rank again"
        )
    table = group.take(at).append_column("rank", ranked["rank"]).select(SELECTED.names).cast(SELECTED)
    entry = write_parquet(plan.choice.run / "selected" / f"part-{number:05d}.parquet", table, metadata)
    return entry_row(entry)


def _manifest(
    plan: Plan,
    written: dict[str, list[FileEntry]],
    counted: list[dict[str, Any]],
    fingerprint: dict[str, Any],
    ranked: Manifest,
    seconds: float,
) -> Manifest:
    num_selected = sum(plan.rows)
    if total_rows(written["selected"]) != num_selected:
        raise IntegrityError(
            f"{num_selected} rows were to be selected but {total_rows(written['selected'])} were written"
        )
    by_reason: Counter[str] = Counter()
    for row in counted:
        by_reason[row["what"]] += row["rows"]
    counts = {"ranked": ranked.counts["ranked"], **dict(sorted(by_reason.items())), "selected": num_selected}
    details = {
        "cut": _cut_value(plan, written["selected"][-1]),
        "groups": _told_groups(plan, counted),
        "sources": _told_sources(plan),
    }
    files = [entry for folder, entries in written.items() for entry in in_folder(folder, entries)]
    return Manifest(
        stage="select", fingerprint=fingerprint, counts=counts, files=files, details=details, seconds=seconds
    )


def _told_groups(plan: Plan, counted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group: rows that could be selected, rows and scored tokens that are."""
    pools: Counter[str] = Counter()
    for row in counted:
        if row["what"] == _ELIGIBLE:
            pools[row["group"]] += row["rows"]
    totals = {group: plan.groups.get(group, Totals()) for group in sorted(pools)}
    return [
        {"group": group, "eligible": pools[group], "selected": total.rows, "tokens": total.tokens}
        for group, total in totals.items()
    ]


def _told_sources(plan: Plan) -> list[dict[str, Any]]:
    """Each source: rows and scored tokens that are selected, and how often a mixture repeats them."""
    repeats = {part.source: part.repeat for part in plan.choice.config.mixture}
    return [
        {"source": name, **asdict(total), "repeat": repeats.get(name, 1)}
        for name, total in sorted(plan.sources.items())
    ]


def _cut_value(plan: Plan, last: FileEntry) -> float | None:
    """The ordering key of the last row taken, where one cut of the ranking made the selection."""
    choice = plan.choice
    if choice.rank_config.order == "random" or choice.config.balance or choice.config.mixture:
        return None
    table = read_parquet(choice.run / "selected" / last.name, [value_column(choice.rank_config)])
    return float(table.column(0)[-1].as_py())
