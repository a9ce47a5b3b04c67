"""The main job with folds by a column and an anchor: linked scores, also after a death and by references of a run."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from drivers import Driver

from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run

pytestmark = pytest.mark.slow

NUM_ROWS, NUM_USERS = 120, 40


@pytest.fixture(scope="module")
def options(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    draw = random.Random(0)
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "prompt": f"Say what {row} is.",
            "response": " ".join(draw.choice("abcdefghij") * draw.randrange(1, 9) for _ in range(20)),
            "user": row % NUM_USERS,
        }
        for row in range(NUM_ROWS)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    return {
        "data": data, "format": "prompt_response", "base": base_folder, "prepare.folds": 2, "prepare.fold_by": "user",
        "prepare.anchor": 0.4, "prepare.shard_rows": 8, "finetune.epochs": 2, "finetune.batch_size": 8,
        "finetune.learning_rate": 1e-2, "finetune.precision": "float32", "score.num_actors": 1, "select.top_k": 12,
    }  # fmt: skip


def anchored(run: Run) -> set[str]:
    return set((run / "extra/anchor").names(".parquet"))


@pytest.fixture(scope="module")
def finished(options: dict[str, Any], ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose driver was killed while the anchor was scored, and started again."""
    folder = tmp_path_factory.mktemp("anchor")
    run = Run.at(folder / "run")
    first = Driver("score.py", {**options, "output": run}, folder / "first.log", address=ray_address)
    first.wait_for(lambda: bool(anchored(run)), "a file of the anchor")
    first.kill()
    before = {name: (run / "extra/anchor").listed()[name] for name in anchored(run)}
    second = Driver("score.py", {**options, "output": run}, folder / "second.log", address=ray_address)
    assert second.finish() == 0, second.output
    assert "equal shares" not in second.output
    if (found := re.search(r"anchor: (\d+) shards to do, (\d+) already done", second.output)) is not None:
        assert int(found[2]) >= len(before)
    after = (run / "extra/anchor").listed()
    assert {name: after[name] for name in before} == before
    return run


def table(run: Run, folder: str) -> pa.Table:
    return pa.concat_tables([read_parquet(run / folder / name) for name in (run / folder).names(".parquet")])


def test_the_ranking_is_by_lines_over_the_anchor(finished: Run) -> None:
    """By polyfit from the files alone."""
    fold_of = dict(
        zip(*(table(finished, "examples")[name].to_pylist() for name in ("example_id", "fold")), strict=True)
    )
    scores = {row["example_id"]: row for row in table(finished, "scores").to_pylist()}
    second = {row["example_id"]: row for row in table(finished, "extra/anchor").to_pylist()}
    anchor = [example_id for example_id, fold in fold_of.items() if fold == -1]
    assert second.keys() == set(anchor)
    assert len(anchor) >= 30
    assert {row["scored_by"] for row in second.values()} == {1}

    def ratio(rows: dict[int, Any], example_id: int) -> float:
        return float(np.log(rows[example_id]["reference_nll"] / rows[example_id]["base_nll"]))

    by_reference = np.array([[ratio(of, example_id) for of in (scores, second)] for example_id in anchor])
    lines = [np.polyfit(by_reference.mean(axis=1), by_reference[:, k], 1) for k in (0, 1)]
    expected = dict(zip(anchor, 1 - np.exp(by_reference.mean(axis=1)), strict=True))
    for example_id, fold in fold_of.items():
        if fold >= 0:
            slope, intercept = lines[fold]
            expected[example_id] = 1 - np.exp((ratio(scores, example_id) - intercept) / slope)
    ranked = table(finished, "ranked")
    found = dict(zip(ranked["example_id"].to_pylist(), ranked["davir_aligned"].to_pylist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert ranked["davir_aligned"].to_pylist() == sorted(found.values(), reverse=True)
    assert finished.require("davir_aligned").details["way"] == "linked"
    assert "residual SD" in (finished / "report.html").read_text()


def test_it_is_complete_verified_and_ranked_again(
    finished: Run, options: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    again = Driver("score.py", {**options, "output": finished}, tmp_path / "again")
    assert again.finish() == 0, again.output
    assert "anchor: complete, skipped" in again.output
    assert "Started a local Ray" not in again.output
    for job, given in (("verify.py", {}), ("rank.py", {"rank.order": "davir_aligned", "select.top_k": 5})):
        driver = Driver(job, {**given, "output": finished}, tmp_path / job, address=ray_address)
        assert driver.finish() == 0, driver.output
    assert "scores: 140 rows (20 of extra/anchor), stored" in (tmp_path / "verify.py").read_text()
    place = finished / "extra/anchor" / min(anchored(finished))
    content = place.read_bytes()
    place.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    damaged = Driver("verify.py", {"output": finished}, tmp_path / "damaged", address=ray_address)
    assert damaged.finish() == 1, damaged.output
    assert "extra/anchor" in damaged.output
    place.write_bytes(content)


def test_the_references_of_a_run_score_the_same_anchor_alike(
    finished: Run, options: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    given = {name: value for name, value in options.items() if not name.startswith("finetune")}
    other = Run.at(tmp_path / "other")
    same = Driver("score.py", {**given, "reference": finished, "output": other}, tmp_path / "log", address=ray_address)
    assert same.finish() == 0, same.output
    for folder in ("extra/anchor", "extra/davir_aligned"):
        assert table(other, folder).equals(table(finished, folder))


def test_without_an_anchor_it_is_said_that_places_are_quotas_and_too_small_a_one_is_refused(
    options: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    quick = {name: value for name, value in options.items() if name != "finetune.epochs"} | {"finetune.max_steps": 1}
    without = Driver(
        "score.py", {**quick, "prepare.anchor": 0, "output": tmp_path / "run"}, tmp_path / "log", address=ray_address
    )
    assert without.finish() == 0, without.output
    assert without.output.count("a selection takes equal shares of every fold, which are quotas") == 1
    small = {**quick, "prepare.anchor": 0.1, "output": tmp_path / "small"}
    refused = Driver("score.py", small, tmp_path / "small.log", address=ray_address)
    assert refused.finish() == 2, refused.output
    assert re.search(r"prepare.anchor is 0.1, which is \d+ of 120 rows, too few to link folds by", refused.output)
    assert not (tmp_path / "small" / "reference_folds").exists()


def test_a_run_of_a_version_that_scored_the_anchor_by_one_reference_is_not_complete(
    finished: Run, options: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    """Its folder as such a version left it, with a record of all stages that it had."""
    before, place = table(finished, "extra/davir_aligned"), finished / "manifests/complete.json"
    again = Driver("score.py", {**options, "output": finished}, tmp_path / "first", address=ray_address)
    assert again.finish() == 0, again.output  # whatever was ranked last, the record is of this command
    record = json.loads(place.read_bytes())
    del record["stages"]["anchor"]
    place.write_text(json.dumps(record))
    finished.uncommit("anchor")
    (finished / "extra/anchor").remove()
    redone = Driver("score.py", {**options, "output": finished}, tmp_path / "second", address=ray_address)
    assert redone.finish() == 0, redone.output
    assert re.search(r"anchor: \d+ shards to do, 0 already done", redone.output)
    assert table(finished, "extra/davir_aligned").equals(before)
