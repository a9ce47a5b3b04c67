"""Several runs of the same rows: mean places and overlaps, as pandas computes them from the files of the runs."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
from made_runs import MakeScores, make_scores

from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.errors import ConfigError, DataError, IntegrityError, OutputError
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import REPEATS
from davir_ray.stages import aligned_scores, repeats, stability
from davir_ray.stages.aligned_scores import align_scores
from davir_ray.stages.folds import FOLDS, Folds
from davir_ray.stages.rank import rank
from davir_ray.stages.repeats import check_recipe, check_repeats, open_repeats, repeat_scores
from davir_ray.stages.select.rule import select
from davir_ray.stages.stability import measure_stability

__all__ = ["make_scores"]

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]

NUM_ROWS = 900
REPEATED = RankConfig(order="davir_repeated", repeats=["elsewhere"])
Floats = npt.NDArray[np.float64]
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(make_scores: MakeScores) -> MakeRun:
    """A run of the same rows, in other shards, with scores of its own reference."""
    ids = np.random.default_rng(9).choice(2**62, NUM_ROWS, replace=False)

    def make(name: str, davir: list[float | None], *, num_shards: int = 5, shuffled: int = 0, **changed: Any) -> Run:
        order = np.random.default_rng(shuffled).permutation(len(davir)) if shuffled else np.arange(len(davir))
        run = make_scores(
            [davir[row] for row in order],
            num_shards=num_shards,
            name=name,
            example_id=[int(ids[row]) for row in order],
            content_hash=[int(row) for row in order],
        )
        prepare = {"sources": {"s": {"format": "alpaca", "files": [name]}}, "encoding": "one"}
        prepare |= changed.get("prepare", {})
        replace(run.require("prepare"), fingerprint=prepare).write(run.folder)
        score = {"base": {"weights": "base"}, "reference": {"weights": name}, **changed.get("score", {})}
        replace(run.require("score"), fingerprint=score).write(run.folder)
        return run

    return make


def drawn(seed: int, noise: float = 0.5) -> list[float | None]:
    """Scores of one reference: the row's own value and noise, with ties, and some missing."""
    draw = np.random.default_rng(seed)
    values = np.random.default_rng(100).normal(size=NUM_ROWS) + noise * draw.normal(size=NUM_ROWS)
    values[draw.random(NUM_ROWS) < 0.2] = 0.5
    missing = draw.random(NUM_ROWS) < 0.05
    missing[:3] = True
    return [None if gone else float(value) for value, gone in zip(values, missing, strict=True)]


def table_of(run: Run, folder: str) -> pd.DataFrame:
    return pa.concat_tables([read_parquet(run / folder / name) for name in (run / folder).names()]).to_pandas()


def by_id(run: Run, folder: str, column: str) -> "pd.Series[float]":
    return table_of(run, folder).set_index("example_id")[column]


def place(davir: "pd.Series[float]") -> "pd.Series[float]":
    """The share of the scored rows below, and half the row; of equal scores the smaller id is above."""
    known = davir.dropna().reset_index().sort_values(["davir", "example_id"], ascending=[True, False])
    return pd.Series((np.arange(len(known)) + 0.5) / len(known), index=known["example_id"])


def places_of(runs: list[Run]) -> pd.DataFrame:
    """A column for each run; the rows are those of the first."""
    rows = table_of(runs[0], "scores")["example_id"]
    return pd.DataFrame({number: place(by_id(run, "scores", "davir")) for number, run in enumerate(runs)}).reindex(rows)


def opened(run: Run, others: list[Run]) -> list[Run]:
    return open_repeats(run, [str(other) for other in others])


