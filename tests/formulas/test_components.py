"""Components of copies: against a search from row to row that the test writes out."""

from collections import Counter, defaultdict
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from davir_ray.formulas.components import (
    CUTS,
    Edges,
    Strength,
    connected,
    cut_components,
    large_star,
    pairs_to_compare,
    small_star,
    stars,
    strength_of,
)


def ids_of(draw: np.random.Generator, number: int) -> Any:
    return draw.choice(2**62, number, replace=False)


def random_edges(seed: int, num_rows: int = 60, num_edges: int = 50) -> Edges:
    """Rows in random order of ids, and chains among them."""
    draw = np.random.default_rng(seed)
    ids = ids_of(draw, num_rows)
    chain = np.stack([ids[:15], ids[1:16]])
    ends = np.concatenate([chain, ids[draw.integers(0, num_rows, (2, num_edges))]], axis=1)
    ends = np.sort(ends[:, ends[0] != ends[1]], axis=0)
    return Edges(ends[0], ends[1], draw.integers(0, len(Strength), ends.shape[1]).astype(np.int8))


def found_by_search(pairs: Any) -> dict[int, int]:
    """The smallest id that can be reached from each."""
    neighbours = defaultdict(set)
    for one, other in pairs:
        neighbours[int(one)].add(int(other))
        neighbours[int(other)].add(int(one))
    labels: dict[int, int] = {}
    for start in sorted(neighbours):
        waiting = [start]
        while waiting:
            if (row := waiting.pop()) not in labels:
                labels[row] = start
                waiting += neighbours[row]
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_components_are_those_that_a_search_finds(seed: int) -> None:
    edges = random_edges(seed)
    found = connected(edges)
    assert dict(zip(found.ids_V.tolist(), found.labels_V.tolist(), strict=True)) == found_by_search(
        zip(edges.least_E, edges.other_E, strict=True)
    )
    assert len(set(found.labels_V.tolist())) > 1


def test_no_edges_have_no_components() -> None:
    nothing = np.empty(0, np.int64)
    found = cut_components(Edges(nothing, nothing, nothing.astype(np.int8)), 10)
    assert (len(found.rows.ids_V), found.num_cut, found.num_too_large) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_stars_by_turns_end_with_the_smallest_row_of_each_component(seed: int) -> None:
    edges = random_edges(seed)
    expected = found_by_search(zip(edges.least_E, edges.other_E, strict=True))
    one, other = edges.least_E, edges.other_E
    for _ in range(10):
        before = one.tolist(), other.tolist()
        one, other = small_star(*large_star(np.concatenate([one, other]), np.concatenate([other, one])))
        if (one.tolist(), other.tolist()) == before:
            break
    assert (one.tolist(), other.tolist()) == before
    assert dict(zip(one.tolist(), other.tolist(), strict=True)) == {
        row: label for row, label in expected.items() if row != label
    }


def test_equal_keys_make_stars() -> None:
    draw = np.random.default_rng(1)
    keys, ids = draw.integers(0, 12, 50), ids_of(draw, 50)
    least, index, rows = stars(keys, ids)
    found = Counter(zip(least.tolist(), ids[index].tolist(), rows.tolist(), strict=True))
    expected: Counter[tuple[int, int, int]] = Counter()
    for key in range(12):
        of_key = sorted(ids[keys == key].tolist())
        expected.update((of_key[0], other, len(of_key)) for other in of_key[1:])
    assert found == expected


@pytest.mark.parametrize("window", [1, 3, 100])
def test_rows_of_a_key_are_compared_with_those_before_them_and_copies_with_none(window: int) -> None:
    draw = np.random.default_rng(2)
    ids = ids_of(draw, 40)
    copies = draw.integers(0, 25, 40)  # of a row, the same in each key
    keys, rows = np.divmod(np.arange(120), 40)
    rows = rows[draw.random(120) < 0.7] if window == 3 else rows
    keys = keys[: len(rows)]
    least, other = pairs_to_compare(keys, ids[rows], copies[rows], window)
    expected = set()
    for key in range(3):
        smallest: dict[int, int] = {}
        for row in set(rows[keys == key].tolist()):
            copy = int(copies[row])
            smallest[copy] = min(smallest.get(copy, 2**63), int(ids[row]))
        ordered = sorted(smallest.values())
        expected |= {(ordered[i], ordered[j]) for i, j in combinations(range(len(ordered)), 2) if j - i <= window}
    assert sorted(zip(least.tolist(), other.tolist(), strict=True)) == sorted(expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_rows", [2, 5, 12, 100])
def test_what_is_too_large_keeps_its_stronger_edges_only(seed: int, max_rows: int) -> None:
    edges = random_edges(seed)
    found = cut_components(edges, max_rows)
    expected: dict[int, int] = {}
    rows = set(np.concatenate(edges[:2]).tolist())
    pairs = list(zip(*(values.tolist() for values in edges), strict=True))
    num_cut = 0
    for level in CUTS:
        pairs = [pair for pair in pairs if pair[2] >= level and pair[0] in rows]
        labels = found_by_search((one, other) for one, other, _ in pairs)
        sizes = Counter(labels.values())
        large = {label for label, size in sizes.items() if size > max_rows}
        if level == 0:
            num_cut = len(large)
        for row, label in labels.items():
            if label not in large or level == CUTS[-1]:
                expected[row] = label
        rows = {row for row, label in labels.items() if label in large}
    assert dict(zip(found.rows.ids_V.tolist(), found.rows.labels_V.tolist(), strict=True)) == expected
    assert (found.num_cut, found.num_too_large) == (num_cut, len(large))


def test_a_similarity_has_the_strength_of_the_bound_that_it_reaches() -> None:
    found = strength_of(np.array([0.7, 0.79, 0.8, 0.89, 0.9, 0.99]))
    names = (Strength.NEAR, Strength.NEARER, Strength.NEAREST)
    assert found.tolist() == [name for name in names for _ in range(2)]
