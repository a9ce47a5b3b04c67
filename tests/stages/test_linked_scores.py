"""Scores of folds by a column, linked by the anchor: recomputed by NumPy from the files, and what no line can link."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from made_runs import MakeScores, make_scores

from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.errors import DataError, IntegrityError, OutputError
from davir_ray.run.files import in_folder, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import ANCHORED
from davir_ray.stages.aligned_scores import align_scores
from davir_ray.stages.folds import FOLDS, Folds, anchored_file
from davir_ray.stages.rank import rank
from davir_ray.stages.select.rule import select

__all__ = ["make_scores"]

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_ROWS, OF_SHARD = 1200, (0, 1, -1, 2, 0, -1)
NUM_SHARDS, NUM_REFERENCES = len(OF_SHARD), 3
INTERCEPTS, SLOPES = np.array([0.3, -0.3, 0.0]), np.array([1.3, 0.7, 1.0])

Floats = npt.NDArray[np.float64]


def planted(centers: dict[int, float], num_rows: int = NUM_ROWS) -> tuple[Floats, Floats]:
    """The base loss of each row, and the losses by each reference: a line of what the row is worth, with noise."""
    draw = np.random.default_rng(0)
    shard = np.repeat(np.arange(NUM_SHARDS), [len(part) for part in np.array_split(np.arange(num_rows), NUM_SHARDS)])
    true_N = draw.normal([centers[OF_SHARD[number]] for number in shard], 0.3)
    noise = draw.normal(scale=0.05, size=(num_rows, NUM_REFERENCES))
    base_N = draw.uniform(5, 50, num_rows)
    return base_N, base_N[:, None] * np.exp(INTERCEPTS + SLOPES * true_N[:, None] + noise)


def made(
    make_scores: MakeScores, base_N: Floats, reference_NK: Floats, missing: dict[tuple[int, int], str] | None = None
) -> tuple[Run, Folds]:
    """A run with the losses by the reference of each row's fold, and extra/anchor/; `missing` by (row, reference)."""
    missing, num_rows = missing or {}, len(base_N)
    parts = np.array_split(np.arange(num_rows), NUM_SHARDS)

    def columns(rows: npt.NDArray[np.int64], reference: int) -> dict[str, Any]:
        status = [missing.get((int(row), reference), "ok") for row in rows]
        nll = [
            float(reference_NK[row, reference]) if of == "ok" else None for row, of in zip(rows, status, strict=True)
        ]
        davir = [None if loss is None else 1 - loss / base_N[row] for row, loss in zip(rows, nll, strict=True)]
        return {"base_nll": base_N[rows].tolist(), "reference_nll": nll, "davir": davir, "status": status}

    own = [columns(part, max(0, fold)) for part, fold in zip(parts, OF_SHARD, strict=True)]
    joined = {name: [value for of_part in own for value in of_part[name]] for name in own[0]}
    run = make_scores(joined.pop("davir"), num_shards=NUM_SHARDS, **joined)
    prepared = run.require("prepare")
    names = [entry.name for entry in prepared.files_in("examples")]
    details = {FOLDS: {"num_folds": NUM_REFERENCES, "of_file": dict(zip(names, OF_SHARD, strict=True))}}
    replace(prepared, fingerprint={"folds": {"by": "user"}}, details=details).write(run.folder)
    files = []
    for name, part, fold in zip(names, parts, OF_SHARD, strict=True):
        for reference in range(1, NUM_REFERENCES) if fold == -1 else ():
            table = columns(part, reference) | {
                "example_id": part, "num_response_tokens": [1] * len(part), "scored_by": [reference] * len(part)
            }  # fmt: skip
            rows = pa.table([pa.array(table[field.name], field.type) for field in ANCHORED], schema=ANCHORED)
            files.append(write_parquet(run / "extra/anchor" / anchored_file(name, reference), rows))
    Manifest(stage="anchor", fingerprint={}, counts={}, files=in_folder("extra/anchor", files)).write(run.folder)
    folds = Folds.of(run.require("prepare"))
    assert folds is not None
    return run, folds


def aligned_of(run: Run, folds: Folds) -> Floats:
    names = sorted(folds.of_file)
    found = pa.concat_tables([read_parquet(run / "extra/davir_aligned" / name) for name in names])
    assert found["example_id"].to_pylist() == list(range(found.num_rows))
    return np.asarray(found["davir_aligned"].to_numpy())


def fold_of_row(num_rows: int) -> npt.NDArray[np.int64]:
    return np.repeat(OF_SHARD, [len(part) for part in np.array_split(np.arange(num_rows), NUM_SHARDS)])


