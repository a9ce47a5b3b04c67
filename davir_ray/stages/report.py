"""report: manifests and a sample of rows → report.html and report.json."""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.config.run import RunConfig
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import collect
from davir_ray.formulas.hashing import drawn
from davir_ray.report import ReportInputs, render_page, summarise
from davir_ray.run.files import read_parquet, write_file
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.run.stages import leading_to
from davir_ray.schema import REJECTS, SCORES, RejectReason
from davir_ray.stages.excerpts import excerpts

log = logging.getLogger(__name__)

_MOST_ROWS = 200_000
"""Rows that the figures are computed from; a larger run is sampled by hash, and the page says so."""

_REJECTS_PER_REASON = 50
_MOST_REJECT_FILES = 100
"""Read in search of every reason; a reason found in later files only is shown without its rows."""

_SCORE_COLUMNS = [name for name in SCORES.names if not name.endswith("_token_nll")]


def report(run: Run, config: RunConfig, tokenizer: Any = None, planted: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write the page and the same facts as JSON; returns the facts. Always redone: it takes seconds.

    With the base's tokenizer the page shows the tokens of shown examples whose token losses were kept; `planted` is the
    demo's truth.
    """
    started = time.monotonic()
    stages = [stage for stage in leading_to("report") if not (stage == "finetune" and config.reference)]
    manifests = {stage: manifest for stage in stages if (manifest := run.manifest(stage))}
    scored, ranked = run.require("score"), run.require("rank")
    shown = excerpts(run, tokenizer, manifests["prepare"].files_in("examples"), ranked.files_in("ranked"))
    facts = summarise(
        ReportInputs(
            config=dataclasses.asdict(config),
            manifests={stage: dataclasses.asdict(manifest) for stage, manifest in manifests.items()},
            scores=_sampled_scores(run, scored, manifests["select"]),
            num_scored=scored.counts["examples"],
            top=shown.best,
            middle=shown.middle,
            bottom=shown.worst,
            with_tokens=shown.with_tokens,
            rejects=_sampled_rejects(run, manifests["prepare"]),
            planted=planted,
        )
    )
    write_report(run, facts, render_page(facts), manifests, started)
    return facts


def write_report(run: Run, facts: dict[str, Any], page: str, made_of: Mapping[str, Manifest], started: float) -> None:
    """Write the facts as JSON, the page, and their manifest; `started` is when time.monotonic() said so."""
    facts_json = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
    run.clear("report")
    files = [write_file(run / "report.json", facts_json.encode()), write_file(run / "report.html", page.encode())]
    fingerprint = {stage: manifest.content for stage, manifest in made_of.items()}
    run.commit(Manifest("report", fingerprint, {}, files, seconds=time.monotonic() - started))


def _sampled_scores(run: Run, scored: Manifest, selected: Manifest) -> pa.Table:
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


def _sampled_rejects(run: Run, prepared: Manifest) -> pa.Table:
    """The first rejects of each reason; files are read until all that the manifest counts are found."""
    wanted = {reason: min(_REJECTS_PER_REASON, prepared.counts.get(reason, 0)) for reason in RejectReason}
    found: dict[str, pa.Table] = {reason: REJECTS.empty_table() for reason in wanted}
    for entry in prepared.files_in("rejects")[:_MOST_REJECT_FILES]:
        missing = [reason for reason, most in wanted.items() if found[reason].num_rows < most]
        if not missing:
            break
        rejects = read_parquet(run / "rejects" / entry.name).cast(REJECTS)
        for reason in missing:
            more = rejects.filter(pc.equal(rejects["reason"], reason.value))
            found[reason] = pa.concat_tables([found[reason], more]).slice(0, wanted[reason])
    return pa.concat_tables(found.values())


def _columns(schema: pa.Schema, names: list[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in names])
