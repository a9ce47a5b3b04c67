"""Evaluation sets → the words in a row that no example may share with them.

The rule of GPT-3 (Brown et al., 2020, appendix C), which the field has kept: 13 words in a row, normalised (see
davir_ray.formulas.ngrams). Each string of a record is a text of its own, because data sets name and order their columns
differently. A string of 8 to 12 words is looked for as a whole, as NeMo Curator does; fewer words occur by chance.

GPT-3 ignores n-grams that occur in more than ten documents of the training data. Here, those that occur in more than
ten records of the evaluation set are ignored: these are its own frame, such as an instruction above each question. A
question that occurs in the pool eleven times is more of a leak, not less, and to count them takes a second scan.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from davir_ray.config.sources import Source
from davir_ray.data.files import Slice, SourceFile, digests_of, list_files
from davir_ray.data.own_text import texts_of
from davir_ray.data.records import Record, Reject, read_records
from davir_ray.errors import DataError
from davir_ray.formulas.ngrams import Grouped, Hashes, Indices, equal_pairs, hashed_words, windows, words_of
from davir_ray.run.location import Location

NUM_WORDS = 13
MIN_WORDS = 8
"""A string of fewer words is not looked for."""
MAX_RECORDS = 10
"""Words in a row that occur in more records of an evaluation set are its frame, and are not looked for."""

_VERSION = 1
"""To be increased when other rows may match."""

_CHUNK_RECORDS = 1000

_FILTER_SHARE = 8
"""Entries of the filter for each hash: about one in eight of other hashes passes it."""


class EvaluationSet(NamedTuple):
    """One evaluation set and its files."""

    name: str
    """The path as it was given."""
    files: list[SourceFile]


def list_evaluation_sets(paths: Iterable[str], written: Sequence[Location] = ()) -> list[EvaluationSet]:
    """The evaluation sets at these paths, each a file, folder, glob or hub name; see list_files."""
    return [EvaluationSet(path, list_files(Source(name=path, path=path), written)) for path in paths]


def decontamination(sets: Sequence[EvaluationSet]) -> dict[str, Any]:
    """What the matches depend on, for a fingerprint; empty without evaluation sets."""
    rule = [_VERSION, NUM_WORDS, MIN_WORDS, MAX_RECORDS]
    return {"decontaminate": {"rule": rule, "files": [digests_of(one.files) for one in sets]}} if sets else {}


class Match(NamedTuple):
    """A row that shares words in a row with evaluation sets."""

    sets: list[str]
    """Names of all these sets."""
    detail: str
    """The first words that are shared, and the record that they are of."""


@dataclass(frozen=True, kw_only=True)
class EvaluationWords:
    """What is looked for, as hashes: arrays and names only, so that processes can share it."""

    hashes_H: Hashes
    """Of the words in a row, sorted; those of several sets have a hash for each."""
    records_H: npt.NDArray[np.int32]
    """The first record of the set that has them."""
    lengths: tuple[int, ...]
    """Numbers of words in a row that occur."""
    passes_F: npt.NDArray[np.bool_]
    """Whether a hash that begins with these bits may be among those that are looked for."""
    names: tuple[str, ...]
    """Names of the sets."""
    sets_R: npt.NDArray[np.int32]
    """The set of each record."""
    places: tuple[str, ...]
    """The file and row of each record."""
    counts: dict[str, dict[str, int]]
    """For each set: `records`; of them `too_short`, which have no string of MIN_WORDS words, and `only_common`, which
    have only what occurs in more than MAX_RECORDS records; `ngrams`, and of them `common`, which are not looked for."""

    @classmethod
    def read(cls, sets: Sequence[EvaluationSet]) -> Self:
        """Read evaluation sets. Raises DataError for a record that cannot be read: it could not be looked for."""
        hashes, records, lengths, set_of, places = [], [], set[int](), list[int](), list[str]()
        counts: dict[str, dict[str, int]] = {}
        for number, one in enumerate(sets):
            first = len(places)
            found = [(np.empty(0, np.uint64), np.empty(0, np.int64))]
            for chunk in _chunks(one):
                found += _of_records(chunk, len(places), lengths)
                places += [f"{record.source_file} row {record.source_row}" for record in chunk]
            set_of += [number] * (len(places) - first)
            own_hashes, own_records, counts[one.name] = _without_common(found, len(places) - first)
            hashes.append(own_hashes)
            records.append(own_records)
        all_hashes = np.concatenate([np.empty(0, np.uint64), *hashes])
        order = np.argsort(all_hashes, kind="stable")
        hashes_H = all_hashes[order]
        num_bits = max(1, len(hashes_H) * _FILTER_SHARE - 1).bit_length()
        passes_F = np.zeros(2**num_bits, np.bool_)
        passes_F[hashes_H >> np.uint64(64 - num_bits)] = True
        return cls(
            hashes_H=hashes_H,
            records_H=np.concatenate([np.empty(0, np.int64), *records])[order].astype(np.int32),
            lengths=tuple(sorted(lengths)),
            passes_F=passes_F,
            names=tuple(one.name for one in sets),
            sets_R=np.array(set_of, np.int32),
            places=tuple(places),
            counts=counts,
        )

    def find(self, rows: Sequence[Sequence[str]]) -> dict[int, Match]:
        """The rows, each given as its texts, that share words with an evaluation set, by index."""
        row_of_text = [row for row, texts in enumerate(rows) for _ in texts]
        words = [words_of(text) for texts in rows for text in texts]
        hashed = hashed_words(words)
        text_of_word = hashed.text_of_each()
        matches: dict[int, list[tuple[int, int, int]]] = {}
        """For each row the first word, the number of words and the index of the hash of what is shared."""
        for length in self.lengths:
            for place, number in self._found(*windows(hashed, length)):
                matches.setdefault(row_of_text[text_of_word[place]], []).append((place, length, number))
        found = {}
        for row, shared in sorted(matches.items()):
            place, length, number = min(shared)
            text, record = int(text_of_word[place]), self.records_H[number]
            at = place - int(hashed.starts_T1[text])
            where = f"{self.places[record]} of {self.names[self.sets_R[record]]}"
            sets = {int(self.sets_R[self.records_H[number]]) for _, _, number in shared}
            found[row] = Match(
                sets=[self.names[one] for one in sorted(sets)],
                detail=f"{length} words with {where}: {' '.join(words[text][at : at + length])}",
            )
        return found

    def _found(self, hashes_N: Hashes, places_N: Indices) -> list[tuple[int, int]]:
        """The places of hashes that are looked for, each with the indices of that hash here."""
        num_bits = len(self.passes_F).bit_length() - 1
        (likely,) = np.nonzero(self.passes_F[hashes_N >> np.uint64(64 - num_bits)])
        values, numbers = equal_pairs(hashes_N[likely], self.hashes_H)
        return list(zip(places_N[likely[values]].tolist(), numbers.tolist(), strict=True))


def _chunks(one: EvaluationSet) -> Iterable[list[Record]]:
    chunk: list[Record] = []
    for file in one.files:
        for item in read_records(Slice(file)):
            if isinstance(item, Reject):
                raise DataError(
                    f"{file.uri} row {item.source_row} cannot be read ({item.reason}: {item.detail}), so that it could "
                    "not be looked for in the data; correct the file, or leave it out of --decontaminate"
                )
            chunk.append(item)
            if len(chunk) == _CHUNK_RECORDS:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _of_records(records: list[Record], first: int, lengths: set[int]) -> list[tuple[Hashes, Indices]]:
    """The hashes of what is looked for of some records, the first of which has this index, and the record of each.

    Their numbers of words are added to `lengths`.
    """
    texts = [(first + at, words_of(text)) for at, record in enumerate(records) for text in texts_of(record.fields)]
    found = []
    for length in range(MIN_WORDS, NUM_WORDS + 1):
        long_enough = [
            (record, words)
            for record, words in texts
            if len(words) == length or (length == NUM_WORDS and len(words) > length)
        ]
        if long_enough:
            hashed: Grouped = hashed_words(words for _, words in long_enough)
            hashes, places = windows(hashed, length)
            record_of_text = np.array([record for record, _ in long_enough])
            found.append((hashes, record_of_text[hashed.text_of_each()[places]]))
            lengths.add(length)
    return found


def _without_common(
    found: Sequence[tuple[Hashes, Indices]], num_records: int
) -> tuple[Hashes, Indices, dict[str, int]]:
    """Each hash once, with the first of its records, without those of more than MAX_RECORDS; and the set's counts."""
    hashes, records = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((records, hashes))
    hashes, records = hashes[order], records[order]
    is_new = np.ones(len(hashes), bool)  # a hash and record
    is_new[1:] = (hashes[1:] != hashes[:-1]) | (records[1:] != records[:-1])
    hashes, records = hashes[is_new], records[is_new]
    _, firsts, counts = np.unique(hashes, return_index=True, return_counts=True)
    is_kept = counts <= MAX_RECORDS
    num_long_enough = len(np.unique(records))
    num_looked_for = len(np.unique(records[np.repeat(is_kept, counts)]))
    return hashes[firsts[is_kept]], records[firsts[is_kept]], {
        "records": num_records,
        "too_short": num_records - num_long_enough,
        "only_common": num_long_enough - num_looked_for,
        "ngrams": len(firsts),
        "common": int((~is_kept).sum()),
    }  # fmt: skip
