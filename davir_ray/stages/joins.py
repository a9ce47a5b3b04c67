"""Which rows of the examples are joined: the same prompt, the same long response, or nearly the same text.

    shards ─► keys/ (a file for each shard: hashes, bands of the signature, n-grams)
    keys/ ─by hash─► edges of equal hashes
    keys/ ─by band─► pairs/ ─with the n-grams of both, by id─► edges of near copies

Text is read once. What is grouped passes through Ray's object store, and what is found is written to files: the driver
holds their entries.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.sources import Source
from davir_ray.data.own_text import own_text_of_example
from davir_ray.engine.shards import Shards
from davir_ray.engine.shuffle import Round, Written, regroup, write_shards
from davir_ray.formulas.components import (
    SIMILARITIES,
    Ids,
    Strength,
    distinct,
    pairs_to_compare,
    stars,
    strength_of,
)
from davir_ray.formulas.hashing import hash_parts, random_keys, seed_from
from davir_ray.formulas.ngrams import Grouped, band_keys, hashed_words, jaccard, ngrams, signatures, text_hash, words_of
from davir_ray.run.files import FileEntry, in_folder, read_parquet, total_rows, write_parquet
from davir_ray.run.location import Location

NUM_WORDS = 5
"""Words of an n-gram; a text of fewer words is one n-gram."""

MIN_RESPONSE_TOKENS = 20
"""A response of fewer scored tokens may be the same by chance."""

WINDOW = 16
"""Rows of a band that a row is compared with: all, where there are at most 17 different ones."""

ROWS_PER_PART = 2_000_000
"""Rows, of a few numbers each, in one part of a shuffle."""

_TEXTS_PER_PART = 50_000
"""Rows, or pairs of rows, whose n-grams one task compares; about 100 MB."""

_HASH_BYTES = 25
"""Bytes of a row of join_equal in a shuffle: the hash, the row, the strength and the part."""

_BAND_BYTES = 32
"""Bytes of a row of a band in a shuffle: its key, the row, its copies and the part."""

_BYTES_AT_ONCE = 64 * 10**9
"""Bytes of bands that are exchanged at once: the objects of a shuffle grow with the square of its bytes."""

NONE = -1
"""Instead of a hash or an id where there is none; both are never negative."""

EDGES = pa.schema({"least": pa.int64(), "other": pa.int64(), "strength": pa.int8()})

_KEYS = pa.schema(
    {
        "example_id": pa.int64(),
        "stratum": pa.int64(),
        "group": pa.int64(),  # hash of the value of prepare.fold_by
        "prompt": pa.int64(),
        "response": pa.int64(),
        "copy": pa.int64(),  # hash of the set of n-grams
        "bands": pa.list_(pa.uint64()),
        "grams": pa.list_(pa.uint64()),
    }
)
_HASHED = {"prompt": Strength.PROMPT, "response": Strength.RESPONSE, "copy": Strength.COPY}
_PAIRS = pa.schema({"id": pa.int64(), "other": pa.int64(), "part": pa.int64(), "grams": pa.list_(pa.uint64())})

LENGTHS = 64
"""Strata of a source: a length of n bits is in stratum n."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Reads what the rows of a shard say."""

    sources: list[Source]
    options: PrepareConfig
    needs_text: bool
    """Whether rows are joined by their text at all."""

    @property
    def columns(self) -> list[str]:
        """The columns of examples that are read."""
        text = ["prompt", "response", "record"] if self.needs_text else []
        group = ["fold_key"] if self.options.fold_by is not None else []
        return ["example_id", "source", "num_response_tokens", *text, *group]

    def keys(self, table: pa.Table) -> tuple[pa.Table, int]:
        """The _KEYS of the rows, and the number of rows whose text is known only as it was rendered."""
        of_source = {source.name: number * LENGTHS for number, source in enumerate(self.sources)}
        first = np.array([of_source[name] for name in table["source"].to_pylist()], np.int64)
        num_tokens = np.asarray(table["num_response_tokens"])
        found = {"example_id": table["example_id"], "stratum": first + np.frexp(num_tokens)[1]}
        if self.options.fold_by is not None:
            found["group"] = pc.fill_null(table["fold_key"], NONE)
        num_not_read = 0
        if self.needs_text:
            of_text, num_not_read = self._keys_of_text(table, num_tokens)
            found |= of_text
        missing = {name: np.full(table.num_rows, NONE) for name in _KEYS.names[1:6] if name not in found}
        missing |= {
            name: pa.ListArray.from_arrays(pa.array(np.zeros(table.num_rows + 1, np.int32)), pa.array([], pa.uint64()))
            for name in _KEYS.names[6:]
            if name not in found
        }
        return pa.table(found | missing).select(_KEYS.names).cast(_KEYS), num_not_read

    def _keys_of_text(self, table: pa.Table, num_tokens: Ids) -> tuple[dict[str, Any], int]:
        os.environ.setdefault("RAYON_NUM_THREADS", "1")  # a task has one CPU, and rensa would start a thread for each
        by_name = {source.name: source for source in self.sources}
        prompts, responses, words, num_not_read = [], [], [], 0
        rows = table.select(["source", "prompt", "response", "record"]).to_pylist()
        for row, length in zip(rows, num_tokens.tolist(), strict=True):
            own = own_text_of_example(row, by_name[row["source"]], self.options)
            num_not_read += own is None
            prompt, response = map(words_of, (row["prompt"], row["response"]) if own is None else own)
            prompts.append(text_hash(prompt) if prompt else NONE)
            responses.append(text_hash(response) if response and length >= MIN_RESPONSE_TOKENS else NONE)
            words.append(prompt + response)
        sets = ngrams(hashed_words(words), NUM_WORDS).as_sets()
        copies = [_set_hash(sets, text) for text in range(sets.num_texts)]
        return {
            "prompt": pa.array(prompts, pa.int64()),
            "response": pa.array(responses, pa.int64()),
            "copy": pa.array(copies, pa.int64()),
            "bands": _bands(sets),
            "grams": _lists(sets),
        }, num_not_read


