"""Components are dealt whole, in equal shares of each stratum."""

from collections import Counter
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest

from davir_ray.formulas.dealing import Dealt, by_stratum, deal, shares

Ints = npt.NDArray[np.int64]
STRATA = 5


def rows_of(seed: int, num_single: int, num_several: int) -> tuple[Ints, Ints]:
    """Labels and strata of single rows, of which the last stratum has few, and of components of 2 to 6 rows."""
    draw = np.random.default_rng(seed)
    labels = draw.choice(2**62, num_single + num_several, replace=False)
    labels = np.concatenate([labels[:num_single], np.repeat(labels[num_single:], draw.integers(2, 7, num_several))])
    return labels, draw.choice(STRATA, len(labels), p=[0.4, 0.3, 0.2, 0.09, 0.01])


def dealt(labels: Ints, strata: Ints, num_folds: int, anchor: float = 0.0) -> tuple[Dealt, Ints]:
    """What is dealt, and the rows of each fold in each stratum, counted row by row."""
    shares_F = shares(num_folds, anchor)
    found = deal(*by_stratum(labels, strata), shares_F, np.zeros((len(shares_F), STRATA)))
    fold_of = dict(zip(found.labels_C.tolist(), found.folds_C.tolist(), strict=True))
    counted = Counter(
        (fold_of[label], stratum) for label, stratum in zip(labels.tolist(), strata.tolist(), strict=True)
    )
    counts = [[counted[fold, stratum] for stratum in range(STRATA)] for fold in range(len(shares_F))]
    return found, np.array(counts)


@pytest.mark.parametrize("num_folds", [2, 3, 7])
@pytest.mark.parametrize("num_several", [0, 100])
def test_folds_have_the_same_number_of_rows_of_each_stratum(num_folds: int, num_several: int) -> None:
    found, counts = dealt(*rows_of(num_folds, 2000, num_several), num_folds)
    np.testing.assert_array_equal(found.loads_FS, counts)
    spread = np.ptp(counts, axis=0)
    assert spread.max() <= (1 if num_several == 0 else 2)
    assert spread[:3].max() <= 1, "single rows make up for what components leave uneven"
    assert np.ptp(counts.sum(axis=1)) <= 2


def test_the_order_of_the_rows_changes_nothing() -> None:
    labels, strata = rows_of(3, 500, 60)
    first, _ = dealt(labels, strata, 5)
    order = np.random.default_rng(0).permutation(len(labels))
    again, _ = dealt(labels[order], strata[order], 5)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_seed_is_another_deal() -> None:
    """As good as the first, and independent of it: about a third of the rows stay in their fold."""
    labels, strata = rows_of(3, 2000, 100)
    shares_F, empty_FS = shares(3, 0.0), np.zeros((3, STRATA))
    deals = [deal(*by_stratum(labels, strata), shares_F, empty_FS, seed=seed) for seed in (0, 1, 2)]
    for found in deals:
        fold_of = dict(zip(found.labels_C.tolist(), found.folds_C.tolist(), strict=True))
        folds = np.array([fold_of[label] for label in labels.tolist()])
        counts = np.array([np.bincount(strata[folds == fold], minlength=STRATA) for fold in range(3)])
        assert np.ptp(counts, axis=0).max() <= 2
    for one, other in combinations(deals, 2):
        assert 0.28 < (one.folds_C == other.folds_C).mean() < 0.39


def test_large_components_go_to_different_folds() -> None:
    labels = np.concatenate([np.repeat([7, 8, 9], [60, 50, 40]), np.arange(100, 250)])
    found, counts = dealt(labels, np.zeros(300, np.int64), 3)
    assert len(set(found.folds_C[:3].tolist())) == 3
    assert counts.sum(axis=1).tolist() == [100, 100, 100]


@pytest.mark.parametrize("num_several", [0, 2, 40])
def test_there_need_be_no_single_rows(num_several: int) -> None:
    labels = np.repeat(np.arange(num_several), 3)
    _, counts = dealt(labels, np.zeros(len(labels), np.int64), 2)
    assert counts.sum(axis=1).tolist() == [num_several // 2 * 3] * 2


def test_rows_that_were_dealt_before_are_made_up_for() -> None:
    labels = np.arange(1000)
    before = np.array([[300.0], [0.0], [100.0]])
    found = deal(*by_stratum(labels, np.zeros(1000, np.int64)), shares(3, 0.0), before)
    sizes = np.bincount(found.folds_C) + before[:, 0]
    assert sizes.sum() == 1400
    assert np.ptp(sizes) <= 1


def test_the_anchor_has_its_share() -> None:
    _, counts = dealt(*rows_of(4, 2000, 100), 4, anchor=0.1)
    rows = counts.sum(axis=1) / counts.sum()
    np.testing.assert_allclose(rows, [0.225] * 4 + [0.1], atol=0.002)


def test_single_rows_are_not_dealt_in_the_order_of_their_ids() -> None:
    found, _ = dealt(np.arange(1000), np.zeros(1000, np.int64), 2)
    folds = found.folds_C.astype(bool)
    assert 400 < (folds[1:] != folds[:-1]).sum() < 600, "neighbours share a fold as often as by chance"
    assert 200 < folds[:500].sum() < 300
