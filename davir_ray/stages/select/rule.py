"""select: ranked/ + text → selected/, by filters and then one rule, applied to each group if there are groups.

The files of ranked/ are in rank order, so the selected rows of a group are a prefix of it. One scan counts the rows of
each group in each file, from which the driver computes a limit for each file; where ranks alone decide, the ranking's
manifest has the counts. A second scan, of the files up to the limit, finds the selected rows, and only those are
exchanged with their text. The result is exact for any number of files and workers.
"""

import logging
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import exchange
from davir_ray.errors import ConfigError, IntegrityError
from davir_ray.run.files import FileEntry, in_folder, read_parquet, total_rows, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import SELECTED
from davir_ray.stages.rank import file_metadata, order_keys, order_values, read_scores, value_columns, with_order
from davir_ray.stages.select.candidates import Candidates, Choice, num_skipped
from davir_ray.stages.select.duplicates import FOLDER as DUPLICATES
from davir_ray.stages.select.duplicates import find_duplicates
from davir_ray.stages.select.limits import GroupCount, limits_by_file
from davir_ray.stages.select.mixture import write_jsonl, write_mixture
from davir_ray.stages.select.plan import Plan, Total

log = logging.getLogger(__name__)

_TEXT_COLUMNS = ["prompt", "response", "record", "source_file", "source_row"]


def select(run: Run, rank_config: RankConfig, config: SelectConfig) -> Manifest:
    """Apply the filters and the rule, and write the selected rows in rank order, with their text."""
    started = time.monotonic()
    ranked, scored = run.require("rank"), run.require("score")
    fingerprint = {"ranked": ranked.content, "rule": config.as_rule()}
    if done := run.completed("select", fingerprint):
        return done
    check_count(config, ranked.counts["rankable"], "ranked")
    run.clear("select")
    files = ranked.files_in("ranked")

    duplicates = find_duplicates(run, files) if config.drop_duplicates else []
    candidates = Candidates(
        run=run,
        rank_config=rank_config,
        config=config,
        duplicates=frozenset(entry.name for entry in duplicates),
        num_skipped=num_skipped(config, ranked),
    )
    eligible, left_out = candidates.count(files, tokens=config.top_tokens is not None)
    choice = Choice(candidates, limits_by_file(eligible, config))
    plan = Plan.of(choice, files)

    text_bytes = {entry.name: entry.bytes for entry in run.require("prepare").files_in("examples")}
    with_text = [replace(entry, bytes=entry.bytes + text_bytes[entry.name]) for entry in scored.files_in("scores")]
    selected = exchange(
        Shards(with_text, partial(_read_with_text, candidates, plan)),
        plan.bins(rank_config).assign,
        len(plan.ranges),
        partial(_write_range, choice=choice, plan=plan, metadata=file_metadata(run, rank_config, fingerprint)),
        kept=plan.num_rows / scored.counts["examples"],
    )
    if total_rows(selected) != plan.num_rows:
        raise IntegrityError(f"{plan.num_rows} rows were to be selected but {total_rows(selected)} were written")
    written = {"selected": selected, DUPLICATES: duplicates}
    if config.mixture:
        schema = with_order(SELECTED, rank_config)
        written["mixture"] = write_mixture(run, selected, config, schema, fingerprint)
    if config.jsonl:
        source = "mixture" if config.mixture else "selected"
        written["jsonl"] = write_jsonl(run, source, written[source])

    num_ranked, num_eligible = ranked.counts["ranked"], sum(count.rows for count in eligible)
    repeats = {part.source: part.repeat for part in config.mixture}
    manifest = Manifest(
        stage="select",
        fingerprint=fingerprint,
        counts={"ranked": num_ranked, "eligible": num_eligible, **left_out, "selected": plan.num_rows},
        files=[entry for folder, found in written.items() for entry in in_folder(folder, found)],
        details={
            "cut": _cut_value(candidates, selected[-1]),
            "groups": _group_details(plan, eligible),
            "sources": [
                {"source": name, "rows": total.rows, "tokens": total.tokens, "repeat": repeats.get(name, 1)}
                for name, total in sorted(plan.sources.items())
            ],
        },
        seconds=time.monotonic() - started,
    )
    manifest = run.commit(manifest)
    log.info("select: %d of %d ranked rows", plan.num_rows, num_ranked)
    return manifest


