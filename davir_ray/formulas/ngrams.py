"""Texts as words, n-grams of words as 64-bit hashes, and near copies by MinHash: what is the same text, written or not.

Arrays of several texts lie one after another: W words, or G n-grams, of T texts; `starts_T1` has the index of the first
of each text, and the end. Two different n-grams have the same hash with a probability of about 2**-64.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import rensa

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

NUM_PERMUTATIONS = 128
"""Number of values of a signature: an estimate of a Jaccard similarity of 0.7 has a standard error of 0.04."""

_BANDS = 32
"""Bands of 4 values: texts with a Jaccard similarity of 0.7 share one with a probability of 1 - (1 - 0.7**4)**32, which
is 0.9998; with one of 0.2 in one of twenty pairs."""

_SLACK = 0.2
"""An estimate further than this below the threshold, five standard errors, is not verified."""

_MAX_PAIRS = 1_000_000
"""Number of pairs, one for each band, that are in memory at a time: where many texts are alike there are very many."""

_SEED = 1

_MAX_KNOWN_WORDS = 1_000_000
"""Number of words whose hashes are kept; about 100 MB."""

_BASE = 0x9E3779B97F4A7C15
"""Base of the polynomial that combines the hashes of words: odd, so that no bit of a word is lost."""

_ASCII_WORD = re.compile("[a-z0-9]+")

_WITHOUT_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003134f"
)
"""Thai, Lao, Burmese, Khmer, kana and Han: their scripts have no spaces between words."""


_LAST_LETTER = 0x323AF
"""The last of Unicode 15, except for selectors of variants, which say nothing."""


def words_of(text: str) -> list[str]:
    """The words of a text without what differs between copies: NFKC, casefold, no punctuation, symbols or white space.

    A word is a run of letters, marks and digits; in scripts without spaces each character is one.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return (_ASCII_WORD if text.isascii() else _word()).findall(text)


@lru_cache(maxsize=1)
def _word() -> re.Pattern[str]:
    """A word in any script; Python's own \\w has no combining marks, which are the vowels of many scripts."""
    is_alone = re.compile(f"[{_WITHOUT_SPACES}]").match

    def kind(point: int) -> str:
        character = chr(point)
        is_part = unicodedata.category(character)[0] in "LMN"
        return "" if not is_part else "alone" if is_alone(character) else "run"

    ranges: dict[str, list[str]] = {"": [], "alone": [], "run": []}
    for found, run in groupby(range(_LAST_LETTER + 1), kind):
        points = list(run)
        ranges[found].append(f"{chr(points[0])}-{chr(points[-1])}")
    return re.compile(f"[{''.join(ranges['run'])}]+|[{''.join(ranges['alone'])}]")


