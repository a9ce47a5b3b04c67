"""Components dealt to folds: whole, in equal shares, and with equal shares of each stratum.

Shape letters: N entries, C components, F folds, S strata. A share may differ between folds: the anchor's is its own.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from davir_ray.formulas.hashing import Ids, random_keys, seed_from

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_ROUNDING = 1e-6
"""Rows below which two loads are equal: sums of shares are not exact."""


class Dealt(NamedTuple):
    """The fold of each component."""

    labels_C: Ids
    """Sorted."""
    folds_C: Counts
    loads_FS: Floats
    """Rows of each fold in each stratum, with those that were there before."""


def shares(num_folds: int, anchor: float) -> Floats:
    """The share of the rows of each fold, and last that of the anchor, if there is one."""
    folds_F = np.full(num_folds, (1 - anchor) / num_folds)
    return np.append(folds_F, anchor) if anchor > 0 else folds_F


def by_stratum(labels_M: Ids, strata_M: Ids) -> tuple[Ids, Ids, Counts]:
    """The label and the stratum of each entry, sorted, and its number of rows, from those of M rows."""
    order = np.lexsort((strata_M, labels_M))
    labels, strata = labels_M[order], strata_M[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (labels[1:] != labels[:-1]) | (strata[1:] != strata[:-1])
    (starts,) = np.nonzero(is_first)
    return labels[starts], strata[starts], np.diff(np.append(starts, len(order)))


def deal(
    labels_N: Ids, strata_N: Counts, rows_N: Counts, shares_F: Floats, loads_FS: Floats, *, seed: int = 0
) -> Dealt:
    """Deal components, given by their rows in each stratum (see by_stratum), to folds with these loads.

    Components of several rows come first, the largest first, each to the fold that has the least of its strata. Single
    rows fill up, stratum by stratum: the loads then differ by at most one row, if there are enough of them. The order
    and ties follow hashes of the labels and the seed, so that the result depends on the set of entries alone.
    """
    labels_C, component_N = np.unique(labels_N, return_inverse=True)
    sizes_C = np.bincount(component_N, weights=rows_N, minlength=len(labels_C)).astype(np.int64)
    keys_C, num_folds = random_keys(labels_C, _seed(seed)), len(shares_F)
    folds_C, loads_FS, totals_F = np.zeros(len(labels_C), np.int64), loads_FS.copy(), loads_FS.sum(axis=1)
    by_component = np.argsort(component_N, kind="stable")
    starts_C = np.searchsorted(component_N[by_component], np.arange(len(labels_C) + 1))
    (several,) = np.nonzero(sizes_C > 1)
    for component in several[np.lexsort((keys_C[several], -sizes_C[several]))].tolist():
        entries = by_component[starts_C[component] : starts_C[component + 1]]
        strata, rows = strata_N[entries], rows_N[entries]
        cost_F = (loads_FS[:, strata] + rows) @ rows / shares_F
        fold = _order(cost_F, totals_F / shares_F, int(keys_C[component] % np.uint64(num_folds)))[0]
        folds_C[component] = fold
        loads_FS[fold, strata] += rows
        totals_F[fold] += sizes_C[component]
    (singles,) = np.nonzero(sizes_C[component_N] == 1)
    singles = singles[np.lexsort((keys_C[component_N[singles]], strata_N[singles]))]
    filled, starts = np.unique(strata_N[singles], return_index=True)
    totals_F -= loads_FS[:, filled].sum(axis=1)  # only what is filled up says which fold has the most
    for stratum, start, end in zip(filled.tolist(), starts, [*starts[1:], len(singles)], strict=False):
        components = component_N[singles[start:end]]
        quotas_F = _quotas(len(components), loads_FS[:, stratum], shares_F, totals_F, stratum)
        folds_C[components] = np.repeat(np.arange(num_folds), quotas_F)
        loads_FS[:, stratum] += quotas_F
        totals_F += loads_FS[:, stratum]
    return Dealt(labels_C, folds_C, loads_FS)


def _seed(seed: int) -> int:
    """The seed of the hashes; 0 deals as versions did that had no seed."""
    return seed_from("folds", seed) if seed else seed_from("folds")


def _quotas(num_rows: int, loads_F: Floats, shares_F: Floats, totals_F: Floats, first: int) -> Counts:
    """How many rows of a stratum each fold gets so that its loads come as near to the shares as they can."""
    by_level = np.argsort(loads_F / shares_F, kind="stable")
    levels_F = (loads_F / shares_F)[by_level]
    # With the n emptiest folds filled up to the same level, the level must not reach the next fold's.
    filled_F = (num_rows + np.cumsum(loads_F[by_level])) / np.cumsum(shares_F[by_level])
    (enough,) = np.nonzero(filled_F <= np.append(levels_F[1:], np.inf))
    wanted_F = np.maximum(0.0, filled_F[enough[0]] * shares_F - loads_F)
    quotas_F: Counts = np.floor(wanted_F + _ROUNDING).astype(np.int64)
    fractions_F = wanted_F - quotas_F
    for fold in _order(-fractions_F, totals_F / shares_F, first)[: num_rows - quotas_F.sum()]:
        quotas_F[fold] += 1
    return quotas_F


def _order(cost_F: Floats, level_F: Floats, first: int) -> Counts:
    """The folds by cost; then by all their rows, so that what is left of many strata does not add up; then in turn."""
    turn_F = (np.arange(len(cost_F)) - first) % len(cost_F)
    rounded = (np.round(values / _ROUNDING).astype(np.int64) for values in (level_F, cost_F))
    return np.asarray(np.lexsort((turn_F, *rounded)), np.int64)
