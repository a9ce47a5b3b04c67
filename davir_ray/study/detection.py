"""What the scores of a replicate say of the planted truth: a table of its rows, AUROCs and shares of the selection.

An AUROC compares two classes: the probability that a row of the first has a higher score than one of the second, ties
counting half. Copies and versions of one row are one row there, with the mean of their scores.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.study.runs import IFD_EPOCHS, ONE, TWO, Plan

Floats = npt.NDArray[np.float64]


def rows_of(pool: Path, folder: Path, plan: Plan) -> pa.Table:
    """One row for each row of a pool: its truth, and of each run its scores and whether it was selected.

    Columns of a run, as in one-3: `davir_one_3`, `selected_one_3`; with folds also `aligned_two_3`, and with two
    `seen_two_3`, by the reference that has seen the row. `base_mean_nll` and `ifd` depend on the base alone.
    """
    truth = [json.loads(line) for line in pool.read_text(encoding="utf-8").splitlines()]
    columns: dict[str, npt.NDArray[np.generic] | list[str]] = {
        name: [row[name] for row in truth] for name in ("planted_class", "group")
    }
    for way, epochs in plan.runs:
        run, name = Run.at(folder / f"{way.name}-{epochs}"), f"{way.name}_{epochs}"
        columns[f"davir_{name}"] = _scores(run, "scores", "davir", len(truth))
        if way.folds > 1:
            columns[f"aligned_{name}"] = _scores(run, "extra/davir_aligned", "davir_aligned", len(truth))
        if way == TWO:
            columns[f"seen_{name}"] = _scores(run, "extra/seen", "davir", len(truth))
        selected = [read_parquet(place, ["source_row"])["source_row"] for place in _files(run, "selected")]
        columns[f"selected_{name}"] = np.isin(np.arange(len(truth)), np.concatenate(selected))
        if (way, epochs) == (ONE, IFD_EPOCHS):
            columns["ifd"] = _scores(run, "extra/ifd", "ifd", len(truth))
            nll, tokens = (_scores(run, "scores", name, len(truth)) for name in ("base_nll", "num_response_tokens"))
            columns["base_mean_nll"] = nll / tokens
    return pa.table(columns)


def auroc(rows: pa.Table, score: str, first: Sequence[str], second: Sequence[str]) -> float:
    """The probability that a row of the first classes has a higher score than one of the second.

    Rows without a score are left out.
    """
    scored = rows.filter(pc.is_finite(rows[score]))
    groups = scored.group_by(["group", "planted_class"]).aggregate([(score, "mean")])
    values, classes = np.asarray(groups[f"{score}_mean"]), np.asarray(groups["planted_class"])
    above, below = (values[np.isin(classes, names)] for names in (first, second))
    return float(stats.mannwhitneyu(above, below).statistic / (len(above) * len(below)))


def shares(rows: pa.Table, selected: str) -> dict[str, float]:
    """The share of each class in a selection."""
    chosen = rows.filter(rows[selected])["planted_class"].to_pylist()
    return {name: chosen.count(name) / len(chosen) for name in sorted(set(rows["planted_class"].to_pylist()))}


class MeanInterval(NamedTuple):
    """A mean over replicates with its 95 % interval (Student's t)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "MeanInterval":
        """Of one value for each replicate; with a single one the interval is unbounded."""
        mean = float(np.mean(values))
        if len(values) < 2:
            return cls(mean, float("-inf"), float("inf"))
        margin = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        return cls(mean, mean - margin, mean + margin)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _scores(run: Run, folder: str, column: str, num_rows: int) -> Floats:
    """A column by the row of the pool; NaN where a row has no value. The files of every folder have the same rows."""
    values_N = np.full(num_rows, np.nan)
    for place in _files(run, "scores"):
        at = read_parquet(run / "examples" / place.name, ["source_row"])["source_row"]
        values_N[np.asarray(at)] = read_parquet(run / folder / place.name, [column])[column].to_numpy()
    return values_N


def _files(run: Run, folder: str) -> list[Location]:
    return [run / folder / name for name in (run / folder).names(".parquet")]
