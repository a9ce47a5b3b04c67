"""report: manifests and a sample of rows → report.html and report.json."""

import dataclasses
import json
import logging
import time
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.config import RunConfig
from davir_ray.data.packing import scored_positions
from davir_ray.formulas.ranking import drawn
from davir_ray.manifest import Manifest
from davir_ray.report import ReportInputs, render_page, summarise
from davir_ray.schema import EXAMPLES, REJECTS, SCORES
from davir_ray.stages.exchange import collect
from davir_ray.stages.resume import FOLDERS, require
from davir_ray.stages.shards import Shards, read_columns
from davir_ray.storage import FileEntry, Location, read_parquet

log = logging.getLogger(__name__)

_MOST_ROWS = 200_000
"""Rows that the figures are computed from; a larger run is sampled by hash, and the page says so."""

_SHOWN_EXAMPLES = 20
_MOST_REJECTS = 1000
_TOKEN_LOSSES = ("base_token_nll", "reference_token_nll")
_TEXT_COLUMNS = ["example_id", "prompt", "response", "input_ids", "response_spans"]
_SCORE_COLUMNS = [name for name in SCORES.names if name not in _TOKEN_LOSSES]


def report(
    run: Location, config: RunConfig, tokenizer: Any = None, planted: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the page and the same facts as JSON; returns the facts. Always redone: it takes seconds.

    With the base's tokenizer the page shows the tokens of shown examples whose token losses were kept; `planted` is the
    demo's truth.
    """
    started = time.monotonic()
    stages = [stage for stage in FOLDERS if stage != "report" and not (stage == "finetune" and config.reference)]
    manifests = {stage: manifest for stage in stages if (manifest := Manifest.read(run, stage))}
    scored, ranked = require(run, "score"), require(run, "rank")
    top, bottom = _shown(run, tokenizer, manifests["prepare"], ranked.files_in("ranked"))
    facts = summarise(
        ReportInputs(
            config=dataclasses.asdict(config),
            manifests={stage: dataclasses.asdict(manifest) for stage, manifest in manifests.items()},
            scores=_sampled_scores(run, scored, manifests["select"]),
            num_scored=scored.counts["examples"],
            top=top,
            bottom=bottom,
            rejects=_sampled_rejects(run, manifests["prepare"]),
            planted=planted,
        )
    )
    (run / "report.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False))
    (run / "report.html").write_text(render_page(facts))
    fingerprint = {stage: manifest.content for stage, manifest in manifests.items()}
    Manifest("report", fingerprint, {}, [], seconds=time.monotonic() - started).write(run)
    return facts


def _sampled_scores(run: Location, scored: Manifest, selected: Manifest) -> pa.Table:
    """Score columns of all rows, or of a sample drawn by hash, with a column `selected`."""
    share = min(1.0, _MOST_ROWS / scored.counts["examples"])
    draw = partial(_draw, share=share)
    scores = Shards(scored.files_in("scores"), partial(read_columns, run / "scores", _SCORE_COLUMNS))
    table = collect(scores, draw, _columns(SCORES, _SCORE_COLUMNS)).sort_by("example_id")
    ids = Shards(selected.files_in("selected"), partial(read_columns, run / "selected", ["example_id"]))
    chosen = collect(ids, draw, _columns(SCORES, ["example_id"]))
    return table.append_column(
        "selected", pc.is_in(table["example_id"], value_set=chosen["example_id"].combine_chunks())
    )


def _draw(table: pa.Table, share: float) -> pa.Table:
    return table.filter(pa.array(drawn(np.asarray(table["example_id"]), share, "report")))


def _sampled_rejects(run: Location, prepared: Manifest) -> pa.Table:
    """The first rejects, file by file, as many as a reader may look at."""
    tables: list[pa.Table] = [REJECTS.empty_table()]
    for entry in prepared.files_in("rejects"):
        if sum(table.num_rows for table in tables) < _MOST_REJECTS:
            tables.append(read_parquet(run / "rejects" / entry.name).cast(REJECTS))
    return pa.concat_tables(tables).slice(0, _MOST_REJECTS)


def _shown(
    run: Location, tokenizer: Any, prepared: Manifest, files: list[FileEntry]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first and the last ranked rows with their text, best first; with tokens where token losses were kept."""
    first, last = (_edge(run, files, from_end).to_pylist() for from_end in (False, True))
    texts = _texts(run, prepared, [row["example_id"] for row in first + last])
    told = [[_with_tokens(row | texts[row["example_id"]], tokenizer) for row in rows] for rows in (first, last)]
    return told[0], told[1]


def _edge(run: Location, files: list[FileEntry], from_end: bool) -> pa.Table:
    tables: list[pa.Table] = []
    for entry in reversed(files) if from_end else files:
        tables.append(read_parquet(run / "ranked" / entry.name))
        if sum(table.num_rows for table in tables) >= _SHOWN_EXAMPLES:
            break
    table = pa.concat_tables(reversed(tables) if from_end else tables)
    return table.slice(max(0, table.num_rows - _SHOWN_EXAMPLES)) if from_end else table.slice(0, _SHOWN_EXAMPLES)


def _texts(run: Location, prepared: Manifest, ids: list[int]) -> dict[int, dict[str, Any]]:
    """Prompt, response and tokens of a few examples, found by a scan of the ids alone."""
    shards = Shards(prepared.files_in("examples"), partial(_read_texts, run / "examples", ids))
    found = collect(shards, _unchanged, _columns(EXAMPLES, _TEXT_COLUMNS))
    return {row.pop("example_id"): row for row in found.to_pylist()}


def _read_texts(folder: Location, ids: list[int], name: str) -> pa.Table:
    """The wanted rows of a shard; its text is read only if it holds one of them."""
    wanted = pc.is_in(read_parquet(folder / name, ["example_id"])["example_id"], value_set=pa.array(ids, pa.int64()))
    if not pc.any(wanted).as_py():
        return _columns(EXAMPLES, _TEXT_COLUMNS).empty_table()
    return read_parquet(folder / name, _TEXT_COLUMNS).filter(wanted)


def _columns(schema: pa.Schema, names: list[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in names])


def _unchanged(table: pa.Table) -> pa.Table:
    return table


def _with_tokens(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Replace ids and spans by the text of each scored token, where token losses were kept."""
    input_ids, spans = row.pop("input_ids"), row.pop("response_spans")
    losses = {name: row.pop(name) for name in _TOKEN_LOSSES}
    if tokenizer is None or losses["base_token_nll"] is None or losses["reference_token_nll"] is None:
        return row
    tokens = [tokenizer.decode([input_ids[position]]) for position in scored_positions(spans)]
    return row | losses | {"tokens": tokens}
