"""AUROCs, shares and intervals of the study, against pairs counted one by one and a table of Student's t."""

import itertools
import math
from statistics import mean, stdev

import numpy as np
import pyarrow as pa
import pytest

from davir_ray.study.detection import MeanInterval, auroc, shares
from davir_ray.study.results import verdicts
from davir_ray.study.runs import Plan

CLASSES = ["clean", "clean", "exchanged", "exchanged", "exchanged", "clean", "rare"]
GROUPS = [0, 1, 2, 2, 3, 4, 5]
SCORES = [0.9, 0.4, 0.7, 0.1, 0.4, math.nan, 5.0]
ROWS = pa.table(
    {
        "planted_class": CLASSES,
        "group": GROUPS,
        "score": np.array(SCORES),
        "selected": [True, False, True] + [False] * 4,
    }
)


def test_auroc_counts_pairs_of_rows_copies_as_one_and_ties_half() -> None:
    clean, exchanged = [0.9, 0.4], [mean([0.7, 0.1]), 0.4]
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(clean, exchanged)]
    assert auroc(ROWS, "score", ("clean",), ("exchanged",)) == pytest.approx(mean(pairs))
    assert auroc(ROWS, "score", ("exchanged",), ("clean",)) == pytest.approx(1 - mean(pairs))


def test_shares_are_of_the_selected_rows() -> None:
    assert shares(ROWS, "selected") == {"clean": 0.5, "exchanged": 0.5, "rare": 0.0}


def test_the_interval_of_four_replicates_is_students() -> None:
    values = [0.1, 0.3, 0.25, 0.15]
    found = MeanInterval.of(values)
    margin = 3.182446 * stdev(values) / 2  # t of 3 degrees of freedom, from a printed table
    assert found == pytest.approx((0.2, 0.2 - margin, 0.2 + margin), rel=1e-6)
    assert MeanInterval.of([0.2]) == (0.2, -math.inf, math.inf)


def replicate(gain: float, rare: float) -> pa.Table:
    """100 clean, 100 copied and 100 rare rows, one noisy row each side: AUROCs that are set by where a row lies."""
    num = 100
    names = ["clean"] * num + ["exchanged_copies"] + ["rare"] * num
    seen = np.arange(num) < num // 2
    unseen = np.arange(num) < num // 2 + round(gain * num)
    above = {"seen": seen, "unseen": unseen, "rare": np.arange(num) < num // 2 + round(rare * num)}
    column = {
        "davir_two_3": [*above["unseen"], 0.5, *above["rare"]],
        "seen_two_3": [*above["seen"], 0.5, *above["rare"]],
        "davir_one_3": [*above["seen"], 0.5, *above["seen"]],
    }
    scores = {name: np.array(values, float) for name, values in column.items()}
    return pa.table({"planted_class": names, "group": np.arange(len(names)), **scores})


@pytest.mark.parametrize(
    ("gains", "rare", "advice", "default"),
    [
        ([0.2, 0.21, 0.19, 0.2], 0.0, "advised from 3 epochs on", "does not speak against"),
        ([0.2, 0.21, 0.19, 0.2], -0.1, "advised from 3 epochs on", "never the default"),
        ([0.4, 0.0, 0.3, -0.1], 0.0, "does not decide", "does not speak against"),
        ([0.01, 0.0, 0.01, 0.0], 0.0, "are not advised", "does not speak against"),
    ],
)
def test_the_rules_decide_as_they_were_written(gains: list[float], rare: float, advice: str, default: str) -> None:
    primary, _, of_rare = verdicts([replicate(gain, rare) for gain in gains], Plan(epochs=(3,), four_folds=()))
    assert advice in primary
    assert f"{mean(gains):.3f} [" in primary
    assert default in of_rare
    assert f"{rare:.3f} [" in of_rare