def text_hash(words: Sequence[str]) -> int:
    """63 bits that are the same for the same words."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "big") >> 1


class _WordHashes(dict[str, int]):
    """The 64-bit hash of each word, which is the same in every process."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_KNOWN_WORDS:
            self.clear()
        found = self[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        return found


_word_hashes = _WordHashes()


class Grouped(NamedTuple):
    """Hashes of the words, or of the n-grams, of several texts."""

    hashes_G: Hashes
    starts_T1: Indices

    @property
    def num_texts(self) -> int:
        """Number of texts."""
        return len(self.starts_T1) - 1

    def of(self, text: int) -> Hashes:
        """The hashes of one text."""
        return self.hashes_G[self.starts_T1[text] : self.starts_T1[text + 1]]

    def text_of_each(self) -> Indices:
        """The index of the text of each hash."""
        return np.repeat(np.arange(self.num_texts), np.diff(self.starts_T1))

    def as_sets(self) -> Self:
        """The hashes of each text sorted, each once."""
        texts_G = self.text_of_each()
        order = np.lexsort((self.hashes_G, texts_G))
        hashes_G, texts_G = self.hashes_G[order], texts_G[order]
        is_first_G = np.ones(len(order), bool)
        is_first_G[1:] = (hashes_G[1:] != hashes_G[:-1]) | (texts_G[1:] != texts_G[:-1])
        return type(self)(hashes_G[is_first_G], _starts(texts_G[is_first_G], self.num_texts))


def hashed_words(texts: Iterable[Sequence[str]]) -> Grouped:
    """The hashes of the words of texts, each of which is given as its words."""
    lists = list(texts)
    sizes_T = np.fromiter(map(len, lists), np.int64, len(lists))
    hashes = map(_word_hashes.__getitem__, (word for words in lists for word in words))
    return Grouped(np.fromiter(hashes, np.uint64, int(sizes_T.sum())), np.concatenate([[0], np.cumsum(sizes_T)]))


def windows(words: Grouped, num_words: int) -> tuple[Hashes, Indices]:
    """The hash of every `num_words` words in a row of a text, and the index of the first of them; in order.

    The hash is the polynomial of the words' hashes in _BASE, modulo 2**64.
    """
    hashes_W, num_windows = words.hashes_G, max(0, len(words.hashes_G) - num_words + 1)
    sums_N = np.zeros(num_windows, np.uint64)
    for at in range(num_words):
        sums_N += hashes_W[at : at + num_windows] * np.uint64(pow(_BASE, at, 2**64))
    texts_W = words.text_of_each()
    (firsts,) = np.nonzero(texts_W[:num_windows] == texts_W[num_words - 1 :][:num_windows])
    return sums_N[firsts], firsts


def ngrams(words: Grouped, num_words: int) -> Grouped:
    """The n-grams of each text, in order; a text of fewer words is one n-gram as a whole, an empty one has none."""
    sizes_T = np.diff(words.starts_T1)
    hashes, firsts = windows(words, num_words)
    found = [(words.text_of_each()[firsts], hashes)]
    for size in np.unique(sizes_T[(sizes_T > 0) & (sizes_T < num_words)]).tolist():
        hashes, firsts = windows(words, size)
        texts = np.flatnonzero(sizes_T == size)
        found.append((texts, hashes[np.searchsorted(firsts, words.starts_T1[texts])]))
    texts_G, hashes_G = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(texts_G, kind="stable")
    return Grouped(hashes_G[order], _starts(texts_G, words.num_texts))


def _starts(texts_G: Indices, num_texts: int) -> Indices:
    return np.concatenate([[0], np.cumsum(np.bincount(texts_G, minlength=num_texts))]).astype(np.int64)


def equal_pairs(values_N: npt.NDArray[Any], known_K: npt.NDArray[Any]) -> tuple[Indices, Indices]:
    """Every pair of an index of a value and an index of a known one that is equal to it; the known ones are sorted."""
    first_N, last_N = (np.searchsorted(known_K, values_N, side) for side in ("left", "right"))
    counts_N = last_N - first_N
    within_P = np.arange(counts_N.sum()) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
    return np.repeat(np.arange(len(values_N)), counts_N), np.repeat(first_N, counts_N) + within_P


def jaccard(one_S: Hashes, other_S: Hashes) -> float:
    """Size of the intersection of two sets by that of their union; each set is without repetition, and not empty."""
    shared = len(np.intersect1d(one_S, other_S, assume_unique=True))
    return shared / (len(one_S) + len(other_S) - shared)


def signatures(sets: Grouped) -> npt.NDArray[np.uint32]:
    """The MinHash signature of each text (T, NUM_PERMUTATIONS), which must not be empty; repetitions do not matter.

    Broder, 1997: two signatures agree in a value with a probability that is the Jaccard similarity of the sets.
    """
    if not sets.num_texts:
        return np.empty((0, NUM_PERMUTATIONS), np.uint32)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        sets.hashes_G, sets.starts_T1.tolist(), num_perm=NUM_PERMUTATIONS, seed=_SEED
    )
    return np.array(matrix.to_rows(), np.uint32)


