"""Scores do not depend on the number of actors or the cut into shards, and a shard is one block or nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray.data
from safetensors.torch import save_file

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.sources import Source
from davir_ray.engine import pool
from davir_ray.engine.blocks import ShardBlocks
from davir_ray.engine.connect import whole_block_context
from davir_ray.engine.pool import ShardWorker, Stream
from davir_ray.engine.progress import WorkDone
from davir_ray.engine.resources import pool_size
from davir_ray.errors import ClusterError, IntegrityError, ModelError, OutputError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.commits import CommittedShard, ShardFolder
from davir_ray.run.files import FINGERPRINT_KEY, FileEntry, read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.schema import SCORES
from davir_ray.stages.prepare import Preparation, prepare
from davir_ray.stages.score import _fingerprint, score, scorer_settings
from davir_ray.versions import NUMERICS_VERSION

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS = 100
COLUMNS = ["base_nll", "reference_nll", "davir", "rho_sum", "rho_mean"]
Score = Callable[[str, int], Location]


def prepared_run(folder: Path, data_folder: Path, base_folder: Path, shard_rows: int) -> Run:
    source = Source(name="alpaca", path=str(data_folder / "alpaca_9k.jsonl.gz"), format="alpaca")
    base = Checkpoint.find(str(base_folder))
    settings = Preparation(base=base, config=PrepareConfig(max_tokens=256, shard_rows=shard_rows), limit=ROWS)
    prepare(Run.at(folder), [source], settings, max_bad_fraction=1)
    return Run.at(folder)


@pytest.fixture(scope="module")
def prepared(data_folder: Path, base_folder: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(prepared_run(tmp_path_factory.mktemp("prepared") / "run", data_folder, base_folder, 15).folder.path)


def score_run(run: Run, base_folder: Path, reference_folder: Path, num_actors: int) -> Manifest:
    base, reference = Checkpoint.find(str(base_folder)), Checkpoint.find(str(reference_folder))
    return score(run, base, reference, ScoreConfig(num_actors=num_actors, precision="float32"))


def table_of(run: Run) -> pd.DataFrame:
    return pa.concat_tables([read_parquet(run / "scores" / name) for name in (run / "scores").names()]).to_pandas()


@pytest.mark.slow
def test_bits_are_equal_for_any_number_of_actors_and_close_for_any_shards(
    prepared: Path, data_folder: Path, base_folder: Path, reference_folder: Path, tmp_path: Path
) -> None:
    runs = {}
    for num_actors in (1, 3):
        runs[num_actors] = Run.at(shutil.copytree(prepared, tmp_path / f"actors-{num_actors}"))
        manifest = score_run(runs[num_actors], base_folder, reference_folder, num_actors)
        assert manifest.counts["examples"] == ROWS
    names = (runs[1] / "scores").names()
    assert names == (runs[3] / "scores").names() == (runs[1] / "examples").names()
    assert len(names) == 7
    for name in names:
        assert (runs[1] / "scores" / name).read_bytes() == (runs[3] / "scores" / name).read_bytes()
        examples, scores = (read_parquet(runs[1] / folder / name) for folder in ("examples", "scores"))
        for column in ("example_id", "content_hash", "source", "num_prompt_tokens", "num_response_tokens", "truncated"):
            assert examples[column].equals(scores[column])
    whole = prepared_run(tmp_path / "whole", data_folder, base_folder, 4096)
    score_run(whole, base_folder, reference_folder, 1)
    one, other = (table_of(run).sort_values("example_id").reset_index(drop=True) for run in (runs[1], whole))
    assert len((whole / "scores").names()) == 1
    assert one["example_id"].equals(other["example_id"])
    for column in COLUMNS[:2]:
        np.testing.assert_allclose(one[column], other[column], rtol=1e-6)
    for column in COLUMNS[2:]:
        np.testing.assert_allclose(one[column], other[column], rtol=1e-6, atol=1e-6 * one["base_nll"].max())


class Told:
    """A counter that keeps what it is told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.done: dict[str, WorkDone] = {}

    def begin(self, key: str) -> None:
        self.begun.append(key)

    def report(self, key: str, work: WorkDone) -> None:
        self.done[key] = work


