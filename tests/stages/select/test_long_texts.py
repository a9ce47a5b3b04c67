"""Selecting rows whose texts are so long that memory and not the number of rows decides how many a task may take."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from process_memory import anonymous_bytes

from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.data.task_report import TEXT_BYTES
from davir_ray.run.files import FileEntry, in_folder, read_parquet, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.schema import EXAMPLES, SCORES
from davir_ray.stages.rank import rank
from davir_ray.stages.select.rule import select

NUM_SHARDS, SHARD_ROWS, CHARACTERS = 12, 125, 500_000
NUM_ROWS = NUM_SHARDS * SHARD_ROWS


def response(example_id: int) -> str:
    """Random text, which hardly compresses."""
    return np.random.default_rng(example_id).bytes(CHARACTERS // 2).hex()


def make_run(folder: Path) -> Run:
    """Scores and examples as score and prepare would commit them."""
    run = Run.at(folder)
    files: dict[str, list[FileEntry]] = {"scores": [], "examples": []}
    for number in range(NUM_SHARDS):
        ids = range(number * SHARD_ROWS, (number + 1) * SHARD_ROWS)
        columns: dict[str, Any] = {
            "example_id": ids,
            "content_hash": ids,
            "source": ["long"] * SHARD_ROWS,
            "davir": np.random.default_rng(number).integers(0, 50, SHARD_ROWS) / 50,
            "status": ["ok"] * SHARD_ROWS,
            "num_response_tokens": [100_000] * SHARD_ROWS,
            "prompt": [str(example_id) for example_id in ids],
            "response": [response(example_id) for example_id in ids],
        }
        for name, schema in {"scores": SCORES, "examples": EXAMPLES}.items():
            found = {field.name: columns.get(field.name, pa.nulls(SHARD_ROWS, field.type)) for field in schema}
            place = run / name / f"part-{number:05d}.parquet"
            files[name].append(write_parquet(place, pa.table(found, schema=schema)))
    for stage, name, counts, details in (
        ("prepare", "examples", {"prepared": NUM_ROWS}, {TEXT_BYTES: CHARACTERS}),
        ("score", "scores", {"examples": NUM_ROWS, "scored": NUM_ROWS}, {}),
    ):
        found = in_folder(name, files[name])
        Manifest(stage=stage, fingerprint={}, counts=counts, files=found, details=details).write(run.folder)
    return run


@contextmanager
def largest_worker() -> Iterator[list[int]]:
    """The memory of the largest of this process' Ray workers, without the object store, as long as the block lasts."""
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.cmdline()[0].startswith("ray::"):
                        most[0] = max(most[0], anonymous_bytes(process.pid))
                except (psutil.NoSuchProcess, OSError, IndexError, StopIteration):  # it ends just now
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
def test_long_texts_are_selected_in_little_memory(ray_session: None, tmp_path: Path) -> None:
    """1,500 rows of 500 kB, with each worker below 1.5 GB: as much memory as it takes for more rows."""
    run = make_run(tmp_path / "run")
    with largest_worker() as most:
        rank(run, RankConfig())
        manifest = select(run, RankConfig(), SelectConfig(top_fraction=1.0))
    assert most[0] < 1.5e9
    scores = pa.concat_tables([read_parquet(run / "scores" / name) for name in (run / "scores").names()])
    ids, davir = np.asarray(scores["example_id"]), np.asarray(scores["davir"])
    expected = ids[np.lexsort((ids, -davir))].tolist()
    selected = []
    for entry in manifest.files_in("selected"):
        table = read_parquet(run / "selected" / entry.name, ["example_id", "response"])
        selected += table["example_id"].to_pylist()
        assert table["response"].to_pylist() == [response(example_id) for example_id in selected[-table.num_rows :]]
    assert selected == expected
