"""Six hundred small shards: memory, open files and temporary folders of every process stay what they were."""

import itertools
import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from drivers import Driver
from ray.data._internal.execution.no_progress_guard import NoProgressGuard

from davir_ray.cli import parse_as
from davir_ray.config.run import RunConfig
from davir_ray.errors import ProgressError
from davir_ray.pipeline import run_all
from davir_ray.run.folder import Run

log = logging.getLogger(__name__)

pytestmark = pytest.mark.slow

NUM_SHARDS = 600
MOST_GROWTH_MB = {"driver": 24, "actor": 12}
"""Of a process over half of the shards; 100 kB a shard would be 30 MB in the driver, and 15 MB in each actor."""


@dataclass(frozen=True)
class Load:
    """Of one process."""

    resident_mb: float
    num_files: int


def load(pid: int) -> Load:
    process = psutil.Process(pid)
    return Load(process.memory_info().rss / 2**20, process.num_fds())


def scored(run: Run, count: int) -> Callable[[], bool]:
    """Whether so many shards are scored by now."""
    return lambda: len(list(Path(run.folder.path, "scores").glob("*.parquet"))) >= count


@pytest.fixture
def options(base_folder: Path, reference_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a run over many short rows."""
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"Count to {row}.", "response": f"one two {row}"}) for row in range(NUM_SHARDS)]
    file.write_text("\n".join(lines))
    return {
        "data": file, "format": "prompt_response", "base": base_folder, "reference": reference_folder,
        "output": tmp_path / "run", "select.top_k": 5, "debug": "true",
    }  # fmt: skip


def test_many_shards_leave_no_trace_in_memory(options: dict[str, Any], tmp_path: Path) -> None:
    run = Run.at(options["output"])
    options |= {"prepare.shard_rows": 1, "score.num_actors": 2, "keep_token_nll": "all"}
    with tempfile.TemporaryDirectory(prefix="r") as temporary:
        driver = Driver(
            "score.py",
            options,
            tmp_path / "log",
            {"TMPDIR": temporary, "RAY_TMPDIR": temporary},
        )
        # The actors are far ahead of what is written, and end when they are done.
        driver.wait_for(lambda: driver.output.count(" rows, ") >= NUM_SHARDS // 4, "a quarter of the shards", 600)
        pids = {"driver": driver.process.pid} | {f"actor {pid}": pid for pid in driver.actors()}
        first, first_files = {name: load(pid) for name, pid in pids.items()}, temporary_files(temporary)
        driver.wait_for(lambda: driver.output.count(" rows, ") >= NUM_SHARDS * 3 // 4, "three quarters", 600)
        last = {name: load(pid) for name, pid in pids.items()}
        driver.wait_for(scored(run, NUM_SHARDS - 20), "the last files", 600)
        last["driver"], last_files = load(driver.process.pid), temporary_files(temporary)
        assert driver.finish() == 0, driver.output
    manifest = run.manifest("score")
    assert manifest is not None
    assert manifest.counts["scored"] == len(manifest.files) == NUM_SHARDS
    assert len(first) == 3
    log.info("loads: %s, then %s; temporary files %d, then %d", first, last, first_files, last_files)
    for name, before in first.items():
        most = MOST_GROWTH_MB[name.split()[0]]
        assert last[name].resident_mb - before.resident_mb < most, (name, before, last[name])
        assert last[name].num_files - before.num_files < 16, (name, before, last[name])
    assert last_files - first_files < 16


def temporary_files(folder: str) -> int:
    """Files and folders outside Ray's own logs."""
    return sum("/logs/" not in str(path) for path in Path(folder).rglob("*"))


def scoring_actor() -> psutil.Process:
    """The only one of this process's Ray."""
    while True:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "ShardWorker" in " ".join(child.cmdline()):
                    return child


@pytest.mark.usefixtures("ray_session")
def test_a_stuck_run_ends_with_its_reason(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The only actor is stopped. Until then the clock of the limit stands; then each look at it takes a second."""
    looks, stopped = itertools.count(), list[psutil.Process]()
    defaults = NoProgressGuard.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "clock", lambda: float(next(looks)) if stopped else 0.0)
    run = Run.at(options["output"])
    is_scored = scored(run, 3)
    options |= {"limit": 60, "prepare.shard_rows": 1, "score.num_actors": 1, "score.no_progress_timeout_s": 20}

    def stop() -> None:
        while not is_scored():
            time.sleep(0.02)
        actor = scoring_actor()
        actor.suspend()
        stopped.append(actor)

    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(ProgressError, match=r"stuck \(score\.no_progress_timeout_s\): .*timeout: 20s"):
            run_all(parse_as(RunConfig, [f"--{name}={value}" for name, value in options.items()]))
    finally:
        for actor in stopped:
            with suppress(psutil.NoSuchProcess):
                actor.kill()
    assert stopped
    assert run.manifest("score") is None
