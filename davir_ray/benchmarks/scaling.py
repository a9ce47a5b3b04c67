"""The scoring stage on Ray: tokens per second by number of actors, seconds until the first scored shard, efficiency."""

import copy
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
from transformers import PreTrainedModel

from davir_ray.benchmarks.measure import device_here
from davir_ray.benchmarks.workload import (
    SMALL_LLAMA,
    Example,
    as_shard,
    load_examples,
    load_model,
    num_tokens,
    trained_tokenizer,
)
from davir_ray.config.checks import check
from davir_ray.config.scoring import Precision, ScoreConfig
from davir_ray.config.sources import Format
from davir_ray.engine.connect import connected
from davir_ray.engine.resources import has_gpu
from davir_ray.errors import ClusterError, ConfigError, ProgressError
from davir_ray.models.checkpoint import Checkpoint, quiet
from davir_ray.models.scorer import INPUT_COLUMNS, Scorer
from davir_ray.run.files import in_folder, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.stages.ids import IDS_CHECKED
from davir_ray.stages.score import score, scorer_settings

log = logging.getLogger(__name__)

_COMMAND = """
from davir_ray.cli import run_job
from davir_ray.config.run import RunConfig
from davir_ray.pipeline import run_all
run_job(run_all, RunConfig, "")
"""
"""The code of jobs/score.py."""

