"""Held-out rows that the run's training pool holds: word for word, by their prompt, or as near copies.

    held-out examples ─► their own text ─► an index, in each node once ┐
    shards of the pool ─► their own text ─────────────────────────────┴─► the held-out rows that each shard holds

The pool is read once, in tasks that return a row for each held-out row that they find. Own text is what is said in the
source record, whatever the format and the template (davir_ray.data.own_text), so two data sets that are rendered
differently are compared by what they have in common.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.own_text import own_text_of_example
from davir_ray.engine.shards import Shards, read_columns
from davir_ray.engine.shuffle import collect
from davir_ray.formulas.ngrams import (
    Grouped,
    Indices,
    KnownTexts,
    equal_pairs,
    hashed_words,
    ngrams,
    text_hash,
    words_of,
)
from davir_ray.run.files import digest, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.schema import EXAMPLES

log = logging.getLogger(__name__)

NUM_WORDS = 5
"""Words of an n-gram. A text of fewer words is one n-gram: a near copy of what has the same words, and of nothing
else."""
MIN_JACCARD = 0.7
"""Least similarity of near copies. Those who deduplicate take 0.8 (Lee et al., 2022, arXiv 2107.06499) or 0.75
(FineWeb); a held-out row is rather left out too early than too late."""
MIN_PROMPT_WORDS = 5
"""A prompt of fewer words, or none, as in text that is to be continued, says nothing about where a row is from."""
MAX_SAME_PROMPT = 10
"""A prompt of more held-out rows is what the data set puts before each of them, and no question of its own."""

_VERSION = 1
"""To be increased when other rows may be found."""


class Reason(StrEnum):
    """Why a held-out row is not measured on; the first that holds counts."""

    WORD_FOR_WORD = "word_for_word"  # rendered prompt and response are those of a row of the pool
    SAME_PROMPT = "same_prompt"  # the user's side of the conversation has the words of that of a row of the pool
    NEAR_COPY = "near_copy"  # 5-grams of prompt and response have a Jaccard similarity of 0.7 with a row of the pool


LEFT_OUT = pa.schema(
    [
        *(EXAMPLES.field(name) for name in ("example_id", "content_hash", "source", "source_file", "source_row")),
        ("reason", pa.string()),
        ("jaccard", pa.float64()),  # of a near copy: the highest with a row of the pool
        ("pool_example_id", pa.int64()),  # that row, or one with the text or prompt
    ]
)
"""left_out.parquet: a row for each held-out row that is not measured on."""

_TEXT = ("example_id", "content_hash", "source", "prompt", "response", "record")
_HELDOUT = pa.schema([*list(LEFT_OUT)[:5], ("prompt_hash", pa.int64()), ("grams", pa.list_(pa.uint64()))])
_FOUND = pa.schema(
    [
        ("heldout", pa.int64()),  # index of the held-out row
        ("reason", pa.int64()),  # index in Reason
        ("jaccard", pa.float64()),
        ("pool_example_id", pa.int64()),
        ("num_rows", pa.int64()),  # of the pool that is not read; 0 for a held-out row
    ]
)
_NOT_READ = -1
"""Instead of a held-out row: the number of rows of the pool whose own text is not known."""


class LeftOut(NamedTuple):
    """What is found in a pool."""

    rows: pa.Table
    """The held-out rows that are left out, with the schema LEFT_OUT."""
    num_not_read: int
    """Number of rows of the pool of which only the rendered text is compared: a chat template rendered them, and the
    run keeps no records."""

    @property
    def counts(self) -> dict[str, int]:
        """The number of held-out rows by reason."""
        reasons = self.rows["reason"].to_pylist()
        return {reason.value: reasons.count(reason) for reason in Reason}


def find_left_out(
    place: Location, run: Run, heldout: Run, sources: Mapping[str, list[Source]], options: PrepareConfig
) -> LeftOut:
    """The held-out rows that the run's pool holds, written to `place`; read from there if they are known.

    `sources` are those of the `run` and of the `heldout` data.
    """
    made_from = digest([_VERSION, run.require("prepare").content, heldout.require("prepare").content])
    if place.exists():
        table = read_parquet(place)
        metadata = table.schema.metadata or {}
        if metadata.get(b"made_from") == made_from.encode():
            return LeftOut(table, int(metadata[b"num_not_read"]))
    found = _find(run, heldout, sources, options)
    extra = {b"made_from": made_from.encode(), b"num_not_read": str(found.num_not_read).encode()}
    write_parquet(place, found.rows, extra)
    return found


def _find(run: Run, heldout: Run, sources: Mapping[str, list[Source]], options: PrepareConfig) -> LeftOut:
    read_heldout = partial(_heldout_rows, _Reader(sources["heldout"], options))
    columns = list(dict.fromkeys([*_TEXT, *LEFT_OUT.names[:5]]))
    rows = collect(_examples(heldout, columns), read_heldout, _HELDOUT)
    index = _Index.of(rows)
    find = partial(_find_in_shard, index, _Reader(sources["run"], options))
    found = collect(_examples(run, list(_TEXT)), find, _FOUND, merge=_best).sort_by(
        [("heldout", "ascending"), ("reason", "ascending")]
    )
    numbers = np.asarray(found["heldout"])
    is_first = np.diff(numbers, prepend=_NOT_READ) > 0
    first = found.filter(pa.array(is_first))
    table = rows.take(first["heldout"]).select(LEFT_OUT.names[:5])
    reasons = [list(Reason)[number] for number in first["reason"].to_pylist()]
    more = {"reason": reasons, "jaccard": first["jaccard"], "pool_example_id": first["pool_example_id"]}
    for name, values in more.items():
        table = table.append_column(name, values if isinstance(values, pa.ChunkedArray) else pa.array(values))
    return LeftOut(table.cast(LEFT_OUT), int(np.asarray(found["num_rows"]).sum()))


def _examples(run: Run, columns: list[str]) -> Shards:
    return Shards(run.require("prepare").files_in("examples"), partial(read_columns, run / "examples", columns))


class _Said(NamedTuple):
    """The own text of the rows of a table."""

    prompts_T: Indices
    """Hash of the words of the prompt; -1 where there are too few."""
    grams: Grouped
    """N-grams of prompt and response; none where the own text is not known."""


@dataclass(frozen=True)
class _Reader:
    """Reads the own text of the examples of these sources."""

    sources: list[Source]
    options: PrepareConfig

    def read(self, table: pa.Table) -> tuple[_Said, int]:
        """What the rows say, and the number of rows of which that is not known."""
        by_name = {source.name: source for source in self.sources}
        prompts, words, num_not_read = [], [], 0
        for row in table.select(["source", "prompt", "response", "record"]).to_pylist():
            own = own_text_of_example(row, by_name[row["source"]], self.options)
            num_not_read += own is None
            prompt, response = ([], []) if own is None else (words_of(own.prompt), words_of(own.response))
            prompts.append(text_hash(prompt) if len(prompt) >= MIN_PROMPT_WORDS else -1)
            words.append(prompt + response)
        return _Said(np.array(prompts, np.int64), ngrams(hashed_words(words), NUM_WORDS)), num_not_read


def _heldout_rows(reader: _Reader, table: pa.Table) -> pa.Table:
    """Held-out examples with what is looked for of each."""
    said, _ = reader.read(table)
    grams = pa.ListArray.from_arrays(pa.array(said.grams.starts_T1, pa.int32()), pa.array(said.grams.hashes_G))
    columns = [*(table[name] for name in LEFT_OUT.names[:5]), pa.array(said.prompts_T), grams]
    return pa.table(columns, names=_HELDOUT.names)


@dataclass(frozen=True, kw_only=True)
class _Index:
    """What is looked for of H held-out rows: arrays only, which the tasks of a node share."""

    hashes_H: Indices
    """Content hashes, sorted, and the row of each."""
    rows_of_hash_H: Indices
    prompts_P: Indices
    """Hashes of prompts, sorted, and the row of each."""
    rows_of_prompt_P: Indices
    texts: KnownTexts

    @classmethod
    def of(cls, rows: pa.Table) -> Self:
        hashes, prompts = (np.asarray(rows[name]) for name in ("content_hash", "prompt_hash"))
        _, number_of, counts = np.unique(prompts, return_inverse=True, return_counts=True)
        (asked,) = np.nonzero((prompts >= 0) & (counts[number_of] <= MAX_SAME_PROMPT))
        by_hash, by_prompt = np.argsort(hashes, kind="stable"), asked[np.argsort(prompts[asked], kind="stable")]
        grams = rows["grams"].combine_chunks()
        starts_T1 = np.concatenate([[0], np.cumsum(np.asarray(grams.value_lengths()))]).astype(np.int64)
        return cls(
            hashes_H=hashes[by_hash],
            rows_of_hash_H=by_hash,
            prompts_P=prompts[by_prompt],
            rows_of_prompt_P=by_prompt,
            texts=KnownTexts.of(Grouped(np.asarray(grams.flatten()), starts_T1), MIN_JACCARD),
        )


def _find_in_shard(index: _Index, reader: _Reader, table: pa.Table) -> pa.Table:
    """The held-out rows that a shard of the pool holds, each reason with one row of the shard."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # a task has one CPU, and rensa would start a thread for each
    said, num_not_read = reader.read(table)
    ids, contents = (np.asarray(table[name]) for name in ("example_id", "content_hash"))
    contents, row_of_content = np.unique(contents, return_index=True)
    asked, row_of_prompt = np.unique(said.prompts_T, return_index=True)
    same_text, hashes = equal_pairs(contents, index.hashes_H)
    same_prompt, prompts = equal_pairs(asked, index.prompts_P)
    copies = index.texts.copies(said.grams)
    no_jaccard = [np.full(len(pairs), np.nan) for pairs in (same_text, same_prompt)]
    parts: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]] = [
        (index.rows_of_hash_H[hashes], no_jaccard[0], row_of_content[same_text]),
        (index.rows_of_prompt_P[prompts], no_jaccard[1], row_of_prompt[same_prompt]),
        (copies.known_N, copies.jaccard_N, copies.texts_N),
    ]
    found = pa.concat_tables(
        pa.table(
            [
                pa.array(heldout, pa.int64()),
                pa.array(np.full(len(heldout), reason)),
                pa.array(jaccard, pa.float64(), from_pandas=True),
                pa.array(ids[pool]),
                pa.array(np.zeros(len(heldout), np.int64)),
            ],
            schema=_FOUND,
        )
        for reason, (heldout, jaccard, pool) in enumerate(parts)
    )
    not_read = pa.table([[_NOT_READ], [0], [None], [None], [num_not_read]], schema=_FOUND)
    return _best(pa.concat_tables([found, not_read]))


def _best(table: pa.Table) -> pa.Table:
    """For each held-out row and reason the row of the pool that is most similar, and the sum of `num_rows`."""
    order = [("jaccard", "descending"), ("pool_example_id", "ascending")]
    grouped = table.sort_by(order).group_by(["heldout", "reason"], use_threads=False)
    found = grouped.aggregate([("jaccard", "first"), ("pool_example_id", "first"), ("num_rows", "sum")])
    return found.rename_columns(_FOUND.names).cast(_FOUND)
