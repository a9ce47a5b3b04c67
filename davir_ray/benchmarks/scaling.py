"""The whole scoring stage on a cluster: tokens a second with more actors, and seconds until the first scored shard."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch

from davir_ray.benchmarks.pipeline import save_pair, write_shards
from davir_ray.benchmarks.workload import SMALL_LLAMA, Example, load_examples, load_model, trained_tokenizer
from davir_ray.config.scoring import Precision, ScoreConfig
from davir_ray.config.sources import Format
from davir_ray.engine.connect import connected, has_gpu
from davir_ray.errors import ClusterError, ConfigError, ProgressError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.run.folder import Run
from davir_ray.stages.score import score

log = logging.getLogger(__name__)

_COMMAND = """
from davir_ray.cli import run_job
from davir_ray.config.run import RunConfig
from davir_ray.pipeline import run_all
run_job(run_all, RunConfig, "")
"""
"""What jobs/score.py does."""

_ROWS = "rows.jsonl"
_PATIENCE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class ScalingBenchmark:
    """Measure the scoring stage with 1, 2 and 4 actors over the same shards, and how soon a command scores.

    On the cluster of RAY_ADDRESS or of the submitted job, else on a Ray of its own, which is then warm.
    """

    json: str | None = None
    """File for the result."""
    actors: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Sizes of the pool, one after another; the others are compared with the smallest."""
    model: str | None = None
    """Checkpoint to measure: a folder or a hub name; the reference is a copy a small step away."""
    random_init: str | None = None
    """Instead of a checkpoint, random weights, as for the kernel. None: a Llama of hidden size 256 and 4 layers."""
    data: str | None = None
    """Rows to score. None: alpaca_9k.jsonl.gz in $DAVIR_TEST_DATA, else random tokens."""
    format: Format = "alpaca"
    """Format of the data."""
    rows: int = 128
    """Examples in a shard; every shard holds the same."""
    shards_per_actor: int = 6
    """Shards for each actor of a pool. The first of each warms up and is not counted."""
    max_tokens: int = 512
    """Token limit of an example."""
    precision: Precision = "auto"
    """As in scoring."""
    num_gpus: float | None = None
    """GPUs of an actor, as in scoring."""
    first_shards: int = 3
    """Times that the command is timed, with a tiny model, until its first scored shard; the median is told. 0: none."""
    folder: str | None = None
    """Where the files are written, and removed at the end; every node must see it. None: a temporary folder."""

    def __post_init__(self) -> None:
        if self.model is not None and self.random_init is not None:
            raise ConfigError("both model and random_init are given; give at most one of the two")
        if not self.actors or min(self.actors) < 1:
            raise ConfigError(f"actors is {self.actors}; it must be numbers of at least 1")
        for name, least in {"rows": 1, "shards_per_actor": 2, "first_shards": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def run(settings: ScalingBenchmark) -> dict[str, Any]:
    """Score with each pool on one warm cluster; returns what goes into the JSON file."""
    model, tokenizer = load_model(settings.model, settings.random_init, torch.float32, torch.device("cpu"))
    vocab_size = int(model.config.get_text_config().vocab_size)
    examples, origin = load_examples(
        settings.rows, settings.max_tokens, vocab_size, tokenizer, settings.data, settings.format, []
    )
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        pair = save_pair(Path(folder), model)
        with connected():
            rates = _rates(Path(folder), pair, examples, settings)
            tiny = _tiny_pair(Path(folder))
            first = [_first_shard_seconds(*tiny, turn) for turn in range(settings.first_shards)]
            machine = {"cpus": os.cpu_count(), "cluster": ray.cluster_resources(), "has_gpu": has_gpu()}
    fewest = min(rates)
    alone = rates[fewest] / fewest
    return {
        "settings": asdict(settings),
        "machine": machine,
        "examples": {"origin": origin, "rows_a_shard": len(examples), "tokens_a_shard": _num_tokens(examples)},
        "tokens_per_second": {str(n): rate for n, rate in rates.items()},
        "scaling_efficiency": {str(n): rate / (n * alone) for n, rate in rates.items()},
        "seconds_to_first_shard": median(first) if first else None,
        "seconds_to_first_shard_each": first,
    }


def _num_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


def _rates(
    folder: Path, pair: tuple[Checkpoint, Checkpoint], examples: Sequence[Example], settings: ScalingBenchmark
) -> dict[int, float]:
    """Tokens a second by size of the pool, of the pools that fit. ClusterError if none does."""
    rates = dict[int, float]()
    for num_actors in settings.actors:
        try:
            rates[num_actors] = _rate(folder, pair, examples, num_actors, settings)
        except ClusterError as error:  # what was measured before stays
            log.warning("benchmark: %d actors were not measured: %s", num_actors, error)
    if not rates:
        raise ClusterError(f"none of the pools {settings.actors} fits the cluster; ask for smaller ones")
    return rates


def _rate(
    folder: Path,
    pair: tuple[Checkpoint, Checkpoint],
    examples: Sequence[Example],
    num_actors: int,
    settings: ScalingBenchmark,
) -> float:
    """Tokens a second of a warm pool: from the moment each actor has scored a shard to the last file."""
    run = Run.at(folder / f"run-{num_actors}")
    num_shards = settings.shards_per_actor * num_actors
    write_shards(run, examples, num_shards)
    # A pool that needs more CPUs than there are shares them.
    config = ScoreConfig(
        num_actors=num_actors,
        num_cpus=min(1.0, (ray.cluster_resources()["CPU"] - 1) / num_actors),
        num_gpus=settings.num_gpus,
        precision=settings.precision,
    )
    score(run, *pair, config, keep_token_nll="none")
    written = sorted(path.stat().st_mtime for path in Path(run.folder.path, "scores").glob("*.parquet"))
    warm = written[num_actors - 1 :]
    rate = _num_tokens(examples) * (len(warm) - 1) / (warm[-1] - warm[0])
    log.info("benchmark: %d actors, %.0f tokens/s", num_actors, rate)
    return rate


def _tiny_pair(parent: Path) -> tuple[Path, Path, Path]:
    """A new folder, and in it a base and a reference with a tokenizer and the few rows that a timed command scores."""
    folder = parent / "tiny"
    folder.mkdir()
    rows = folder / _ROWS
    rows.write_text('{"prompt": "Count.", "response": "one two three"}\n' * 8)
    tokenizer = trained_tokenizer(str(rows), 512)
    shape = {**SMALL_LLAMA, "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128}
    model, _ = load_model(None, json.dumps(shape), torch.float32, torch.device("cpu"))
    pair = save_pair(folder, model)
    for checkpoint in pair:
        tokenizer.save_pretrained(checkpoint.uri)
    return folder, Path(pair[0].uri), Path(pair[1].uri)


def _first_shard_seconds(folder: Path, base: Path, reference: Path, turn: int) -> float:
    """From a command in a new process to its first file in scores/, on a cluster that runs already."""
    output = folder / f"first-{turn}"
    options = {"data": folder / _ROWS, "format": "prompt_response", "base": base, "reference": reference}
    options |= {"output": output, "score.num_actors": 1, "select.top_k": 1, "output_is_shared": "true"}
    command = [sys.executable, "-c", _COMMAND, *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    started = time.monotonic()
    log_file = folder / f"first-{turn}.log"
    with log_file.open("w") as told:
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=subprocess.STDOUT)
    while not list(output.glob("scores/*.parquet")):
        if process.poll() is not None or time.monotonic() - started > _PATIENCE_S:
            process.kill()
            process.wait()
            raise ProgressError(f"the timed command scored nothing; its last words: {log_file.read_text()[-500:]}")
        time.sleep(0.02)
    seconds = time.monotonic() - started
    process.wait()
    log.info("benchmark: the first shard was scored after %.1f s", seconds)
    return seconds
