"""N-grams and near copies are those of sets of tuples of words, which a loop finds."""

import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from davir_ray.formulas import ngrams as module
from davir_ray.formulas.ngrams import (
    Grouped,
    KnownTexts,
    hashed_words,
    jaccard,
    ngrams,
    signatures,
    text_hash,
    windows,
    words_of,
)

Texts = list[list[str]]
TEXTS = st.lists(st.lists(st.sampled_from("abcd"), max_size=9), max_size=6)


def tuples(words: list[str], num_words: int) -> list[tuple[str, ...]]:
    """Every n-gram by a loop; a shorter text is one."""
    found = [tuple(words[at : at + num_words]) for at in range(len(words) - num_words + 1)]
    return found or [tuple(words)] * bool(words)


def share(one: list[str], other: list[str], num_words: int = 5) -> float:
    """The Jaccard similarity of two texts, of Python's sets."""
    first, second = set(tuples(one, num_words)), set(tuples(other, num_words))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don’t  stop,\n(now)! ", ["don", "t", "stop", "now"]),
        ("don't_stop -- NOW", ["don", "t", "stop", "now"]),
        ("ﬁne ２０ x²", ["fine", "20", "x2"]),  # ligature, wide digits, superscript
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are marks
        ("e\u0301t\u00e9", ["\u00e9t\u00e9"]),
        ("今日は3月 OK", [*"今日は", "3", "月", "ok"]),
        ("สวัสดี", list("สวัสดี")),
        ("カー・サン฿", list("カーサン")),
        ("한국어 문장", ["한국어", "문장"]),
        (" …—! ", []),
        ("", []),
    ],
)
def test_words_are_without_what_differs_between_copies(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_ascii_and_other_text_are_cut_by_one_rule(text: str) -> None:
    ascii_text = text.encode("ascii", "ignore").decode()
    assert words_of(ascii_text) == [word for word in words_of(f"{ascii_text} é") if word != "é"]


@given(TEXTS, st.integers(1, 6))
def test_n_grams_are_those_of_a_loop(texts: Texts, num_words: int) -> None:
    found = ngrams(hashed_words(texts), num_words)
    expected = [tuples(words, num_words) for words in texts]
    assert np.diff(found.starts_T1).tolist() == [len(grams) for grams in expected]
    hash_of: dict[tuple[str, ...], int] = {}
    for gram, value in zip((gram for grams in expected for gram in grams), found.hashes_G.tolist(), strict=True):
        assert hash_of.setdefault(gram, value) == value
    assert len(set(hash_of.values())) == len(hash_of)
    for text, grams in enumerate(expected):
        assert found.as_sets().of(text).tolist() == sorted(hash_of[gram] for gram in set(grams))


@given(TEXTS, st.integers(1, 6))
def test_windows_begin_where_the_loop_finds_them_and_none_spans_two_texts(texts: Texts, num_words: int) -> None:
    hashes, firsts = windows(hashed_words(texts), num_words)
    starts = np.cumsum([0, *map(len, texts)])
    expected = [
        starts[text] + at for text, words in enumerate(texts) for at in range(max(0, len(words) - num_words + 1))
    ]
    assert firsts.tolist() == expected
    assert len(hashes) == len(firsts)


def test_hashes_are_the_same_in_every_process() -> None:
    program = (
        "from davir_ray.formulas.ngrams import *;"
        "grams = ngrams(hashed_words([list('abcdefg')]), 5);"
        "print(grams.hashes_G.tolist(), text_hash(list('ab')), int(signatures(grams).sum()))"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "12"
    )  # fmt: skip
    assert first == second != ""


def test_the_hash_of_a_text_is_of_its_words_and_their_order() -> None:
    texts = [["a", "b"], ["b", "a"], ["ab"], ["a", "b", "b"], []]
    assert len({text_hash(words) for words in texts}) == len(texts)
    assert all(0 <= text_hash(words) < 2**63 for words in texts)


@given(st.sets(st.integers(0, 2**64 - 1), min_size=1), st.sets(st.integers(0, 2**64 - 1), min_size=1))
def test_jaccard_is_that_of_pythons_sets(one: set[int], other: set[int]) -> None:
    arrays = (np.array(sorted(values), np.uint64) for values in (one, other))
    assert jaccard(*arrays) == len(one & other) / len(one | other)


def varied(draw: random.Random, num_texts: int) -> Texts:
    """Texts, and copies of them with a few words changed."""
    found: Texts = []
    for _ in range(num_texts):
        words = [f"w{draw.randrange(500)}" for _ in range(draw.randrange(1, 80))]
        for _ in range(draw.randrange(4)):
            words[draw.randrange(len(words))] = f"w{draw.randrange(500)}"
            found.append(list(words))
        found.append(words)
    return [*found, [], ["one"], ["one", "two"], ["one"]]


@pytest.mark.parametrize("seed", range(3))
def test_near_copies_are_those_of_all_pairs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = varied(random.Random(seed), 150)
    random.Random(seed).shuffle(texts)
    known, looked_up = texts[::2], texts[1::2]
    expected = {
        (query, number): share(one, other)
        for query, one in enumerate(looked_up)
        for number, other in enumerate(known)
        if one and other and share(one, other) >= 0.7
    }
    index = KnownTexts.of(ngrams(hashed_words(known), 5), 0.7)
    found = index.copies(ngrams(hashed_words(looked_up), 5))
    pairs = list(zip(found.texts_N.tolist(), found.known_N.tolist(), strict=True))
    assert dict(zip(pairs, found.jaccard_N.tolist(), strict=True)) == expected
    assert len(pairs) == len(expected) > 20
    monkeypatch.setattr(module, "_MAX_PAIRS", 40)
    few = index.copies(ngrams(hashed_words(looked_up), 5))
    assert [part.tolist() for part in few] == [part.tolist() for part in found]
    assert min(expected.values()) < 0.8


def test_a_similarity_below_the_threshold_is_no_copy_whatever_the_bands_say() -> None:
    """Of n-grams that are mostly shared, many bands are equal: the sets decide."""
    words = [f"w{number}" for number in range(104)]
    other = [*words[:84], *(f"x{number}" for number in range(20))]  # 80 of 120 n-grams
    index = KnownTexts.of(ngrams(hashed_words([words]), 5), 0.7)
    assert share(words, other) == pytest.approx(80 / 120)
    assert len(index.copies(ngrams(hashed_words([other]), 5)).texts_N) == 0
    index = KnownTexts.of(ngrams(hashed_words([words]), 5), 0.6)
    assert index.copies(ngrams(hashed_words([other]), 5)).jaccard_N.tolist() == [80 / 120]


def test_many_equal_texts_are_all_found_with_few_of_their_pairs_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_PAIRS", 50_000)
    equal = [[f"w{number}" for number in range(9)]] * 200
    index = KnownTexts.of(ngrams(hashed_words(equal), 5), 0.7)
    tracemalloc.start()
    found = index.copies(ngrams(hashed_words(equal), 5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.texts_N) == 200 * 200
    assert set(found.jaccard_N.tolist()) == {1.0}
    assert peak < 200 * 200 * 32 * 16  # a pair of indices for each band


def test_signatures_estimate_the_similarity() -> None:
    words = [f"w{number}" for number in range(804)]
    estimates, exact = [], []
    for shift in range(0, 400, 20):
        pair = [words[:400], words[shift : shift + 400]]
        one, other = signatures(ngrams(hashed_words(pair), 5))
        estimates.append((one == other).mean())
        exact.append(share(*pair))
    assert np.abs(np.array(estimates) - exact).max() < 5 * np.sqrt(0.25 / 128)
    assert np.corrcoef(estimates, exact)[0, 1] > 0.98


def test_nothing_is_found_among_nothing() -> None:
    nothing = ngrams(hashed_words([]), 5)
    some = ngrams(hashed_words([["a"] * 9]), 5)
    for known, looked_up in ((nothing, some), (some, nothing), (Grouped(some.hashes_G[:0], np.zeros(3, int)), some)):
        assert len(KnownTexts.of(known, 0.7).copies(looked_up).texts_N) == 0
