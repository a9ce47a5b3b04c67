"""The examples that the report shows: around the best, the middle and the worst rank, with their text and tokens."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import collect
from davir_ray.models.kernel.packing import scored_positions
from davir_ray.run.files import FileEntry, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.schema import EXAMPLES, RANKED

_SHOWN = 20
_SHOWN_WITH_TOKENS = 4
_MOST_FILES = 8
"""Of ranked/, read around each place for examples with token losses: enough for a sample of 1 row in 400,000."""

_TOKEN_LOSSES = ("base_token_nll", "reference_token_nll")
_TEXT_COLUMNS = ["example_id", "prompt", "response", "input_ids", "response_spans"]
_TEXTS = pa.schema([EXAMPLES.field(name) for name in _TEXT_COLUMNS])

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Excerpts:
    """Rows in rank order, at most 20 at each place."""

    best: Rows
    middle: Rows
    """None that stands among the best or the worst."""
    worst: Rows
    with_tokens: dict[str, Rows]
    """At each of these places the nearest rows whose token losses were kept, at most 4."""


def excerpts(run: Run, tokenizer: Any, examples: list[FileEntry], ranked: list[FileEntry]) -> Excerpts:
    """Rows to show, with the text of each token where its losses were kept and the tokenizer is known."""
    last = sum(entry.rows for entry in ranked)
    num_with_tokens = _SHOWN_WITH_TOKENS if tokenizer is not None else 0
    places = {"best": 1, "middle": (last + 1) // 2, "worst": last}
    found = {place: _around(run, ranked, rank, num_with_tokens) for place, rank in places.items()}
    texts = _texts(run, examples, [row["example_id"] for rows in found.values() for row in (*rows[0], *rows[1])])
    told = {
        place: [[_with_tokens(row | texts[row["example_id"]], tokenizer) for row in rows] for rows in pair]
        for place, pair in found.items()
    }
    at_the_ends = {row["rank"] for place in ("best", "worst") for row in told[place][0]}
    return Excerpts(
        best=told["best"][0],
        middle=[row for row in told["middle"][0] if row["rank"] not in at_the_ends],
        worst=told["worst"][0],
        with_tokens={place: kept for place, (_, kept) in told.items()},
    )


def _around(run: Run, ranked: list[FileEntry], rank: int, num_with_tokens: int) -> tuple[Rows, Rows]:
    """Rows around a rank, and the nearest with token losses; files are read from near to far until there are enough."""
    shown = kept = RANKED.empty_table()
    for entry in _by_distance(ranked, rank)[:_MOST_FILES]:
        table = read_parquet(run / "ranked" / entry.name)
        has_losses = pc.and_(*(pc.is_valid(table[name]) for name in _TOKEN_LOSSES))
        shown = _nearest(pa.concat_tables([shown, table]), rank, _SHOWN)
        kept = _nearest(pa.concat_tables([kept, table.filter(has_losses)]), rank, num_with_tokens)
        if (shown.num_rows, kept.num_rows) == (_SHOWN, num_with_tokens):
            break
    return shown.to_pylist(), kept.to_pylist()


def _by_distance(ranked: list[FileEntry], rank: int) -> list[FileEntry]:
    """Files of ranked/, whose order is that of the ranks, from the one that holds a rank outwards."""
    ends = np.cumsum([entry.rows for entry in ranked])
    starts = ends - [entry.rows for entry in ranked] + 1
    distance = np.maximum(0, np.maximum(starts - rank, rank - ends))
    return [ranked[place] for place in np.argsort(distance, kind="stable")]


def _nearest(table: pa.Table, rank: int, most: int) -> pa.Table:
    distance = np.abs(np.asarray(table["rank"]) - rank)
    return table.take(pa.array(np.argsort(distance, kind="stable")[:most])).sort_by("rank")


def _texts(run: Run, examples: list[FileEntry], ids: list[int]) -> dict[int, dict[str, Any]]:
    """Prompt, response and tokens of a few examples, found by a scan of the ids alone."""
    shards = Shards(examples, partial(_read_texts, run / "examples", sorted(set(ids))))
    return {row.pop("example_id"): row for row in collect(shards, _unchanged, _TEXTS).to_pylist()}


def _read_texts(folder: Location, ids: list[int], name: str) -> pa.Table:
    """The wanted rows of a shard; its text is read only if it holds one of them."""
    wanted = pc.is_in(read_parquet(folder / name, ["example_id"])["example_id"], value_set=pa.array(ids, pa.int64()))
    if not pc.any(wanted).as_py():
        return _TEXTS.empty_table()
    return read_parquet(folder / name, _TEXT_COLUMNS).filter(wanted)


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
