"""Which copies of a row are left out, in whatever order the copies arrive."""

import numpy as np
import pyarrow as pa
import pytest

from davir_ray.stages.select.duplicates import _later_copies

FIRST_RANKS = np.array([1, 4, 8])
"""Of three files of ranked/."""


@pytest.mark.parametrize("seed", range(5))
def test_all_copies_but_the_highest_ranked_are_left_out_in_any_order(seed: int) -> None:
    ranks = np.array([2, 3, 4, 5, 7, 8, 11])
    hashes = np.array([70, 50, 50, 90, 70, 50, 60])
    order = np.random.default_rng(seed).permutation(len(ranks))
    found = _later_copies(pa.table({"rank": ranks[order], "content_hash": hashes[order]}), FIRST_RANKS)
    assert sorted(zip(*(found[name].to_pylist() for name in ("rank", "bin")), strict=True)) == [(4, 1), (7, 1), (8, 2)]


def test_a_group_without_copies_stands_in_no_file() -> None:
    found = _later_copies(pa.table({"rank": [3, 2], "content_hash": [50, 70]}), FIRST_RANKS)
    assert found.to_pylist() == []
