"""Generation as a stage: the texts of one process, by shard, resumed; and answers compared with the responses."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from davir_ray.compare.exact_match import match, matched
from davir_ray.compare.generation import generate
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import GenerateConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.sources import Source
from davir_ray.errors import ConfigError, ModelError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.generator import INPUT_COLUMNS, Generator, GeneratorSettings
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.stages import from_stage
from davir_ray.schema import GENERATIONS, MATCHES
from davir_ray.stages.prepare import Preparation, prepare

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS = 20
CONFIG = GenerateConfig(max_new_tokens=6)


def pool(num_actors: int = 1) -> ScoreConfig:
    return ScoreConfig(num_actors=num_actors, precision="float32")


@pytest.fixture(scope="module")
def prepared(data_folder: Path, base_folder: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("prepared") / "run"
    sources = [
        Source(name="gsm8k", path=str(data_folder / "gsm8k_test.jsonl.gz"), format="gsm8k"),
        Source(name="alpaca", path=str(data_folder / "alpaca_9k.jsonl.gz"), format="alpaca"),
    ]
    settings = Preparation(
        base=Checkpoint.find(str(base_folder)), config=PrepareConfig(max_tokens=512, shard_rows=8), limit=ROWS
    )
    prepare(Run.at(run), sources, settings, max_bad_fraction=1)
    return run


@pytest.fixture(scope="module")
def generated(prepared: Path, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("generated") / "run"
    model = Checkpoint.find(str(base_folder))
    generate(Run.at(run), model, CONFIG, pool(2), examples=Run.at(prepared))
    return run


def table_of(run: Run, folder: str) -> pa.Table:
    return pa.concat_tables([read_parquet(run / folder / name) for name in (run / folder).names()])


@pytest.mark.slow
def test_the_texts_are_those_of_one_process_in_a_run_of_their_own(
    prepared: Path, generated: Path, base_folder: Path
) -> None:
    run, source = Run.at(generated), Run.at(prepared)
    names = (run / "generations").names()
    assert names == (source / "examples").names()
    assert len(names) >= 6
    assert not (run / "examples").exists()
    alone = Generator(Checkpoint.find(str(base_folder)), GeneratorSettings(max_new_tokens=6, precision="float32"))
    for name in names:
        found = read_parquet(run / "generations" / name)
        assert found.schema.remove_metadata().equals(GENERATIONS)
        assert found.equals(alone(read_parquet(source / "examples" / name, INPUT_COLUMNS)))
    manifest = run.manifest("generate")
    prepared_before = source.manifest("prepare")
    assert manifest is not None
    assert prepared_before is not None
    assert manifest.counts == dict.fromkeys(("examples", "generated", "ok"), prepared_before.counts["prepared"])
    assert manifest.damage(run.folder) == []


@pytest.mark.slow
def test_a_run_goes_on_shard_by_shard(prepared: Path, generated: Path, base_folder: Path, tmp_path: Path) -> None:
    run, source = Run.at(shutil.copytree(generated, tmp_path / "run")), Run.at(prepared)
    model = Checkpoint.find(str(base_folder))
    before = {name: (run / "generations" / name).read_bytes() for name in (run / "generations").names()}
    lost, damaged, *_ = before
    (run / "manifests" / "generate.json").remove()
    (run / "generations" / lost).remove()
    (run / "generations" / damaged).write_bytes(before[damaged][:-30])
    other = GenerateConfig(max_new_tokens=5)
    with pytest.raises(OutputError, match=r"unfinished generate.*max_new_tokens: 6 → 5"):
        generate(run, model, other, pool(), examples=source)
    manifest = generate(run, model, CONFIG, pool(), examples=source)
    assert manifest.details["shards_done_by_this_driver"] == 2
    assert {name: (run / "generations" / name).read_bytes() for name in before} == before
    assert generate(run, model, CONFIG, pool(), examples=source).seconds == manifest.seconds
    with pytest.raises(OutputError, match="max_new_tokens: 6 → 5"):
        generate(run, model, other, pool(), examples=source)
    redone = generate(replace(run, overwrite=True), model, other, pool(), examples=source)
    assert redone.details["shards_done_by_this_driver"] == len(before)


@pytest.mark.slow
def test_only_the_sources_that_are_asked_for(prepared: Path, base_folder: Path, tmp_path: Path) -> None:
    source, model = Run.at(prepared), Checkpoint.find(str(base_folder))
    run = Run.at(tmp_path / "run")
    with pytest.raises(ConfigError, match="'mbpp'; there are alpaca, gsm8k"):
        generate(run, model, GenerateConfig(sources=["mbpp"]), pool(), examples=source)
    manifest = generate(run, model, GenerateConfig(max_new_tokens=1, sources=["gsm8k"]), pool(), examples=source)
    rows = table_of(run, "generations").to_pylist()
    assert {row["source"] for row in rows} == {"gsm8k"}
    assert len(rows) == manifest.counts["examples"] == ROWS


@pytest.mark.slow
def test_mistakes_are_told_before_anything_is_loaded(prepared: Path, base_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    run, found = Run.at(tmp_path / "run"), Checkpoint.find(str(adapter))
    with pytest.raises(ModelError, match="is an adapter; give the base"):
        generate(run, found, CONFIG, pool(), examples=Run.at(prepared))
    with pytest.raises(OutputError, match="no complete prepare stage"):
        generate(run, Checkpoint.find(str(base_folder)), CONFIG, pool())


@pytest.mark.slow
def test_matches_can_be_counted_again_from_the_files(prepared: Path, generated: Path, tmp_path: Path) -> None:
    """Texts are replaced by ones with known answers; the stage's files and counts follow."""
    run, source = Run.at(shutil.copytree(generated, tmp_path / "run")), Run.at(prepared)
    answers = {row["example_id"]: row["response"] for row in table_of(source, "examples").to_pylist()}
    expected = sum("#### " in answer for answer in answers.values())
    found = {"examples": 2 * ROWS, "expected": expected, "strict": 0, "flexible": 0}
    assert match(run, examples=source).counts == found
    generations = table_of(run, "generations").to_pylist()
    generations = [row for row in generations if row["source"] == "gsm8k"]
    for number, row in enumerate(generations):
        gold = answers[row["example_id"]].split("#### ")[-1]
        row["output"] = [f"So.\n#### {gold}", f"The answer is ${gold}.00.", "#### 123456789"][number % 3]
    generations[5] |= {"output": None, "status": "out_of_memory"}
    examples = table_of(source, "examples")
    gold = examples.filter(np.isin(np.asarray(examples["example_id"]), [row["example_id"] for row in generations]))
    table = matched(pa.Table.from_pylist(generations, GENERATIONS), gold)
    assert table.schema.equals(MATCHES)
    rows = table.to_pylist()
    assert [row["strict"] for row in rows[:6]] == [True, False, False, True, False, None]
    assert [row["flexible"] for row in rows[:6]] == [True, True, False, True, True, None]
    for row in rows:
        assert Fraction(row["expected"]) == Fraction(answers[row["example_id"]].split("#### ")[-1].replace(",", ""))