def test_values_are_those_of_polyfit_over_the_anchor(make_scores: MakeScores) -> None:
    base_N, reference_NK = planted({0: -0.8, 1: -0.2, 2: -0.4, -1: -0.5})
    fold_N = fold_of_row(NUM_ROWS)
    anchor, (first, *_) = np.flatnonzero(fold_N == -1), np.flatnonzero(fold_N == 0)
    missing = {(int(anchor[3]), 2): "out_of_memory", (int(anchor[5]), 0): "non_finite_nll", (int(first), 0): "no_loss"}
    reference_NK[anchor[7], 1], reference_NK[first + 1, 0] = 0, 0
    run, folds = made(make_scores, base_N, reference_NK, missing)
    manifest = align_scores(run, folds)
    found = aligned_of(run, folds)

    with np.errstate(divide="ignore"):
        ratios_NK = np.log(reference_NK / base_N[:, None])
    used = np.setdiff1d(anchor, anchor[[3, 5, 7]])
    m_N = ratios_NK.mean(axis=1)
    lines = [np.polyfit(m_N[used], ratios_NK[used, k], 1) for k in range(NUM_REFERENCES)]
    expected = 1 - np.exp(m_N)
    for k, (slope, intercept) in enumerate(lines):
        rows = fold_N == k
        expected[rows] = 1 - np.exp((ratios_NK[rows, k] - intercept) / slope)
    none = [anchor[3], anchor[5], first]
    assert np.isnan(found[none]).all()
    others = np.setdiff1d(np.arange(NUM_ROWS), none)
    np.testing.assert_allclose(found[others], expected[others], rtol=1e-9, atol=1e-12)
    assert found[first + 1] == found[anchor[7]] == 1
    assert manifest.counts == {"examples": NUM_ROWS, "aligned": NUM_ROWS - 3}
    details = manifest.details
    assert (details["way"], details["anchor_rows"], details["linked_by"]) == ("linked", len(anchor), len(used))
    for k, (slope, intercept) in enumerate(lines):
        line = details["lines"][k]
        left = ratios_NK[used, k] - slope * m_N[used] - intercept
        assert (line["reference"], line["slope"]) == (k, pytest.approx(slope))
        assert line["intercept"] == pytest.approx(intercept)
        assert line["residual_sd"] == pytest.approx(np.sqrt((left**2).sum() / (len(used) - 2)))
    assert align_scores(run, folds).files == manifest.files  # complete


def test_a_selection_is_of_the_better_fold_where_places_take_a_third_of_each(make_scores: MakeScores) -> None:
    """Fold 0 is learnable, the others are noise; places within folds are quotas."""
    base_N, reference_NK = planted({0: -1.6, 1: -0.1, 2: -0.1, -1: -0.5})
    run, folds = made(make_scores, base_N, reference_NK)
    shares = {}
    for way, by in (("place", None), ("linked", "user")):
        align_scores(run, replace(folds, by=by))
        order, rule = RankConfig(order="davir_aligned"), SelectConfig(top_k=120)
        rank(run, order)
        select(run, order, rule)
        selected = pa.concat_tables([read_parquet(run / "selected" / name) for name in (run / "selected").names()])
        fold_N = fold_of_row(NUM_ROWS)[selected["example_id"].to_numpy()]
        shares[way] = [(fold_N == fold).mean() for fold in (0, 1, 2, -1)]
    assert shares["place"] == pytest.approx([1 / 3, 1 / 6, 1 / 6, 1 / 3], abs=0.01)
    assert shares["linked"][0] > 0.95


def test_places_of_an_earlier_version_are_redone(make_scores: MakeScores) -> None:
    run, folds = made(make_scores, *planted({0: -0.8, 1: -0.2, 2: -0.4, -1: -0.5}))
    assert align_scores(run, replace(folds, by=None)).details == {"way": "place"}
    places = aligned_of(run, folds)
    assert align_scores(run, folds).details["way"] == "linked"
    assert not np.allclose(aligned_of(run, folds), places)


def test_what_no_line_links_is_refused_and_leaves_no_places(make_scores: MakeScores) -> None:
    base_N, reference_NK = planted({0: -0.8, 1: -0.2, 2: -0.4, -1: -0.5})
    anchor = np.flatnonzero(fold_of_row(NUM_ROWS) == -1)
    missing = {(int(row), 1): "out_of_memory" for row in anchor[29:]}
    run, folds = made(make_scores, base_N, reference_NK, missing)
    align_scores(run, replace(folds, by=None))
    with pytest.raises(DataError, match=r"29 of the anchor's 400 rows were scored by all 3 references, too few"):
        align_scores(run, folds)
    assert run.manifest("davir_aligned") is None
    reversed_NK = reference_NK.copy()
    reversed_NK[:, 1] = base_N**2 / reference_NK[:, 1]
    run, folds = made(make_scores, base_N, reversed_NK)
    with pytest.raises(DataError, match=r"the scores of reference 1 do not rise with the mean .*slope -"):
        align_scores(run, folds)
    run.uncommit("anchor")
    with pytest.raises(OutputError, match=r"no complete extra/anchor.*give its command of jobs/score.py again"):
        align_scores(run, folds)


def test_other_rows_in_the_anchor_are_damage(make_scores: MakeScores) -> None:
    run, folds = made(make_scores, *planted({0: -0.8, 1: -0.2, 2: -0.4, -1: -0.5}))
    name = next(name for name, fold in folds.of_file.items() if fold == -1)
    place = run / "extra/anchor" / anchored_file(name, 2)
    rows = read_parquet(place)
    write_parquet(place, rows.take(pa.array(range(rows.num_rows))[::-1]))
    with pytest.raises(IntegrityError, match="do not hold the same rows"):
        align_scores(run, folds)
