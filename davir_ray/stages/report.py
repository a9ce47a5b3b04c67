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

from davir_ray.config.run import RunConfig
from davir_ray.config.selection import ALIGNED
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import collect, gather
from davir_ray.formulas.hashing import sample_rows
from davir_ray.models.kernel.packing import scored_positions
from davir_ray.models.tokenizer import tokenizer_digest
from davir_ray.run.files import FileEntry, in_folder, read_parquet, write_file
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest, library_versions
from davir_ray.run.stages import leading_to
from davir_ray.schema import EXAMPLES, EXTRA, RANKED, REJECTS, SCORES, RejectReason
from davir_ray.stages.folds import Folds

log = logging.getLogger(__name__)

FACTS = "report.json"
"""What the page shows, as JSON."""

MAX_ROWS = 200_000
"""Maximum number of rows that the figures are computed from; a larger run is sampled by hash, and the page says so."""

_REJECTS_PER_REASON = 50
_MAX_REJECT_FILES = 100
"""Maximum number of files of rejects/ that are read; a reason that occurs only in later ones is shown without rows."""

_SCORE_COLUMNS = pa.schema([field for field in SCORES if not field.name.endswith("_token_nll")])
_IDS = pa.schema([SCORES.field("example_id")])

_ROWS_OF_TEXT = pa.schema({"content_hash": pa.int64(), "copies": pa.int64(), "selected": pa.int64()})

_SHOWN = 20
"""Number of examples shown at each place of the ranking: the best, the middle, the worst."""

_SHOWN_WITH_TOKENS = 4
_MAX_RANKED_FILES = 8
"""Maximum files of ranked/ read around each place for token losses: enough for a sample of 1 row in 400,000."""

_TOKEN_LOSSES = ("base_token_nll", "reference_token_nll")
_TEXTS = pa.schema(
    [EXAMPLES.field(name) for name in ("example_id", "prompt", "response", "input_ids", "response_spans")]
)

Rows = list[dict[str, Any]]