@pytest.mark.parametrize("small", [True, False])
def test_the_place_of_a_row_is_the_mean_over_the_runs(
    make_run: MakeRun, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(repeats, "ROWS_PER_PART", 200)
        monkeypatch.setattr(aligned_scores, "BIN_ROWS", 100)
    runs = [make_run("a", drawn(1)), make_run("b", drawn(2), num_shards=3, shuffled=4), make_run("c", drawn(3))]
    manifest = repeat_scores(runs[0], opened(runs[0], runs[1:]))
    places = places_of(runs)
    for name in (runs[0] / "scores").names():
        ids = read_parquet(runs[0] / "scores" / name)["example_id"]
        found = read_parquet(runs[0] / "extra/repeats" / name)
        assert found.schema.equals(REPEATS)
        assert found["example_id"].equals(ids)
        expected = places.loc[ids.to_pylist()]
        np.testing.assert_allclose(found["davir_repeated"].to_numpy(), expected.mean(axis=1), atol=1e-12)
        np.testing.assert_allclose(found["place_sd"].to_numpy(), expected.std(axis=1, ddof=1), rtol=1e-9)
        assert found["num_repeats"].to_pylist() == expected.notna().sum(axis=1).tolist()
        lists = np.array(found["places"].to_pylist(), float)
        np.testing.assert_allclose(lists, expected.to_numpy(), rtol=1e-12)
        assert found["davir_repeated"].null_count == expected.isna().all(axis=1).sum()
    assert manifest.counts == {
        "examples": NUM_ROWS,
        "runs": 3,
        "repeated": places.notna().any(axis=1).sum(),
        "in_all_runs": places.notna().all(axis=1).sum(),
    }
    assert not (runs[0] / "extra/repeats_places").exists()
    assert repeat_scores(runs[0], opened(runs[0], runs[1:])).files == manifest.files  # complete


def test_with_folds_the_place_is_davir_aligned(make_run: MakeRun) -> None:
    runs = [make_run("a", drawn(1)), make_run("b", drawn(2), shuffled=1)]
    for run, seed, folds in zip(runs, (0, 1), ([0, 1, 0, 1, 1], [1, 1, 0, 0, 0]), strict=True):
        prepared = run.require("prepare")
        of_file = dict(zip((run / "scores").names(), folds, strict=True))
        details = {FOLDS: {"num_folds": 2, "of_file": of_file}}
        fingerprint = prepared.fingerprint | {"folds": {"number": 2, **({"seed": seed} if seed else {})}}
        replace(prepared, details=details, fingerprint=fingerprint).write(run.folder)
    with pytest.raises(OutputError, match="b has no complete extra/davir_aligned"):
        opened(runs[0], runs[1:])
    for run in runs:
        found = Folds.of(run.require("prepare"))
        assert found is not None
        align_scores(run, found)
    repeat_scores(runs[0], opened(runs[0], runs[1:]))
    both = pd.DataFrame({number: by_id(run, "extra/davir_aligned", "davir_aligned") for number, run in enumerate(runs)})
    found_places = by_id(runs[0], "extra/repeats", "davir_repeated")
    np.testing.assert_allclose(found_places, both.mean(axis=1).reindex(found_places.index), atol=1e-12)
    # Linked by an anchor it is no place, and has one among all rows.
    for run in reversed(runs):
        aligned = run.require("davir_aligned")
        replace(aligned, details={"way": "linked"}, fingerprint={"another": 1}).write(run.folder)
        if run == runs[1]:
            with pytest.raises(OutputError, match="some are linked by their anchor and some are not"):
                repeat_scores(runs[0], opened(runs[0], runs[1:]))
    runs[0].clear("repeats")
    repeat_scores(runs[0], opened(runs[0], runs[1:]))
    for number in both:
        both[number] = place(both[number].rename("davir"))
    found_places = by_id(runs[0], "extra/repeats", "davir_repeated")
    np.testing.assert_allclose(found_places, both.mean(axis=1).reindex(found_places.index), atol=1e-12)


def test_rows_are_ranked_and_selected_by_the_mean(make_run: MakeRun) -> None:
    runs = [make_run("a", drawn(1)), make_run("b", drawn(2)), make_run("c", drawn(3))]
    with pytest.raises(OutputError, match=r"no complete extra/repeats, which the order davir_repeated is by; give"):
        rank(runs[0], REPEATED)
    repeat_scores(runs[0], opened(runs[0], runs[1:]))
    means = by_id(runs[0], "extra/repeats", "davir_repeated").dropna()
    expected = means.reset_index().sort_values(["davir_repeated", "example_id"], ascending=[False, True])
    manifest = rank(runs[0], REPEATED)
    ranked = table_of(runs[0], "ranked")
    assert ranked["example_id"].tolist() == expected["example_id"].tolist()
    assert ranked["davir_repeated"].tolist() == expected["davir_repeated"].tolist()
    assert ranked["davir"].isna().any(), "a row that another run alone has scored"
    select(runs[0], REPEATED, SelectConfig(top_k=100))
    assert table_of(runs[0], "selected")["example_id"].tolist() == expected["example_id"].tolist()[:100]
    assert rank(runs[0], replace(REPEATED, repeats=["moved"])).files == manifest.files


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("lowest", [True, False])
def test_stability_is_that_of_the_sets_of_rows(
    make_run: MakeRun, small: bool, lowest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        for module, name in ((stability, "ROWS_PER_PART"), (stability, "BIN_ROWS")):
            monkeypatch.setattr(module, name, 100)
    runs = [make_run("a", drawn(1)), make_run("b", drawn(2)), make_run("c", drawn(3)), make_run("d", drawn(4))]
    repeat_scores(runs[0], opened(runs[0], runs[1:]))
    config = replace(REPEATED, lowest=lowest)
    rank(runs[0], config)
    select(runs[0], config, SelectConfig(top_k=120))
    manifest = measure_stability(runs[0], config)
    places = places_of(runs)
    means, sds, counts = places.mean(axis=1), places.std(axis=1, ddof=1), places.notna().sum(axis=1)
    num_rows = means.notna().sum()

    def best(values: "pd.Series[float]", num: int) -> "pd.DataFrame":
        table = pd.DataFrame({"id": values.index, "place": values.to_numpy()}).dropna()
        return table.sort_values(["place", "id"], ascending=[lowest, True]).head(num)

    chosen = [set(best(places[number], 120)["id"]) for number in range(4)]
    common = [len(chosen[one] & chosen[other]) for one, other in combinations(range(4), 2)]
    chance = 120 / num_rows
    overlaps = [(number / 120 - chance) / (1 - chance) for number in common]
    found = manifest.details
    assert [pair["common"] for pair in found["pairs"]] == common
    assert [pair["overlap"] for pair in found["pairs"]] == pytest.approx(overlaps)
    assert found["overlap"] == pytest.approx(np.mean(overlaps))
    assert found["interval_over"] == "references"
    assert found["interval"][0] < found["overlap"] < found["interval"][1]
    selected = table_of(runs[0], "selected")["example_id"]
    times = [sum(row in one for one in chosen) for row in selected]
    assert found["times_chosen"] == np.bincount(times, minlength=5).tolist()
    spread = np.sqrt((sds**2 * (counts - 1)).sum() / (counts[counts > 1] - 1).sum())
    cut = best(means, 120)["place"].iloc[-1]
    assert found["place_sd"] == pytest.approx(spread)
    assert found["cut"] == pytest.approx(cut)
    assert manifest.counts == {
        "selected": 120, "rows": num_rows, "near_cut": ((means - cut).abs() <= spread).sum(),
    }  # fmt: skip
    assert measure_stability(runs[0], config).details == found  # complete
    select(runs[0], config, SelectConfig(top_k=60))
    assert measure_stability(runs[0], config).counts["selected"] == 60


def test_filters_and_copies_of_a_selection_are_counted_where_they_are(make_run: MakeRun) -> None:
    """The selected rows are not the best ones: skip_top leaves these out."""
    runs = [make_run("a", drawn(1)), make_run("b", drawn(2))]
    repeat_scores(runs[0], opened(runs[0], runs[1:]))
    rank(runs[0], REPEATED)
    select(runs[0], REPEATED, SelectConfig(top_k=50, skip_top=0.5))
    found = measure_stability(runs[0], REPEATED).details
    assert sum(found["times_chosen"]) == 50
    assert found["times_chosen"][2] == 0
    assert found["overlap"] > 0.2
    assert found["interval_over"] == "rows"


def test_changed_repeats_are_noticed(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a", drawn(1)), make_run("b", drawn(2)), make_run("c", drawn(3))]
    first = repeat_scores(runs[0], opened(runs[0], runs[1:2]))
    rank(runs[0], REPEATED)
    select(runs[0], REPEATED, SelectConfig(top_k=50))
    measure_stability(runs[0], REPEATED)
    make_run("b", drawn(7))
    again = repeat_scores(runs[0], opened(runs[0], runs[1:2]))
    assert again.content != first.content
    assert runs[0].manifest("stability") is None, "what follows was made of the old ones"
    more = repeat_scores(runs[0], opened(runs[0], runs[1:]))
    assert more.counts["runs"] == 3
    name = (runs[0] / "extra/repeats").names()[0]
    (tmp_path / "a" / "extra" / "repeats" / name).unlink()
    assert repeat_scores(runs[0], opened(runs[0], runs[1:])).content == more.content


def test_what_is_no_repeat_is_refused_by_name(make_run: MakeRun, tmp_path: Path) -> None:
    run, good = make_run("a", drawn(1)), make_run("b", drawn(2))

    def refused(other: Run, told: str) -> None:
        with pytest.raises(OutputError, match=told):
            repeat_scores(run, opened(run, [other]))
        assert run.manifest("repeats") is None

    for given in (["a"], ["b", "b/"], ["b", "a/../b"]):
        with pytest.raises(ConfigError, match="which is the run itself or given twice"):
            open_repeats(run, [f"{tmp_path}/{place}" for place in given])
    with pytest.raises(OutputError, match=f"{tmp_path}/nothing has no complete score stage"):
        open_repeats(run, [str(tmp_path / "nothing")])
    refused(
        make_run("base", drawn(3), score={"base": {"weights": "other"}}), "/base is no repeat of .*/a .*base.weights"
    )
    refused(make_run("encoded", drawn(3), prepare={"encoding": "two"}), "/encoded is no repeat of .*prepare.encoding")
    refused(make_run("fewer", drawn(3)[:-1]), "/fewer is no repeat of .*examples: 900 → 899")
    refused(make_run("folds", drawn(3), prepare={"folds": {"number": 2}}), "/folds is no repeat of .*prepare.folds")
    refused(
        make_run("same", drawn(3), score={"reference": {"weights": "a"}}), "/same was scored with the same reference"
    )
    refused(make_run("none", [None] * NUM_ROWS), "no row of .*/none has a score")
    texts = make_run("texts", drawn(3))
    file = texts / "scores" / (texts / "scores").names()[1]
    twin = make_run("twin", drawn(4), score={"reference": {"weights": "b"}})
    with pytest.raises(OutputError, match=r"twin was scored with the same reference as .*/b"):
        check_repeats(run, opened(run, [good, twin]))
    file.write_bytes(file.read_bytes()[:-9] + b"?" * 9)
    with pytest.raises(OutputError, match=r"the score stage of .*/texts has damaged files: scores/part-00001"):
        opened(run, [texts])


def test_a_run_of_other_texts_is_refused(make_run: MakeRun, make_scores: MakeScores) -> None:
    run, other = make_run("a", drawn(1)), make_run("b", drawn(2))
    scores = table_of(other, "scores")
    hashes = scores["content_hash"].tolist()
    hashes[300] += 10**6
    made = make_scores(drawn(2), name="c", example_id=scores["example_id"].tolist(), content_hash=hashes)
    for stage in ("prepare", "score"):
        fingerprint = other.require(stage).fingerprint
        replace(made.require(stage), fingerprint=fingerprint).write(made.folder)
    repeat_scores(run, opened(run, [other]))
    with pytest.raises(DataError, match=r"/c does not hold the rows of .*/a: some have another id or another text"):
        repeat_scores(run, opened(run, [made]))
    assert run.manifest("repeats") is not None, "what was there before is lost"


def test_a_reference_that_would_be_trained_again_is_refused_before_it_is(make_run: MakeRun) -> None:
    run, other = make_run("a", drawn(1)), make_run("b", drawn(2))
    recipe = {"seed": 0, "learning_rate": 1e-3}
    Manifest(stage="finetune", fingerprint={"recipe": recipe}, counts={}, files=[]).write(other.folder)
    check_recipe(run, [other], {**recipe, "seed": 1})
    with pytest.raises(OutputError, match=r"/b was scored with the same reference as .*/a"):
        check_recipe(run, [other], recipe)


def test_the_files_are_checked_as_all_others(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a", drawn(1)), make_run("b", drawn(2))]
    repeat_scores(runs[0], opened(runs[0], runs[1:]))
    rank(runs[0], REPEATED)
    from davir_ray.stages.verify import _check_files

    num_files = _check_files(runs[0])
    assert num_files == sum(len(found.files) for found in runs[0].manifests().values())
    file = tmp_path / "a" / "extra" / "repeats" / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-9] + b"?" * 9)
    with pytest.raises(IntegrityError, match="extra/repeats/part-00000"):
        _check_files(runs[0])