def band_keys(signatures_TP: npt.NDArray[np.uint32]) -> Hashes:
    """A key for each band of each signature (T, bands): texts that share one are probably similar."""
    parts = signatures_TP.astype(np.uint64).reshape(len(signatures_TP), _BANDS, NUM_PERMUTATIONS // _BANDS)
    multipliers = np.array([pow(_BASE, 1 + at, 2**64) for at in range(parts.shape[-1])], np.uint64)
    bands = np.arange(_BANDS, dtype=np.uint64) * np.uint64(pow(_BASE, 1 + parts.shape[-1], 2**64))
    return np.asarray((parts * multipliers).sum(axis=-1, dtype=np.uint64) + bands)


class Copies(NamedTuple):
    """Pairs of near copies."""

    texts_N: Indices
    """Index of the text that was looked up."""
    known_N: Indices
    """Index of the known text that it is a near copy of."""
    jaccard_N: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class KnownTexts:
    """Sets of n-grams among which near copies are looked for; arrays only, so that processes can share them."""

    sets: Grouped
    signatures_TP: npt.NDArray[np.uint32]
    keys_K: Hashes
    """The keys of all bands, sorted."""
    texts_K: Indices
    """The text of each key."""
    threshold: float

    @classmethod
    def of(cls, grams: Grouped, threshold: float) -> Self:
        """The known texts; one without n-grams is never found."""
        sets = grams.as_sets()
        (filled,) = np.nonzero(np.diff(sets.starts_T1))
        signatures_TP = np.zeros((sets.num_texts, NUM_PERMUTATIONS), np.uint32)
        signatures_TP[filled] = signatures(_without_empty(sets))
        keys_K = band_keys(signatures_TP[filled]).ravel()
        order = np.argsort(keys_K)
        texts_K = np.repeat(filled, _BANDS)[order]
        return cls(sets=sets, signatures_TP=signatures_TP, keys_K=keys_K[order], texts_K=texts_K, threshold=threshold)

    def copies(self, grams: Grouped) -> Copies:
        """Every pair of one of these texts and a known one whose Jaccard similarity is at least the threshold.

        MinHash finds the candidates, and misses about one of 6,000 that are just at a threshold of 0.7; whether they
        are near copies is decided by the sets themselves.
        """
        (filled,) = np.nonzero(np.diff(grams.starts_T1))
        signatures_QP = signatures(_without_empty(grams))
        keys_QB = band_keys(signatures_QP)
        counts_QB = np.searchsorted(self.keys_K, keys_QB, "right") - np.searchsorted(self.keys_K, keys_QB)
        part_Q = np.cumsum(counts_QB.sum(axis=1)) // _MAX_PAIRS
        found = [Copies(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
        for part in np.unique(part_Q[counts_QB.any(axis=1)]).tolist():
            (queries,) = np.nonzero(part_Q == part)
            bands, keys = equal_pairs(keys_QB[queries].ravel(), self.keys_K)
            pairs = np.unique(np.stack([queries[bands // _BANDS], self.texts_K[keys]], axis=1), axis=0)
            agreeing = (signatures_QP[pairs[:, 0]] == self.signatures_TP[pairs[:, 1]]).mean(axis=1)
            found.append(self._verified(grams, filled, pairs[agreeing >= self.threshold - _SLACK]))
        return Copies(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _verified(self, grams: Grouped, filled: Indices, pairs: Indices) -> Copies:
        """The pairs of an index in `filled` and a known text that are near copies."""
        own = {query: np.unique(grams.of(int(filled[query]))) for query in np.unique(pairs[:, 0]).tolist()}
        exact = np.array([jaccard(own[query], self.sets.of(known)) for query, known in pairs.tolist()], np.float64)
        near = exact >= self.threshold
        return Copies(filled[pairs[near, 0]], pairs[near, 1], exact[near])


def _without_empty(grams: Grouped) -> Grouped:
    """The texts that have n-grams; the others have no hashes to drop."""
    return Grouped(grams.hashes_G, np.unique(grams.starts_T1))