class Model:
    """Gives the first example of every shard another status."""

    numerics: ClassVar[dict[str, Any]] = {"kind": "none"}

    def __call__(self, examples: pa.Table) -> pa.Table:
        rows = examples.num_rows
        columns = {field.name: pa.nulls(rows, field.type) for field in SCORES}
        columns |= {"num_prompt_tokens": pa.array([3] * rows, pa.int32())}
        columns |= {"num_response_tokens": pa.array([4] * rows, pa.int32())}
        return pa.table(columns | {"status": pa.array(["zero_base_nll", *["ok"] * rows][:rows])})


def named(rows: int, shard: str, shard_rows: int) -> pa.Table:
    ids = pa.array(range(rows), pa.int64())
    return pa.table({"example_id": ids, "shard": [shard] * rows, "shard_rows": pa.array([shard_rows] * rows)})


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardWorker:
    """An actor's worker in this process, whose logging stays as it is."""
    monkeypatch.setattr(pool, "configure_worker_logging", lambda: None)
    run = Run.at(tmp_path)
    stream = Stream(
        stage="score", run=run, folder="scores", schema=SCORES, fingerprint={}, examples=run, shards=[],
        columns=["example_id"], ok_count="scored", new_detail="new",
    )  # fmt: skip
    folder = ShardFolder(place=run / "scores", schema=SCORES, fingerprint='"mark"')
    return ShardWorker(stream, Told(), folder, Model)  # type: ignore[arg-type]


def test_an_actor_commits_each_shard_of_a_block_under_its_name(tmp_path: Path, worker: ShardWorker) -> None:
    committed = worker(pa.concat_tables([named(3, "a.parquet", 3), named(1, "b.parquet", 1)]))["committed"].to_pylist()
    shards = [CommittedShard.from_json(text, '"mark"') for text in committed]
    assert [(shard.entry.name, shard.entry.rows, shard.statuses) for shard in shards] == [
        ("a.parquet", 3, {"ok": 2, "zero_base_nll": 1}), ("b.parquet", 1, {"zero_base_nll": 1}),
    ]  # fmt: skip
    told = worker._counter
    assert isinstance(told, Told)
    assert told.done["a.parquet"] == WorkDone(3, rows=3, tokens=21, unscored=1)
    written = read_parquet(Run.at(tmp_path) / "scores" / "a.parquet")
    assert written.schema.metadata[FINGERPRINT_KEY] == b'"mark"'
    assert written.schema.remove_metadata().equals(SCORES)


def test_what_an_actor_that_died_had_committed_of_a_block_is_not_done_again(worker: ShardWorker) -> None:
    shards = [named(2, f"{name}.parquet", 2) for name in "abc"]
    first = worker(pa.concat_tables(shards[:2]))["committed"].to_pylist()
    again = worker(pa.concat_tables(shards))["committed"].to_pylist()
    told = worker._counter
    assert isinstance(told, Told)
    assert told.begun == ["a.parquet", "b.parquet", "c.parquet"]
    for text, before in zip(again, first, strict=False):
        assert CommittedShard.from_json(text, "") == CommittedShard.from_json(before, "")


def test_a_shard_that_another_drivers_actor_committed_is_done_again(tmp_path: Path, worker: ShardWorker) -> None:
    other = ShardFolder(place=Run.at(tmp_path) / "scores", schema=SCORES, fingerprint='"another"')
    other.commit("a.parquet", Model()(named(2, "a.parquet", 2)), "{}")
    worker(pa.concat_tables([named(2, "a.parquet", 2), named(2, "b.parquet", 2)]))
    told = worker._counter
    assert isinstance(told, Told)
    assert told.begun == ["a.parquet", "b.parquet"]
    again = other.read("a.parquet", 2)
    assert again is not None
    assert again.fingerprint == '"mark"'