def test_of_several_turns_no_answer_is_expected() -> None:
    """A text continues the first of them, and the answer stands in the last."""
    generated = [{"example_id": number, "source": "s", "output": "#### 7", "status": "ok"} for number in range(2)]
    gold = [{"example_id": n, "response": "#### 7", "record": None, "response_spans": [4, 9] * (n + 1)} for n in (0, 1)]
    rows = matched(pa.Table.from_pylist(generated, GENERATIONS), pa.Table.from_pylist(gold)).to_pylist()
    assert [(row["expected"], row["strict"]) for row in rows] == [("7", True), (None, None)]


@pytest.mark.slow
def test_matches_are_counted_by_source_and_redone_freely(prepared: Path, generated: Path, tmp_path: Path) -> None:
    run, source = Run.at(shutil.copytree(generated, tmp_path / "run")), Run.at(prepared)
    manifest = match(run, examples=source)
    rows = table_of(run, "matches").to_pylist()
    assert manifest.counts["flexible"] == sum(bool(row["flexible"]) for row in rows)
    assert manifest.details["by_source"]["alpaca"]["examples"] == ROWS
    assert manifest.details["by_source"]["gsm8k"]["expected"] == ROWS
    assert match(run, examples=source).seconds == manifest.seconds
    body = json.loads((run / "manifests" / "match.json").read_bytes())
    assert {entry["name"] for entry in body["files"]} == {f"matches/{name}" for name in (run / "matches").names()}


def test_measures_follow_prepare_and_nothing_else(local: Location) -> None:
    assert from_stage("generate") == ["generate", "match", "outputs"]
    assert from_stage("rank") == ["rank", "select", "stability", "report"]
    assert from_stage("prepare")[-3:] == ["generate", "match", "outputs"]
    (local / "generations" / "a.parquet").write_bytes(b"a")
    Run(local).clear("finetune")
    assert (local / "generations").exists()
    Run(local).clear("prepare")
    assert not (local / "generations").exists()
