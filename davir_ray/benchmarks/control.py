"""The scoring stage over many small shards: what is left when the model costs almost nothing.

Each driver is a process of its own, watched from outside by its files, so that it can be killed half-way as a lost one.
"""

import json
import logging
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.state
import torch

from davir_ray.benchmarks.processes import python_process
from davir_ray.benchmarks.scaling import save_pair, write_shards
from davir_ray.benchmarks.workload import SMALL_LLAMA, load_examples, load_model
from davir_ray.cli import exit_status
from davir_ray.config.checks import check
from davir_ray.config.scoring import ScoreConfig
from davir_ray.engine.connect import connected
from davir_ray.errors import IntegrityError, ProgressError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.folder import Run
from davir_ray.run.manifest import library_versions
from davir_ray.stages.score import score

log = logging.getLogger(__name__)

_TINY_LLAMA = {
    **SMALL_LLAMA,
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_TOKENS_PER_ROW = 16

_DRIVER = "import sys; from davir_ray.benchmarks.control import drive; sys.exit(drive(sys.argv[1]))"

_PREPARED, _WARM_UP, _WHOLE, _KILLED = "prepared", "warm-up", "whole", "killed"
"""Runs in the benchmark's folder: two with examples, and two that the examples of the first are scored into."""

_BEGUN, _ENDED = "begun.json", "ended.json"
"""What a driver says of itself, in the folder of its run."""

_POLL_S = 0.02
_IDLE_S = 300
"""Seconds without a finished task after which a driver gives up."""

_STARTS_AT = 0.1
"""Share of the shards from which on the driver's memory counts."""


@dataclass(frozen=True, kw_only=True)
class ControlBenchmark:
    """Measure how fast the scoring stage commits many small shards, and what that costs its driver.

    It runs on the cluster of RAY_ADDRESS or of the submitted job, else on a local Ray that it starts before the
    measurement.
    """

    json: str | None = None
    """File for the result."""
    shards: int = 1000
    """Number of shards."""
    rows: int = 1
    """Number of examples in a shard."""
    actors: int = 2
    """Number of actors."""
    folder: str | None = None
    """Folder for the files, which are removed at the end; every node must see it. None: a temporary folder."""

    def __post_init__(self) -> None:
        for name, minimum in {"shards": 20, "rows": 1, "actors": 1}.items():
            check(getattr(self, name) >= minimum, name, getattr(self, name), f"at least {minimum}")


def run(settings: ControlBenchmark) -> dict[str, Any]:
    """Score once as a whole, once more, and once with a kill half-way; returns the contents of the JSON file."""
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder, connected():
        return measure(Path(folder), settings)


def measure(folder: Path, settings: ControlBenchmark) -> dict[str, Any]:
    """The result of `run`; leaves the runs in the folder."""
    _prepare(folder, settings)
    result = {"settings": asdict(settings), "rows": settings.shards * settings.rows}
    result |= _whole(folder, settings) | _resumed(folder, settings)
    machine = {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    return {
        **result,
        "versions": library_versions(),
        "machine": {**machine, "cluster": ray.cluster_resources(), "date": time.strftime("%Y-%m-%d")},
    }


def _prepare(folder: Path, settings: ControlBenchmark) -> None:
    """Write the models and the shards, and a few more for a warm-up."""
    model, _ = load_model(None, json.dumps(_TINY_LLAMA), torch.float32, torch.device("cpu"))
    save_pair(folder, model)
    vocab_size = _TINY_LLAMA["vocab_size"]
    examples, _ = load_examples(settings.rows, _TOKENS_PER_ROW, vocab_size, None, None, "alpaca", [_TOKENS_PER_ROW])
    write_shards(Run.at(folder / _PREPARED), examples, settings.shards)
    write_shards(Run.at(folder / _WARM_UP), examples, 2 * settings.actors)


def _whole(folder: Path, settings: ControlBenchmark) -> dict[str, float]:
    """What one warm driver does from the first shard to the last, and how long the next one takes to see that."""
    with _driver(folder, _WHOLE, settings, warm_up=True) as process:
        _wait_for_files(process, folder / _WHOLE, _STARTS_AT * settings.shards)
        sizes = [_resident_mib(process)]
        while process.poll() is None:
            sizes.append(_resident_mib(process))
            time.sleep(10 * _POLL_S)
    begun, ended = _notes(process, folder / _WHOLE)
    # Milliseconds since the epoch, of when the actor's constructor was over; Ray has no public way without a dashboard.
    actors = [actor["StartTime"] / 1000 for actor in _actors(begun["job"]) if "ShardWorker" in actor["ActorClassName"]]
    ready = min(at for at in actors if at > begun["at"])
    written = _written(folder / _WHOLE)
    with _driver(folder, _WHOLE, settings) as process:
        process.wait()
    _, again = _notes(process, folder / _WHOLE)
    if len(written) != settings.shards or again["shards"] != ended["shards"] or written != _written(folder / _WHOLE):
        raise IntegrityError(f"{len(written)} of {settings.shards} shards were scored, or some of them twice")
    return {
        "score_shards_per_second": len(written) / (written[-1] - ready),
        "first_commit_seconds": written[0] - ready,
        "driver_cpu_seconds": ended["cpu_seconds"],
        "driver_growth_mib": max(*sizes, ended["resident_mib"]) - sizes[0],
        "stage_seconds": ended["seconds"],
        "actor_start_seconds": ready - begun["at"],
        "recheck_seconds": again["seconds"],
    }


def _resumed(folder: Path, settings: ControlBenchmark) -> dict[str, float]:
    """How long the successor of a driver that is killed half-way takes to commit a shard."""
    with _driver(folder, _KILLED, settings) as process:
        _wait_for_files(process, folder / _KILLED, settings.shards / 2)
        process.kill()
    begun = json.loads((folder / _KILLED / _BEGUN).read_text())
    while any(actor["State"] != "DEAD" for actor in _actors(begun["job"])):  # they go on with what they have
        time.sleep(_POLL_S)
    with _driver(folder, _KILLED, settings) as process:
        process.wait()
    begun, ended = _notes(process, folder / _KILLED)
    written = _written(folder / _KILLED)
    new = [at for at in written if at >= begun["at"]]  # the next driver's imports outlast what the old actors still do
    if not new:
        raise ProgressError("all shards were scored before the kill took effect; give more shards")
    if len(written) != settings.shards or len(new) != ended["new_shards"]:
        raise IntegrityError(
            f"of {settings.shards} shards {len(written)} are there, and {len(new)} of them are new, but the driver "
            f"scored {ended['new_shards']}"
        )
    return {
        "resume_seconds": new[0] - begun["at"],
        "shards_before_kill": len(written) - len(new),
        "shards_after_resume": len(new),
    }


@contextmanager
def _driver(
    folder: Path, name: str, settings: ControlBenchmark, *, warm_up: bool = False
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that scores the shards into a run; it has ended after the block."""
    given = {"folder": str(folder), "name": name, "actors": settings.actors, "warm_up": warm_up}
    (folder / name).mkdir(exist_ok=True)
    for note in (_BEGUN, _ENDED):
        (folder / name / note).unlink(missing_ok=True)
    variables = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with python_process(_DRIVER, given, folder / name / "log.txt", variables) as process:
        yield process


def drive(given: str) -> int:
    """Score the shards as a job does, in a process of its own; returns the exit status."""
    return exit_status(lambda: _drive(**json.loads(given)))


def _drive(folder: str, name: str, actors: int, warm_up: bool) -> None:
    base, reference = (Checkpoint.find(f"{folder}/{model}") for model in ("base", "reference"))
    with connected():
        share = (ray.cluster_resources()["CPU"] - 1) / actors
        config = ScoreConfig(num_actors=actors, num_cpus=min(1.0, share), num_gpus=0.0, no_progress_timeout_s=_IDLE_S)
        if warm_up:
            score(Run.at(f"{folder}/{_WARM_UP}"), base, reference, config, keep_token_nll="none")
        run, examples = Run.at(f"{folder}/{name}"), Run.at(f"{folder}/{_PREPARED}")
        begun = {"job": ray.get_runtime_context().get_job_id(), "at": time.time()}
        (run / _BEGUN).write_text(json.dumps(begun))
        cpu_before = time.process_time()
        manifest = score(run, base, reference, config, keep_token_nll="none", examples=examples)
        ended = {
            "seconds": time.time() - begun["at"],
            "cpu_seconds": time.process_time() - cpu_before,
            "resident_mib": psutil.Process().memory_info().rss / 2**20,
            "shards": len(manifest.files),
            "new_shards": manifest.details["shards_scored_by_this_driver"],
        }
        (run / _ENDED).write_text(json.dumps(ended))


def _wait_for_files(process: "subprocess.Popen[bytes]", folder: Path, number: float) -> None:
    while len(_names(folder)) < number:
        if process.poll() is not None:
            _notes(process, folder)  # raises
        time.sleep(_POLL_S)


def _notes(process: "subprocess.Popen[bytes]", folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a driver that has ended said at its stage's begin and end; raises ProgressError if it failed."""
    if process.returncode != 0:
        text = (folder / "log.txt").read_text(errors="replace")
        raise ProgressError(f"a driver ended with status {process.returncode}; the end of its output: {text[-500:]}")
    begun, ended = (json.loads((folder / note).read_text()) for note in (_BEGUN, _ENDED))
    return begun, ended


def _actors(job: str) -> list[dict[str, Any]]:
    """The actors of a driver, also those that are gone."""
    return [actor for actor in ray._private.state.actors().values() if actor["JobID"] == job]


def _names(folder: Path) -> list[str]:
    """The committed shards of a run."""
    place = folder / "scores"
    return [name for name in os.listdir(place) if name.endswith(".parquet")] if place.exists() else []


def _written(folder: Path) -> list[float]:
    """When each shard of a run was committed, in seconds since the epoch, ascending."""
    return sorted((folder / "scores" / name).stat().st_mtime for name in _names(folder))


def _resident_mib(process: "subprocess.Popen[bytes]") -> float:
    """The resident memory of a driver; 0 if it has just ended."""
    try:
        return float(psutil.Process(process.pid).memory_info().rss) / 2**20
    except psutil.NoSuchProcess:
        return 0.0
