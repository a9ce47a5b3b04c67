"""The benchmark of the control plane counts what it says; how long things take decides nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from davir_ray.benchmarks import control
from davir_ray.benchmarks.control import ControlBenchmark
from davir_ray.errors import ConfigError, ProgressError

FIXED = {
    "score_shards_per_second", "first_commit_seconds", "driver_growth_mib", "driver_cpu_seconds", "resume_seconds",
    "recheck_seconds",
}  # fmt: skip


def scores_of(run: Path) -> dict[int, tuple[float, float]]:
    """Base and reference NLL of every row that was scored, by its id; fails if an id is there twice."""
    columns = ["example_id", "base_nll", "reference_nll"]
    tables = [pq.read_table(file, columns=columns) for file in (run / "scores").glob("*.parquet")]
    rows = [row for table in tables for row in table.to_pylist()]
    found = {row["example_id"]: (row["base_nll"], row["reference_nll"]) for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_every_shard_is_scored_once_and_a_resume_scores_the_rest(tmp_path: Path) -> None:
    settings = ControlBenchmark(shards=40, rows=2, actors=1)
    result = control.measure(tmp_path, settings)
    assert json.loads(json.dumps(result)) == result
    assert {name for name in FIXED if not (math.isfinite(result[name]) and result[name] >= 0)} == set()
    assert min(result[name] for name in FIXED - {"driver_growth_mib"}) > 0
    assert result["rows"] == 80
    assert result["settings"]["shards"] == 40
    assert result["versions"].keys() >= {"ray", "torch", "davir_ray"}
    assert result["machine"]["cpus"] > 0

    whole, killed = (scores_of(tmp_path / name) for name in ("whole", "killed"))
    assert whole.keys() == set(range(80))
    assert killed == whole
    # The files say by themselves what was there before the second driver began.
    began = json.loads((tmp_path / "killed" / "begun.json").read_text())["at"]
    times = [file.stat().st_mtime for file in (tmp_path / "killed" / "scores").glob("*.parquet")]
    num_new = sum(at > began for at in times)
    assert 0 < num_new <= 20
    assert (result["shards_before_kill"], result["shards_after_resume"]) == (40 - num_new, num_new)
    assert result["resume_seconds"] == min(at - began for at in times if at > began)
    manifest = json.loads((tmp_path / "killed" / "manifests" / "score.json").read_text())
    assert manifest["details"]["shards_scored_by_this_driver"] == num_new


@pytest.mark.slow
def test_a_driver_that_fails_is_told_with_its_reason(tmp_path: Path, ray_session: None) -> None:
    settings = ControlBenchmark(shards=20)
    reason = pytest.raises(ProgressError, match=r"status 2; .*base is not a folder")
    with control._driver(tmp_path, "whole", settings) as process, reason:
        control._wait_for_files(process, tmp_path / "whole", 1)


@pytest.mark.parametrize("wrong", [{"shards": 19}, {"rows": 0}, {"actors": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ControlBenchmark(**wrong)
