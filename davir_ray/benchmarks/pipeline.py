"""The scoring stage on Ray compared with the bare scorer in this process, over the same shards."""

import copy
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from davir_ray.benchmarks.workload import Example, as_shard
from davir_ray.config.scoring import Precision, ScoreConfig
from davir_ray.engine.connect import connected
from davir_ray.models.checkpoint import Checkpoint, quiet
from davir_ray.models.scorer import INPUT_COLUMNS, Scorer, ScorerSettings
from davir_ray.run.files import in_folder, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.stages.score import score

log = logging.getLogger(__name__)


def compare(
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
    settings = ScorerSettings(precision=precision, tokens_per_pack=tokens_per_pack, keep_token_nll="none")
    bare = _bare_seconds(Scorer(base, reference, settings), examples, turns=max(2, num_shards // 4))
    config = ScoreConfig(num_actors=1, precision=precision, tokens_per_pack=tokens_per_pack)
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