def check_count(config: SelectConfig, num_rows: int, what: str) -> None:
    """Raise ConfigError if more rows are to be selected than there are; this is checked before any model is loaded."""
    wanted = {"select.top_k": config.top_k or 0, "the sum of select.quotas": sum(config.quotas.values())}
    for name, rows in wanted.items():
        if rows > num_rows:
            raise ConfigError(f"{name} is {rows}, but only {num_rows} rows are {what}; ask for fewer")


def _read_with_text(candidates: Candidates, plan: Plan, name: str) -> pa.Table:
    """A shard's scores with their text: the rows up to the last selected one of their group.

    Rows that a filter left out may be among them. Both folders hold the same rows in the same order.
    """
    run = candidates.run
    scores = read_scores(run, candidates.rank_config, None, name)
    rankable, keys, ids = order_keys(scores, candidates.rank_config)
    groups = candidates.groups(scores)[rankable]
    wanted = np.zeros(len(ids), bool)
    for group, total in plan.groups.items():
        key, example_id = np.uint64(total.last[0]), total.last[1]
        wanted |= (groups == group) & ((keys < key) | ((keys == key) & (ids <= example_id)))
    at = np.flatnonzero(rankable)[wanted]
    columns = _TEXT_COLUMNS if len(at) else []
    text = read_parquet(run / "examples" / name, ["example_id", *columns])
    if not scores["example_id"].equals(text["example_id"]):
        raise IntegrityError(
            f"scores/{name} and examples/{name} do not hold the same rows; score again with --overwrite"
        )
    scores = scores.take(pa.array(at))
    for column in _TEXT_COLUMNS:
        values = text[column].take(pa.array(at)) if len(at) else pa.nulls(0, SELECTED.field(column).type)
        scores = scores.append_column(column, values)
    return scores


def _write_range(
    number: int, with_text: pa.Table, choice: Choice, plan: Plan, metadata: dict[bytes, bytes]
) -> FileEntry:
    """Write one file of selected/: a range of the selected rows of ranked/, with their text."""
    wanted = plan.ranges[number]
    ranked = choice.read(wanted.file).slice(wanted.start, wanted.rows)
    at = pc.index_in(ranked["example_id"], value_set=with_text["example_id"].combine_chunks())
    if at.null_count or ranked.num_rows != wanted.rows:
        raise IntegrityError(
            f"{wanted.rows} rows of ranked/{wanted.file} are selected, of which {at.null_count} came without text; "
            "rank again"
        )
    schema = with_order(SELECTED, choice.candidates.rank_config)
    table = with_text.take(at).append_column("rank", ranked["rank"]).select(schema.names).cast(schema)
    return write_parquet(choice.candidates.run / "selected" / f"part-{number:05d}.parquet", table, metadata)


def _group_details(plan: Plan, counts: list[GroupCount]) -> list[dict[str, Any]]:
    """For each group the number of rows that may be selected, and of rows and scored tokens that are."""
    eligible = Counter[str]()
    for count in counts:
        eligible[count.group] += count.rows
    totals = {group: plan.groups.get(group, Total(rows=0, tokens=0, last=(0, 0))) for group in sorted(eligible)}
    return [
        {"group": group, "eligible": eligible[group], "selected": total.rows, "tokens": total.tokens}
        for group, total in totals.items()
    ]


def _cut_value(candidates: Candidates, last: FileEntry) -> float | None:
    """The value of the last selected row; None for a random order, or if each group was cut at a value of its own."""
    config, rank_config = candidates.config, candidates.rank_config
    if rank_config.by == "random" or config.balance or config.mixture:
        return None
    table = read_parquet(candidates.run / "selected" / last.name, value_columns(rank_config))
    return float(order_values(table, rank_config)[-1])