def _set_hash(sets: Grouped, text: int) -> int:
    grams = sets.of(text)
    return int.from_bytes(hashlib.blake2b(grams.tobytes(), digest_size=8).digest(), "big") >> 1 if len(grams) else NONE


def _lists(grams: Grouped) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(grams.starts_T1, pa.int32()), pa.array(grams.hashes_G))


def _bands(sets: Grouped) -> pa.ListArray:
    """The keys of the bands of each text's signature; none for a text without n-grams."""
    is_filled = np.diff(sets.starts_T1) > 0
    keys_TB = band_keys(signatures(Grouped(sets.hashes_G, np.unique(sets.starts_T1))))
    starts = np.concatenate([[0], np.cumsum(is_filled * keys_TB.shape[1])])
    return _lists(Grouped(keys_TB.ravel(), starts.astype(np.int64)))


def part_of(values: Ids, num_parts: int) -> Ids:
    """The part that each id or hash is in; mixed, as the smallest ids of many groups are small."""
    return hash_parts((random_keys(values, seed_from("parts")) >> np.uint64(1)).astype(np.int64), num_parts)


def kept_share(shards: Shards, num_bytes: float) -> float:
    """The share of the shards' bytes that rows of `num_bytes` in all are, above 0: `kept` of regroup."""
    return max(1, num_bytes) / max(1, shards.num_bytes)