def report(run: Run, config: RunConfig, tokenizer: Any = None, planted: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write the page and the same facts as JSON, unless that is already done; returns the facts.

    With the base's tokenizer the page shows the tokens of examples whose token losses were kept. `planted` is the
    known truth about the demo's data.
    """
    started = time.monotonic()
    # What the page does not depend on: a given reference was not trained here, and only its order shows an extra score.
    others = {"finetune"} if config.reference else set[str]()
    others |= EXTRA.keys() - {config.rank.extra, ALIGNED if config.rank.is_by_davir else None}
    others |= set() if config.rank.repeats and config.rank.is_by_davir else {"stability"}
    manifests = run.manifests(stage for stage in leading_to("report") if stage not in others)
    settings = dataclasses.asdict(config)
    fingerprint = {
        "stages": {stage: manifest.checksum for stage, manifest in manifests.items()},
        "config": settings | {"score": {name: value for name, value in settings["score"].items() if name != "also"}},
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        "planted": planted,
        "versions": library_versions(),
    }
    if run.completed("report", fingerprint):
        facts: dict[str, Any] = json.loads((run / FACTS).read_bytes())
        return facts
    from davir_ray.report import ReportInputs, render_page, summarise  # imported late: the charts' libraries are slow

    scored, ranked = run.require("score"), run.require("rank")
    shown, with_tokens = _excerpts(run, tokenizer, manifests["prepare"].files_in("examples"), ranked.files_in("ranked"))
    facts = summarise(
        ReportInputs(
            config=settings,
            manifests={stage: dataclasses.asdict(manifest) for stage, manifest in manifests.items()},
            scores=_sampled_scores(run, scored, manifests["select"]),
            num_scored=scored.counts["examples"],
            texts=_copied_texts(run, scored, manifests["select"]),
            top=shown["best"],
            middle=shown["middle"],
            bottom=shown["worst"],
            with_tokens=with_tokens,
            rejects=_sampled_rejects(run, manifests["prepare"]),
            planted=planted,
        )
    )
    write_report(run, facts, render_page(facts), fingerprint, started)
    return facts


def write_report(run: Run, facts: dict[str, Any], page: str, fingerprint: dict[str, Any], started: float) -> None:
    """Write the facts as JSON, the page, and their manifest; `started` is time.monotonic() at the stage's start."""
    facts_json = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
    run.clear("report")
    files = [write_file(run / FACTS, facts_json.encode()), write_file(run / "report.html", page.encode())]
    run.commit(
        Manifest(stage="report", fingerprint=fingerprint, counts={}, files=files, seconds=time.monotonic() - started)
    )


def _sampled_scores(run: Run, scored: Manifest, selected: Manifest) -> pa.Table:
    """Score columns of all rows, or of a sample by hash, with `selected`, and with folds `fold` and `davir_seen`."""
    share = min(1.0, MAX_ROWS / scored.counts["examples"])
    folds, has_seen = Folds.of(run.require("prepare")), run.manifest("seen") is not None
    schema = _SCORE_COLUMNS
    if folds is not None:
        schema = schema.append(pa.field("fold", pa.int8()))
    if has_seen:
        schema = schema.append(pa.field("davir_seen", pa.float64()))

    def read(name: str) -> pa.Table:
        table = read_columns(run / "scores", _SCORE_COLUMNS.names, name)
        if folds is not None:
            table = table.append_column("fold", pa.array([folds.of_file[name]] * table.num_rows, pa.int8()))
        if has_seen:  # its files have the rows of scores/ in their order
            table = table.append_column("davir_seen", read_columns(run / "extra/seen", ["davir"], name)["davir"])
        return table

    table = sampled(Shards(scored.files_in("scores"), read), schema, share)
    ids = Shards(selected.files_in("selected"), partial(read_columns, run / "selected", _IDS.names))
    chosen = sampled(ids, _IDS, share)
    return table.append_column(
        "selected", pc.is_in(table["example_id"], value_set=chosen["example_id"].combine_chunks())
    )


def _copied_texts(run: Run, scored: Manifest, selected: Manifest) -> pa.Table:
    """How many scored rows the texts have, and how many of these are selected, as the report's TEXTS.

    A large run is sampled by the hash of the text, so that a text is there with all of its rows or not at all.
    """
    from davir_ray.report.distributions import TEXTS, has_score

    share = min(1.0, MAX_ROWS / scored.counts["examples"])
    entries = [*in_folder("scores", scored.files_in("scores")), *in_folder("selected", selected.files_in("selected"))]

    def read(name: str) -> pa.Table:
        table = read_parquet(run / name, ["content_hash", "status", "davir"])
        table = sample_rows(table.filter(has_score(table)), share, "copies", "content_hash")
        of_selected = np.full(table.num_rows, name.startswith("selected/"))
        columns = {"copies": pa.array(~of_selected), "selected": pa.array(of_selected)}
        return pa.table({"content_hash": table["content_hash"], **columns}).cast(_ROWS_OF_TEXT)

    def summed(table: pa.Table) -> pa.Table:
        sums = table.group_by("content_hash").aggregate([("copies", "sum"), ("selected", "sum")])
        return sums.rename_columns(_ROWS_OF_TEXT.names)

    def counted(table: pa.Table) -> pa.Table:
        return table.group_by(["copies", "selected"]).aggregate([([], "count_all")]).rename_columns(TEXTS.names)

    return collect(Shards(entries, read), summed, _ROWS_OF_TEXT, merge=summed, finish=counted).cast(TEXTS)


def sampled(shards: Shards, schema: pa.Schema, share: float) -> pa.Table:
    """Rows drawn by the hash of their id, the schema's first column, in the order of the ids."""
    id_column = schema.names[0]
    draw = partial(sample_rows, share=share, purpose="report", id_column=id_column)
    return collect(shards, draw, schema).sort_by(id_column)


def _sampled_rejects(run: Run, prepared: Manifest) -> pa.Table:
    """The first rejects of each reason; files are read until all that the manifest counts are found."""
    wanted = {reason: min(_REJECTS_PER_REASON, prepared.counts.get(reason, 0)) for reason in RejectReason}
    found: dict[str, pa.Table] = {reason: REJECTS.empty_table() for reason in wanted}
    for entry in prepared.files_in("rejects")[:_MAX_REJECT_FILES]:
        missing = [reason for reason, num_rows in wanted.items() if found[reason].num_rows < num_rows]
        if not missing:
            break
        rejects = read_parquet(run / "rejects" / entry.name).cast(REJECTS)
        for reason in missing:
            more = rejects.filter(pc.equal(rejects["reason"], reason.value))
            found[reason] = pa.concat_tables([found[reason], more]).slice(0, wanted[reason])
    return pa.concat_tables(found.values())


def _excerpts(
    run: Run, tokenizer: Any, examples: list[FileEntry], ranked: list[FileEntry]
) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """For `best`, `middle` and `worst` in rank order: at most 20 rows, and the nearest with token losses, at most 4.

    The middle is without the rows that are among the best or the worst. A row has the text of each of its tokens where
    its token losses were kept and the tokenizer is known.
    """
    last = sum(entry.rows for entry in ranked)
    num_with_tokens = _SHOWN_WITH_TOKENS if tokenizer is not None else 0
    places = {"best": 1, "middle": (last + 1) // 2, "worst": last}
    found = {place: _around(run, ranked, rank, num_with_tokens) for place, rank in places.items()}
    ids = {row["example_id"] for pair in found.values() for rows in pair for row in rows}
    texts = gather(Shards(examples, partial(_read_texts, run / "examples", sorted(ids))), _TEXTS)
    text_of = {row.pop("example_id"): row for row in texts.to_pylist()}

    def with_texts(rows: Rows) -> Rows:
        return [_with_tokens(row | text_of[row["example_id"]], tokenizer) for row in rows]

    shown = {place: with_texts(rows) for place, (rows, _) in found.items()}
    with_tokens = {place: with_texts(rows) for place, (_, rows) in found.items()}
    at_the_ends = {row["rank"] for place in ("best", "worst") for row in shown[place]}
    shown["middle"] = [row for row in shown["middle"] if row["rank"] not in at_the_ends]
    return shown, with_tokens


def _around(run: Run, ranked: list[FileEntry], rank: int, num_with_tokens: int) -> tuple[Rows, Rows]:
    """Rows around a rank, and the nearest ones with token losses; files are read outwards until both suffice."""
    ends = np.cumsum([entry.rows for entry in ranked])  # the files are in rank order
    starts = ends - [entry.rows for entry in ranked] + 1
    distance = np.maximum(0, np.maximum(starts - rank, rank - ends))
    shown = kept = RANKED.empty_table()
    for place in np.argsort(distance, kind="stable")[:_MAX_RANKED_FILES]:
        table = read_parquet(run / "ranked" / ranked[place].name, RANKED.names)
        has_losses = pc.and_(*(pc.is_valid(table[name]) for name in _TOKEN_LOSSES))
        shown = _nearest(pa.concat_tables([shown, table]), rank, _SHOWN)
        kept = _nearest(pa.concat_tables([kept, table.filter(has_losses)]), rank, num_with_tokens)
        if (shown.num_rows, kept.num_rows) == (_SHOWN, num_with_tokens):
            break
    return shown.to_pylist(), kept.to_pylist()


def _nearest(table: pa.Table, rank: int, num_rows: int) -> pa.Table:
    distance = np.abs(np.asarray(table["rank"]) - rank)
    return table.take(pa.array(np.argsort(distance, kind="stable")[:num_rows])).sort_by("rank")


def _read_texts(folder: Location, ids: list[int], name: str) -> pa.Table:
    """The wanted rows of a shard; its text is read only if it holds one of them."""
    wanted = pc.is_in(read_parquet(folder / name, ["example_id"])["example_id"], value_set=pa.array(ids, pa.int64()))
    if not pc.any(wanted).as_py():
        return _TEXTS.empty_table()
    return read_parquet(folder / name, _TEXTS.names).filter(wanted)


def _with_tokens(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Replace ids and spans by the text of each scored token, where token losses were kept."""
    input_ids, spans = row.pop("input_ids"), row.pop("response_spans")
    losses = {name: row.pop(name) for name in _TOKEN_LOSSES}
    if tokenizer is None or losses["base_token_nll"] is None or losses["reference_token_nll"] is None:
        return row
    tokens = [tokenizer.decode([input_ids[position]]) for position in scored_positions(spans)]
    return row | losses | {"tokens": tokens}
