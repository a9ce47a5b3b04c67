"""Scores of folds on one scale: every row's place within its fold, as a sort of the whole fold gives it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from made_runs import MakeScores, make_scores

from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.stages import aligned_scores
from davir_ray.stages.aligned_scores import align_scores
from davir_ray.stages.folds import FOLDS, Folds

__all__ = ["make_scores"]

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_ROWS, NUM_SHARDS = 3000, 9


def drawn() -> list[float | None]:
    """Ties, missing scores, both infinities; the folds differ in scale, as those of two references do."""
    draw = np.random.default_rng(0)
    values = np.round(draw.normal(size=NUM_ROWS), 2)
    values[draw.random(NUM_ROWS) < 0.3] = 0.25
    values[:4] = [np.inf, -np.inf, 0.0, -0.0]
    missing = draw.random(NUM_ROWS) < 0.1
    missing[np.array_split(np.arange(NUM_ROWS), NUM_SHARDS)[3]] = True  # a whole shard
    return [None if gone else float(value) for value, gone in zip(values, missing, strict=True)]


def dealt(run: Run, folds: list[int]) -> Folds:
    prepared = run.require("prepare")
    names = [entry.name for entry in prepared.files_in("examples")]
    details = {FOLDS: {"num_folds": 2, "of_file": dict(zip(names, folds, strict=True))}}
    replace(prepared, details=details).write(run.folder)
    found = Folds.of(run.require("prepare"))
    assert found is not None
    return found


def expected(davir: npt.NDArray[np.float64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """By one sort of a fold: the best row, of equal ones that with the smaller id, comes first."""
    has = ~np.isnan(davir)
    order = np.lexsort((ids[has], -davir[has]))
    places = np.empty(has.sum())
    places[order] = np.arange(has.sum())
    found = np.full(len(davir), np.nan)
    found[has] = 1 - (places + 0.5) / has.sum()
    return found


@pytest.mark.parametrize("bin_rows", [100, 100_000])
def test_every_row_has_its_place_in_its_fold(
    make_scores: MakeScores, bin_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aligned_scores, "BIN_ROWS", bin_rows)
    ids = np.random.default_rng(1).permutation(10 * NUM_ROWS)[:NUM_ROWS]
    run = make_scores(drawn(), num_shards=NUM_SHARDS, example_id=ids.tolist())
    folds = dealt(run, [0, 1, 0, 1, -1, 1, 0, 0, 1])
    manifest = align_scores(run, folds)
    files = {entry.name: entry for entry in manifest.files_in("extra/davir_aligned")}
    assert files.keys() == folds.of_file.keys()
    tables: dict[int, list[tuple[pa.Table, pa.Table]]] = {}
    for name, fold in folds.of_file.items():
        scores, aligned = (read_parquet(run / folder / name) for folder in ("scores", "extra/davir_aligned"))
        assert aligned["example_id"].equals(scores["example_id"])
        tables.setdefault(fold, []).append((scores, aligned))
    for pairs in tables.values():
        scores, aligned = (pa.concat_tables(side) for side in zip(*pairs, strict=True))
        davir, found = (table[name].to_numpy() for table, name in ((scores, "davir"), (aligned, "davir_aligned")))
        np.testing.assert_allclose(found, expected(davir, scores["example_id"].to_numpy()), rtol=1e-12)
    assert manifest.counts == {"examples": NUM_ROWS, "aligned": sum(value is not None for value in drawn())}
    assert align_scores(run, folds).files == manifest.files  # complete


def test_the_folder_is_data_alone(make_scores: MakeScores, tmp_path: Path) -> None:
    run = make_scores([0.1, 0.2, 0.3, 0.4], num_shards=2)
    align_scores(run, dealt(run, [0, 1]))
    found = read_parquet(run / "extra" / "davir_aligned" / "part-00001.parquet")
    assert found["davir_aligned"].to_pylist() == [0.25, 0.75]
    assert {path.suffix for path in (tmp_path / "run" / "extra" / "davir_aligned").iterdir()} == {".parquet"}