def write_keys(scratch: Location, shards: Shards, texts: Texts) -> tuple[list[FileEntry], dict[str, int]]:
    """Write keys/, a file for each shard; returns the files, and two numbers of rows.

    `not_read`: whose text is known only as it was rendered; `grouped`: that have a value of prepare.fold_by.
    """

    def write(name: str, table: pa.Table) -> Written:
        keys, num_not_read = texts.keys(table)
        num_grouped = int((np.asarray(keys["group"]) != NONE).sum())
        facts = {"not_read": num_not_read, "grouped": num_grouped}
        return Written(write_parquet(scratch / "keys" / name, keys), facts)

    written = write_shards(shards, write)
    entries = in_folder("keys", (one.entry for one in written))
    return entries, {name: sum(one.facts[name] for one in written) for name in ("not_read", "grouped")}


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The edges between the rows."""

    edges: list[FileEntry]
    """Files with the schema EDGES, named relative to the scratch folder."""
    num_split: dict[str, int]
    """Number of prompts and of responses, by the name of the column, that too many rows have to join them."""


def join_equal(scratch: Location, keys: list[FileEntry], num_rows: int, names: list[str], max_rows: float) -> Joined:
    """Join the rows that have the same prompt, response or copy (`names` of columns).

    A prompt or a response that more than `max_rows` rows have joins none.
    """
    num_parts = 1 + num_rows * len(names) // ROWS_PER_PART

    def assign(table: pa.Table) -> pa.Table:
        tables = []
        for name in names:
            values, ids = np.asarray(table[name]), np.asarray(table["example_id"])
            known, strength = values != NONE, _HASHED[name]
            # Equal words of a prompt and of a response are no copies.
            mixed = (random_keys(values[known], int(strength)) >> np.uint64(1)).astype(np.int64)
            of_name = np.full(known.sum(), strength, np.int8)
            columns = {"key": mixed, "id": ids[known], "strength": of_name, "part": hash_parts(mixed, num_parts)}
            tables.append(pa.table(columns))
        return pa.concat_tables(tables)

    def write(part: pa.Table) -> Written:
        least, index, rows = stars(np.asarray(part["key"]), np.asarray(part["id"]))
        strengths = np.asarray(part["strength"])[index]
        is_split = (strengths != Strength.COPY) & (rows > max_rows)
        split, others = strengths[is_split], rows[is_split] - 1  # each of a key's edges knows how many there are
        facts = {name: round(float((1 / others[split == strength]).sum())) for name, strength in _HASHED.items()}
        kept = pa.array(~is_split)
        table = pa.table([least, np.asarray(part["id"])[index], strengths], schema=EDGES).filter(kept)
        place = scratch / "edges" / f"equal-{part['part'][0].as_py():05d}.parquet"
        return Written(write_parquet(place, table), facts)

    shards = _shards(scratch, keys, ["example_id", *names])
    kept = kept_share(shards, _HASH_BYTES * len(names) * num_rows)
    written = regroup(shards, assign, Round("part", num_parts, write), kept=kept)
    return Joined(
        edges=in_folder("edges", (one.entry for one in written)),
        num_split={name: sum(one.facts[name] for one in written) for name in names},
    )


def join_near(scratch: Location, keys: list[FileEntry], num_rows: int) -> list[FileEntry]:
    """Join near copies; returns the files of the edges.

    Candidates share a band; the n-grams of both decide.
    """
    pairs = _candidates(scratch, keys, num_rows)
    num_pairs = total_rows(pairs)  # for each, the n-grams of a row are sent to the other
    num_parts = 1 + max(num_rows, num_pairs) // _TEXTS_PER_PART

    def read(name: str) -> pa.Table:
        if name.startswith("keys/"):
            table = read_parquet(scratch / name, ["example_id", "grams"])
            ids, grams = np.asarray(table["example_id"]), table["grams"]
            return _pair_rows(ids, np.full(len(ids), _TEXT), grams, num_parts)
        table = read_parquet(scratch / name)
        least, other = (np.asarray(table[column]) for column in ("least", "other"))
        ids, others = np.concatenate([least, other]), np.concatenate([other, np.full(len(other), NONE)])
        return _pair_rows(ids, others, None, num_parts)

    shards = Shards([*keys, *pairs], read)
    join = partial(_with_text, num_parts=num_parts)
    write = partial(_write_near, scratch / "edges")
    rounds = (Round("part", num_parts, join), Round("part", num_parts, write))
    written = regroup(shards, lambda table: table, *rounds, kept=1 + num_pairs / max(1, num_rows))
    return in_folder("edges", (entry for entry in written if entry is not None))


def _candidates(scratch: Location, keys: list[FileEntry], num_rows: int) -> list[FileEntry]:
    """Write pairs/: the pairs of rows that share a band, each at least once; some bands at a time."""
    num_bands = band_keys(signatures(ngrams(hashed_words([["a"]]), NUM_WORDS))).shape[1]
    at_once = max(1, min(num_bands, _BYTES_AT_ONCE // (_BAND_BYTES * num_rows)))
    parts = [range(first, min(first + at_once, num_bands)) for first in range(0, num_bands, at_once)]
    return [entry for bands in parts for entry in _candidates_of(scratch, keys, num_rows, bands, num_bands)]


def _candidates_of(
    scratch: Location, keys: list[FileEntry], num_rows: int, bands: range, num_bands: int
) -> list[FileEntry]:
    num_parts = 1 + num_rows * len(bands) // ROWS_PER_PART

    def assign(table: pa.Table) -> pa.Table:
        filled = table.filter(pc.greater(pc.list_value_length(table["bands"]), 0))
        keys_TB = np.asarray(filled["bands"].combine_chunks().flatten()).reshape(filled.num_rows, num_bands)
        values = (keys_TB[:, bands.start : bands.stop].ravel() >> np.uint64(1)).astype(np.int64)
        ids, copies = (np.repeat(np.asarray(filled[name]), len(bands)) for name in ("example_id", "copy"))
        return pa.table({"key": values, "id": ids, "copy": copies, "part": part_of(values, num_parts)})

    def write(part: pa.Table) -> FileEntry:
        found, ids, copies = (np.asarray(part[name]) for name in ("key", "id", "copy"))
        least, other = pairs_to_compare(found, ids, copies, WINDOW)
        place = scratch / "pairs" / f"{bands.start:02d}-{part['part'][0].as_py():05d}.parquet"
        return write_parquet(place, pa.table({"least": least, "other": other}))

    shards = _shards(scratch, keys, ["example_id", "copy", "bands"])
    kept = kept_share(shards, _BAND_BYTES * len(bands) * num_rows)
    return in_folder("pairs", regroup(shards, assign, Round("part", num_parts, write), kept=kept))


_TEXT = -2
"""Instead of the other row of a pair: the n-grams of the row itself."""


def _pair_rows(ids: Ids, others: Ids, grams: pa.ChunkedArray | None, num_parts: int) -> pa.Table:
    lists = pa.nulls(len(ids), _PAIRS.field("grams").type) if grams is None else grams
    return pa.table([ids, others, part_of(ids, num_parts), lists], schema=_PAIRS)


def _with_text(part: pa.Table, num_parts: int) -> pa.Table:
    """Send the n-grams of the smaller row of each pair to the other, and those of each other row to itself."""
    ids, others = np.asarray(part["id"]), np.asarray(part["other"])
    texts = np.flatnonzero(others == _TEXT)
    texts = texts[np.argsort(ids[texts])]
    is_pair = others >= 0
    least, other = distinct(ids[is_pair], others[is_pair])
    needed = np.unique(ids[others == NONE])
    senders = np.concatenate([least, needed])
    place = texts[np.searchsorted(ids[texts], senders)]
    to, sender = np.concatenate([other, needed]), np.concatenate([least, np.full(len(needed), _TEXT)])
    return _pair_rows(to, sender, part["grams"].take(pa.array(place)), num_parts)


def _write_near(folder: Location, part: pa.Table) -> FileEntry | None:
    """Write the edges of the pairs of a part that are near copies; None if it has no pair."""
    ids, others = np.asarray(part["id"]), np.asarray(part["other"])
    pairs = np.flatnonzero(others >= 0)
    if not len(pairs):
        return None
    grams = part["grams"].combine_chunks()
    starts = np.concatenate([[0], np.cumsum(np.asarray(grams.value_lengths()))])
    sets = Grouped(np.asarray(grams.flatten()), starts)
    texts = np.flatnonzero(others == _TEXT)
    own = dict(zip(ids[texts].tolist(), texts.tolist(), strict=True))
    similarity = np.array([jaccard(sets.of(pair), sets.of(own[int(ids[pair])])) for pair in pairs.tolist()])
    near = similarity >= SIMILARITIES[0]
    columns = [others[pairs[near]], ids[pairs[near]], strength_of(similarity[near])]
    name = f"near-{part['part'][0].as_py():05d}.parquet"
    return write_parquet(folder / name, pa.table(columns, schema=EDGES))


def _shards(scratch: Location, entries: list[FileEntry], columns: list[str]) -> Shards:
    return Shards(entries, partial(_read, scratch, columns))


def _read(scratch: Location, columns: list[str], name: str) -> pa.Table:
    return read_parquet(scratch / name, columns)
