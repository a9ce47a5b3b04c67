"""The benchmark of the ranking tells right from wrong; how long things take decides nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from davir_ray.benchmarks import ranking
from davir_ray.benchmarks.ranking import RankingBenchmark, run
from davir_ray.errors import ConfigError
from davir_ray.run.files import read_parquet, write_parquet
from davir_ray.run.folder import Run

pytestmark = pytest.mark.usefixtures("ray_session")

FIXED = {
    "speedup_vs_sort_limit", "speedup_vs_sort", "driver_peak_mib", "largest_worker_mib", "largest_bin_ratio", "exact",
    "top_times_duckdb", "full_times_duckdb", "top_times_polars", "full_times_polars",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("values", ["distinct", "tied"])
def test_the_result_holds_what_it_promises(values: Any) -> None:
    result = run(RankingBenchmark(rows=5000, shard_rows=700, values=values, repeats=2, baselines=values == "tied"))
    assert result["exact"] is True
    assert result["kept"] == 300
    if values == "tied":
        assert result.keys() >= FIXED
        assert result["speedup_vs_sort"] == result["seconds"]["sort"] / result["seconds"]["full"]
    assert json.loads(json.dumps(result)) == result


@pytest.mark.slow
@pytest.mark.parametrize("most", [30, None])
def test_the_others_rank_alike(tmp_path: Path, most: int | None) -> None:
    run_folder = Run.at(tmp_path)
    ranking._generate(run_folder.folder, RankingBenchmark(rows=500, shard_rows=90, values="tied"))
    ours = ranking.rank(run_folder, ranking.RankConfig(most=most))
    table = pa.concat_tables([read_parquet(run_folder / entry.name) for entry in ours.files])
    for rival in (ranking._by_duckdb, ranking._by_polars):
        rival(f"{tmp_path}/scores/*.parquet", str(tmp_path / "others.parquet"), most)
        theirs = read_parquet(run_folder / "others.parquet")
        assert set(theirs.column_names) == set(table.column_names)
        assert (
            theirs.select(["rank", "example_id", "davir"]).to_pylist()
            == table.select(["rank", "example_id", "davir"]).to_pylist()
        )


@pytest.mark.slow
def test_ids_are_distinct_and_values_as_asked(tmp_path: Path) -> None:
    run_folder = Run.at(tmp_path)
    files = ranking._generate(run_folder.folder, RankingBenchmark(rows=3000, shard_rows=500, values="tied"))
    table = pa.concat_tables([read_parquet(run_folder / "scores" / entry.name) for entry in files])
    assert len(np.unique(table["example_id"])) == 3000
    assert 50 < len(np.unique(table["davir"])) <= 100
    np.testing.assert_allclose(
        table["davir"], 1 - np.asarray(table["reference_nll"]) / np.asarray(table["base_nll"]), atol=1e-9
    )


@pytest.mark.slow
def test_a_wrong_order_is_not_exact(tmp_path: Path) -> None:
    run_folder = Run.at(tmp_path)
    files = ranking._generate(run_folder.folder, RankingBenchmark(rows=100, shard_rows=50))
    expected = ranking._oracle(run_folder.folder, files)
    manifest = ranking.rank(run_folder, ranking.RankConfig())
    assert ranking._is_exact(run_folder.folder, manifest, expected)
    place = run_folder / manifest.files[0].name
    table = read_parquet(place)
    write_parquet(place, table.take(list(reversed(range(table.num_rows)))))
    assert not ranking._is_exact(run_folder.folder, manifest, expected)
    write_parquet(place, table.slice(1))
    assert not ranking._is_exact(run_folder.folder, manifest, expected)
    assert run_folder.manifest("rank") == manifest


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"shard_rows": 0}, {"fraction": 0.0}, {"fraction": 1.5}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RankingBenchmark(**wrong)