_ROWS = "rows.jsonl"
_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class ScalingBenchmark:
    """Measure the scoring stage with 1, 2 and 4 actors over the same shards, and the time to the first scored shard.

    It runs on the cluster of RAY_ADDRESS or of the submitted job, else on a local Ray that it starts before the
    measurement.
    """

    json: str | None = None
    """File for the result."""
    actors: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Numbers of actors to measure, one after another; the others are compared with the smallest."""
    model: str | None = None
    """Checkpoint to measure: a folder or a hub name; the reference is a copy with slightly different weights."""
    random_init: str | None = None
    """Configuration of a model with random weights, instead of a checkpoint, as in the likelihood benchmark. None: a
    Llama of hidden size 256 and 4 layers."""
    data: str | None = None
    """Rows to score. None: alpaca_9k.jsonl.gz in $DAVIR_TEST_DATA, else random tokens."""
    format: Format = "alpaca"
    """Format of the data."""
    rows: int = 128
    """Number of examples in a shard; every shard has the same ones."""
    shards_per_actor: int = 6
    """Number of shards for each actor of a pool. The first one of each is a warm-up and does not count."""
    max_tokens: int = 512
    """Token limit of an example."""
    precision: Precision = "auto"
    """Precision of the forward pass, as in scoring."""
    num_gpus: float | None = None
    """Number of GPUs for each actor, as in scoring."""
    first_shards: int = 3
    """Number of times to measure the time until a command with a tiny model has scored its first shard; the median is
    reported. 0: never."""
    folder: str | None = None
    """Folder for the files, which are removed at the end; every node must see it. None: a temporary folder."""

    def __post_init__(self) -> None:
        if self.model is not None and self.random_init is not None:
            raise ConfigError("both model and random_init are given; give at most one of the two")
        check(min(self.actors, default=0) >= 1, "actors", self.actors, "a list of numbers, each at least 1")
        for name, minimum in {"rows": 1, "shards_per_actor": 2, "first_shards": 0}.items():
            check(getattr(self, name) >= minimum, name, getattr(self, name), f"at least {minimum}")


def run(settings: ScalingBenchmark) -> dict[str, Any]:
    """Score with each pool on one warm cluster; returns the contents of the JSON file."""
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
            first = [_first_shard_seconds(tiny, turn) for turn in range(settings.first_shards)]
            machine = {"cpus": os.cpu_count(), "cluster": ray.cluster_resources(), "has_gpu": has_gpu()}
    fewest = min(rates)
    alone = rates[fewest] / fewest
    return {
        "settings": asdict(settings),
        "machine": machine,
        "examples": {"origin": origin, "rows_a_shard": len(examples), "tokens_a_shard": num_tokens(examples)},
        "tokens_per_second": {str(n): rate for n, rate in rates.items()},
        "scaling_efficiency": {str(n): rate / (n * alone) for n, rate in rates.items()},
        "seconds_to_first_shard": median(first) if first else None,
        "seconds_to_first_shard_each": first,
    }


def _rates(
    folder: Path, pair: tuple[Checkpoint, Checkpoint], examples: Sequence[Example], settings: ScalingBenchmark
) -> dict[int, float]:
    """Tokens per second by size of the pool, for the pools that fit. Raises ClusterError if none does."""
    rates = dict[int, float]()
    for num_actors in settings.actors:
        try:
            rates[num_actors] = _rate(folder, pair, examples, num_actors, settings)
        except ClusterError as error:  # keep what was measured before
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
    """Tokens per second of a warm pool: from the moment when every actor has scored a shard to the last file."""
    run = Run.at(folder / f"run-{num_actors}")
    num_shards = settings.shards_per_actor * num_actors
    write_shards(run, examples, num_shards)
    # If there are more actors than CPUs, each gets a fraction of a CPU.
    config = ScoreConfig(
        num_actors=num_actors,
        num_cpus=min(1.0, (ray.cluster_resources()["CPU"] - 1) / num_actors),
        num_gpus=settings.num_gpus,
        precision=settings.precision,
    )
    score(run, *pair, config, keep_token_nll="none")
    rate = num_tokens(examples) / warm_seconds_per_shard(run, num_actors)
    log.info("benchmark: %d actors, %.0f tokens/s", num_actors, rate)
    return rate


def _tiny_pair(parent: Path) -> Path:
    """A new folder with a base, a reference, their tokenizer, and the few rows that the timed command scores."""
    folder = parent / "tiny"
    folder.mkdir()
    rows = folder / _ROWS
    rows.write_text('{"prompt": "Count.", "response": "one two three"}\n' * 8)
    tokenizer = trained_tokenizer(str(rows), 512)
    shape = {**SMALL_LLAMA, "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128}
    model, _ = load_model(None, json.dumps(shape), torch.float32, torch.device("cpu"))
    for checkpoint in save_pair(folder, model):
        tokenizer.save_pretrained(checkpoint.uri)
    return folder


def _first_shard_seconds(folder: Path, turn: int) -> float:
    """Seconds from the start of a command in a new process to its first file in scores/, on a running cluster."""
    output = folder / f"first-{turn}"
    options = {"data": folder / _ROWS, "format": "prompt_response", "output": output, "output_is_shared": "true"}
    options |= {"base": folder / "base", "reference": folder / "reference", "score.num_actors": 1, "select.top_k": 1}
    command = [sys.executable, "-c", _COMMAND, *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    started = time.monotonic()
    log_file = folder / f"first-{turn}.log"
    with log_file.open("w") as output_file:
        process = subprocess.Popen(command, env=environment, stdout=output_file, stderr=subprocess.STDOUT)
    while not list(output.glob("scores/*.parquet")):
        if process.poll() is not None or time.monotonic() - started > _TIMEOUT_S:
            process.kill()
            process.wait()
            raise ProgressError(
                f"the timed command scored no shard; the end of its output: {log_file.read_text()[-500:]}"
            )
        time.sleep(0.02)
    seconds = time.monotonic() - started
    process.wait()
    log.info("benchmark: the first shard was scored after %.1f s", seconds)
    return seconds


def compare_with_scorer(
    folder: Path,
    model: PreTrainedModel,
    examples: Sequence[Example],
    num_shards: int,
    precision: Precision,
    tokens_per_pack: int | None,
) -> dict[str, Any]:
    """Seconds per shard of the bare scorer and of the warm pipeline with one actor, and their ratio."""
    base, reference = save_pair(folder, model)
    run = Run.at(folder / "run")
    write_shards(run, examples, num_shards)
    config = ScoreConfig(
        num_actors=1, num_gpus=float(device_here().type == "cuda"), precision=precision, tokens_per_pack=tokens_per_pack
    )
    settings = scorer_settings(config, "none")
    bare = _bare_seconds(Scorer(base, reference, settings), examples, turns=max(2, num_shards // 4))
    with connected():
        started = time.monotonic()
        score(run, base, reference, config, keep_token_nll="none")
        whole = time.monotonic() - started
    warm = warm_seconds_per_shard(run, num_actors=1)
    return {
        "pipeline_efficiency": bare / warm,
        "pipeline_seconds_per_shard": warm,
        "bare_seconds_per_shard": bare,
        "pipeline_seconds_with_start": whole,
    }


def write_shards(run: Run, examples: Sequence[Example], num_shards: int) -> None:
    """Write a run that looks prepared: the same examples in every shard, with different ids."""
    files = [
        write_parquet(run / "examples" / f"{number:05d}.parquet", as_shard(examples, number * len(examples)))
        for number in range(num_shards)
    ]
    counts = {"prepared": num_shards * len(examples), "rejected": 0}
    Manifest(
        stage="prepare",
        fingerprint={"benchmark": counts["prepared"]},
        counts=counts,
        files=in_folder("examples", files),
        details={IDS_CHECKED: True},  # they are consecutive
    ).write(run.folder)


def save_pair(folder: Path, model: PreTrainedModel) -> tuple[Checkpoint, Checkpoint]:
    """Save the model, and a copy with slightly different weights, as checkpoints."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    with quiet():
        model.save_pretrained(folder / "base")
        other.save_pretrained(folder / "reference")
    return Checkpoint.find(str(folder / "base")), Checkpoint.find(str(folder / "reference"))


def warm_seconds_per_shard(run: Run, num_actors: int) -> float:
    """Seconds per file of scores/ from the moment when every actor has written one, so without starts and loading."""
    written = sorted(path.stat().st_mtime for path in Path(run.folder.path, "scores").glob("*.parquet"))
    return (written[-1] - written[num_actors - 1]) / (len(written) - num_actors)


def _bare_seconds(scorer: Scorer, examples: Sequence[Example], turns: int) -> float:
    """Median wall seconds per shard, without the first."""
    table = as_shard(examples, 0).select(INPUT_COLUMNS)
    taken = []
    for turn in range(turns + 1):
        started = time.monotonic()
        scorer(table)
        taken.append(time.monotonic() - started)
        log.info("benchmark: bare scorer, turn %d of %d: %.2f s", turn, turns, taken[-1])
    return median(taken[1:])