@pytest.mark.parametrize(
    "torn",
    [
        named(2, "a.parquet", 3),
        named(4, "a.parquet", 3),
        pa.concat_tables([named(1, "a.parquet", 2), named(1, "b.parquet", 1), named(1, "a.parquet", 2)]),
        named(0, "a.parquet", 0),
    ],
    ids=["a part", "more", "two parts", "empty"],
)
def test_an_actor_refuses_a_shard_that_is_not_whole(tmp_path: Path, worker: ShardWorker, torn: pa.Table) -> None:
    with pytest.raises(IntegrityError, match="arrived in one block"):
        worker(torn)
    assert not (tmp_path / "scores").exists()


@pytest.fixture
def stage(tmp_path: Path) -> tuple[Stream, ShardFolder]:
    """A stage of two shards of three rows, and the folder of its files."""
    run = Run.at(tmp_path)
    Manifest(stage="prepare", fingerprint={}, counts={"rejected": 0}, files=[]).write(run.folder)
    shards = [FileEntry(name=f"part-{number}.parquet", rows=3, bytes=9, sha256="") for number in range(2)]
    stream = Stream(
        stage="score", run=run, folder="scores", schema=SCORES, fingerprint={}, examples=run, shards=shards, columns=[],
        ok_count="scored", new_detail="new",
    )  # fmt: skip
    return stream, ShardFolder(place=run / "scores", schema=SCORES, fingerprint="{}")


def commit(folder: ShardFolder, number: int, rows: int = 3, numerics: str = "{}") -> CommittedShard:
    return folder.commit(f"part-{number}.parquet", Model()(named(rows, "any", rows)), numerics)


