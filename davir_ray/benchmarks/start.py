"""How long a user waits before a job does its work: whole commands on a small run, beside the least they could take.

Each command is a process of its own, timed from outside; the first shard counts when its file is there.
"""

import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import davir_ray
from davir_ray.config.checks import check
from davir_ray.demo.base import new_model, train_tokenizer
from davir_ray.errors import ConfigError, ProgressError
from davir_ray.run.manifest import library_versions

log = logging.getLogger(__name__)

_JOBS = Path(davir_ray.__file__).parents[1] / "jobs"

_BARE = {
    "bare_python_seconds": "pass",
    "bare_task_seconds": "import ray; ray.init('local', log_to_driver=False); ray.get(ray.remote(lambda: 1).remote())",
    "bare_actor_seconds": (
        "import ray; ray.init('local', log_to_driver=False)\n"
        "class Actor:\n    def ready(self):\n        import torch, transformers.modeling_utils\n"
        "ray.get(ray.remote(Actor).remote().ready.remote())"
    ),
}
"""Lower bounds for the complete run, the ranking and the first shard, in this order."""

_POLL_S = 0.02
_LIMIT_S = 600
"""Seconds after which a command counts as stuck."""


@dataclass(frozen=True, kw_only=True)
class StartBenchmark:
    """Measure the seconds of a complete run's command, of a new ranking, and until a first shard is scored.

    Commands that need Ray start their own on this machine. The jobs are those of a checkout, beside the package.
    """

    json: str | None = None
    """File for the result."""
    repeats: int = 5
    """Number of times that each command runs; they take turns, and the medians are printed."""
    rows: int = 40
    """Number of examples."""

    def __post_init__(self) -> None:
        for name in ("repeats", "rows"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


def run(settings: StartBenchmark) -> dict[str, Any]:
    """Make a run, then repeat the commands; returns the contents of the JSON file."""
    if not (_JOBS / "score.py").exists():
        raise ConfigError(f"{_JOBS} has no score.py; run this benchmark from a checkout, installed with pip install -e")
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), settings)


def measure(folder: Path, settings: StartBenchmark) -> dict[str, Any]:
    """The result of `run`; leaves its files in the folder."""
    _make_inputs(folder, settings.rows)
    base, data = str(folder / "base"), str(folder / "rows.jsonl")

    def score(output: str, *options: str) -> list[str]:
        given = ["--base", base, "--data", data, "--output", str(folder / output), "--select.top_k", "5"]
        return [str(_JOBS / "score.py"), *given, *options]

    seconds_of(score("run"))
    reference = ["--reference", str(folder / "run" / "reference")]
    measured: dict[str, Callable[[int], float]] = {
        "complete_seconds": lambda _: seconds_of(score("run")),
        "rank_seconds": lambda turn: seconds_of(
            [str(_JOBS / "rank.py"), "--output", str(folder / "ranked"), "--select.top_k", str(6 + turn % 2)]
        ),
        "first_shard_seconds": lambda turn: seconds_of(
            score(f"new-{turn}", *reference), folder / f"new-{turn}" / "scores"
        ),
    }
    for name, code in _BARE.items():
        measured[name] = lambda _, code=code: seconds_of(["-c", code])  # type: ignore[misc]
    seconds_of(score("ranked", *reference))  # not the run above, which the new rankings would change
    spent: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(settings.repeats):
        for name, command in measured.items():
            spent[name].append(command(turn))
            log.info("benchmark: turn %d of %d, %s: %.2f", turn + 1, settings.repeats, name, spent[name][-1])
    return {
        "settings": asdict(settings),
        **{name: median(values) for name, values in spent.items()},
        "all": spent,
        "versions": library_versions(),
        "machine": {
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "load": os.getloadavg()[0],
            "date": time.strftime("%Y-%m-%d"),
        },
    }


def _make_inputs(folder: Path, num_rows: int) -> None:
    """Write a small base with its tokenizer, and rows of Alpaca's form."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(200)]
    rows = [{name: " ".join(draw.choices(words, k=20)) for name in ("instruction", "output")} for _ in range(num_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row | {"input": ""}) + "\n" for row in rows))
    tokenizer = train_tokenizer(row["output"] for row in rows)
    torch.manual_seed(0)
    new_model(tokenizer, seed=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def seconds_of(arguments: list[str], folder: Path | None = None) -> float:
    """Seconds that a Python command takes, or until there is a shard in the folder; ProgressError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryFile("w+") as output:
        started = time.monotonic()
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            found = None
            while process.poll() is None and time.monotonic() - started < _LIMIT_S:
                if folder is not None and found is None and any(folder.glob("*.parquet")):
                    found = time.monotonic() - started
                time.sleep(_POLL_S)
            ended = time.monotonic() - started
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0 or (folder is not None and found is None):
            output.seek(0)
            text = output.read()[-500:]
            raise ProgressError(f"{arguments[0]} ended with status {process.returncode}; the end of its output: {text}")
    return ended if found is None else found
