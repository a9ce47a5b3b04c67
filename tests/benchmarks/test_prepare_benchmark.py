"""The benchmark of prepare prepares what it says, and its rival tokenises the same text."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from davir_ray.benchmarks import preparing
from davir_ray.benchmarks.preparing import PrepareBenchmark
from davir_ray.errors import ConfigError


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_both_sides_tokenise_every_row(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[datasets.Dataset] = []
    original = datasets.Dataset.map

    def kept(self: datasets.Dataset, *given: Any, **options: Any) -> datasets.Dataset:
        mapped.append(original(self, *given, **options))
        return mapped[-1]

    monkeypatch.setattr(datasets.Dataset, "map", kept)
    settings = PrepareBenchmark(data=str(data_folder / "alpaca_9k.jsonl.gz"), megabytes=1, files=3, repeats=1)
    result = preparing.measure(tmp_path, settings)
    assert json.loads(json.dumps(result)) == result
    tables = [pq.read_table(file) for file in (tmp_path / "run-0" / "examples").glob("*.parquet")]
    assert sum(table.num_rows for table in tables) == result["rows"] - result["rejected"]
    assert len(list((tmp_path / "data").iterdir())) == 3
    assert mapped[0].num_rows == result["rows"]
    prompts = {tuple(ids) for ids in mapped[0]["prompt_ids"]}
    for row in tables[0].slice(0, 20).to_pylist():
        prompt = row["input_ids"][: row["num_prompt_tokens"]]
        assert any(tuple(prompt[skip:]) in prompts for skip in (0, 1)), "with or without the token that begins a text"
    assert result["ratio"] == result["rows_per_second"]["davir_ray"] / result["rows_per_second"]["datasets.map"]


@pytest.mark.parametrize("wrong", [{"megabytes": 0}, {"files": 0}, {"repeats": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PrepareBenchmark(data="rows.jsonl", **wrong)