def fill(stream: Stream, sent: list[CommittedShard], monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """The stage whose actors have committed these shards."""
    monkeypatch.setattr(Stream, "_committed", lambda *_: [])
    monkeypatch.setattr(Stream, "_send", lambda *_: sent)
    return stream.fill(lambda: pytest.fail("a model was loaded"), ScoreConfig())


def test_rows_that_were_lost_or_are_too_many_are_noticed(
    stage: tuple[Stream, ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, folder = stage
    first = commit(folder, 0)
    for sent, rows in (([first], 3), ([first, commit(folder, 1, rows=4)], 7)):
        with pytest.raises(IntegrityError, match=f"6 examples were prepared but {rows} rows of scores written"):
            fill(stream, sent, monkeypatch)
    found = fill(stream, [first, commit(folder, 1)], monkeypatch)
    assert found.counts == {"examples": 6, "scored": 4, "ok": 4, "zero_base_nll": 2}


def test_a_shard_that_a_worker_wrote_after_its_successor_counts_as_it_is(
    stage: tuple[Stream, ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It outlived its node on another kind of GPU, whose bits and name are others."""
    stream, folder = stage
    sent = [commit(folder, 0), commit(folder, 1)]
    late = commit(folder, 1, numerics='{"device_name": "another"}')
    manifest = fill(stream, sent, monkeypatch)
    assert manifest.counts == {"examples": 6, "scored": 4, "ok": 4, "zero_base_nll": 2}
    assert [entry.sha256 for entry in manifest.files] == [sent[0].entry.sha256, late.entry.sha256]
    assert late.entry.sha256 != sent[1].entry.sha256
    assert manifest.details["numerics"] == [{"device_name": "another"}, {}]
    assert manifest.damage(stream.run.folder, trust_marks=False) == []
    commit(replace(folder, fingerprint='{"settings": 2}'), 0)
    with pytest.raises(IntegrityError, match=r"part-0\.parquet was written with other settings"):
        fill(replace(stream, fingerprint={}), sent, monkeypatch)


def test_every_shard_is_one_block_whatever_its_size() -> None:
    sizes = {"a": 1, "b": 3, "c": 2000}

    def read(name: str) -> pa.Table:
        return pa.table({"name": [name] * sizes[name], "fill": ["x" * 2000] * sizes[name]})

    def describe(table: pa.Table) -> pa.Table:
        return pa.table({"name": [",".join(sorted(set(table["name"].to_pylist())))], "rows": [table.num_rows]})

    groups = [[FileEntry(name=name, rows=rows, bytes=1, sha256="")] for name, rows in sizes.items()]
    shards = ShardBlocks(groups, read)
    context = whole_block_context(60)
    assert context.target_max_block_size is None
    with ray.data.DataContext.current(context):
        dataset = ray.data.read_datasource(shards, **shards.read_options)
        rows = dataset.map_batches(describe, batch_size=None, batch_format="pyarrow").take_all()
    assert {row["name"]: row["rows"] for row in rows} == sizes


def test_a_pool_leaves_a_cpu_for_reading_and_writing() -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    assert pool_size(None, 1, 0) == cpus - 1
    assert pool_size(2, 0.5, 0) == 2
    for wanted, num_cpus, num_gpus in [(cpus, 1, 0), (1, cpus, 0), (None, cpus, 0), (1, 1, 1)]:
        with pytest.raises(ClusterError, match="do not fit"):
            pool_size(wanted, num_cpus, num_gpus)


@pytest.mark.parametrize("modules", [None, ["lm_head"]], ids=str)
def test_scores_of_an_adapter_without_its_trained_modules_are_not_complete(
    base_folder: Path, tmp_path: Path, modules: list[str] | None
) -> None:
    """Its manifest says nothing of them; that of any other adapter need not."""
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "modules_to_save": modules}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({}, adapter / "adapter_model.safetensors")
    run, config = Run.at(tmp_path / "run"), ScoreConfig(precision="float32")
    prepared = Manifest(stage="prepare", fingerprint={}, counts={"prepared": 1}, files=[]).commit(run.folder)
    base, reference = Checkpoint.find(str(base_folder)), Checkpoint.find(str(adapter))
    fingerprint = {
        "base": base.weights_digest(),
        "reference": reference.weights_digest(),
        "examples": prepared.content,
        "settings": {
            "precision": "float32",
            "num_threads": 1,
            "keep_token_nll": "sample",
            "sample_share": 1.0,
            "autocast": "float32",
            "device": "cpu",
        },
        "numerics": NUMERICS_VERSION,
    }
    before = Manifest(stage="score", fingerprint=fingerprint, counts={"scored": 1}, files=[]).commit(run.folder)
    if modules is None:
        assert score(run, base, reference, config) == before
        return
    with pytest.raises(OutputError, match="score differs in modules_to_save"):
        score(run, base, reference, config)


def test_scores_of_compiled_layers_are_not_those_of_a_run_without(base_folder: Path, tmp_path: Path) -> None:
    run, base = Run.at(tmp_path / "run"), Checkpoint.find(str(base_folder))
    Manifest(stage="prepare", fingerprint={}, counts={"prepared": 1}, files=[]).commit(run.folder)
    config = ScoreConfig(precision="float32", compile=True)
    settings = replace(scorer_settings(config, "sample", 1.0), num_threads=1)
    fingerprint = _fingerprint(base, base, run.require("prepare"), settings)
    done = Manifest(stage="score", fingerprint=fingerprint, counts={"scored": 1}, files=[]).commit(run.folder)
    assert score(run, base, base, config) == done
    with pytest.raises(OutputError, match=r"score differs in .*compile"):
        score(run, base, base, replace(config, compile=False))


@pytest.mark.slow
def test_an_actor_that_cannot_load_its_model_says_why(
    prepared: Path, base_folder: Path, reference_folder: Path, tmp_path: Path
) -> None:
    run = Run.at(shutil.copytree(prepared, tmp_path / "run"))
    broken = shutil.copytree(reference_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        score_run(run, base_folder, broken, 1)
    assert run.manifest("score") is None
    assert not (run / "scores").exists()
