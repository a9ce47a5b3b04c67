"""The sections of the benchmark in turn, and the table at the end.

It starts where only torch, transformers, numpy, pyarrow and safetensors are: without Ray, a hub or downloads.
"""

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from davir_ray.benchmarks.gpu import exactness, speed
from davir_ray.benchmarks.gpu.trial import Trial
from davir_ray.models.device import device_name

log = logging.getLogger(__name__)

SECTIONS: dict[str, Callable[[Trial], None]] = {
    "attention": exactness.attention,
    "families": exactness.families,
    "scorer": exactness.scorer,
    "adapter": exactness.adapter,
    "gradients": exactness.gradients,
    "syncs": exactness.syncs,
    "memory": exactness.memory,
    "matrix_rate": speed.matrix_rate,
    "training": speed.training,
    "scoring": speed.scoring,
}


def main(arguments: Sequence[str]) -> int:
    """Run the sections that are asked for; returns 1 if anything is not as it must be."""
    given = _parsed(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    transformers.logging.set_verbosity_error()
    is_cuda = torch.cuda.is_available() and not given.smoke
    if not is_cuda and not given.smoke:
        log.error("torch %s sees no GPU; --smoke tries the script on a CPU", torch.__version__)
        return 2
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    trial = Trial(device=device, smoke=given.smoke, limit_s=given.limit_s, json=given.json)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    trial.record("machine", None, f"{device_name(device)}, {versions}", device=device_name(device), **versions)
    for name in given.sections:
        if trial.is_over:
            trial.record(name, None, "left out: the time is over")
            continue
        try:
            SECTIONS[name](trial)
        except Exception as error:  # noqa: BLE001 - the other sections may still run
            log.error("%s", traceback.format_exc())
            trial.record(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        trial.clean()
    sys.stdout.write(_table(trial))
    return int(any(row["verdict"] == "FAIL" for row in trial.results))


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark.py gpu", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the results, written after each of them")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--limit_s", type=float, default=540, help="seconds after which nothing more is begun (540)")
    parser.add_argument("--smoke", action="store_true", help="try the script with tiny models on a CPU")
    return parser.parse_args(arguments)


def _table(trial: Trial) -> str:
    """The results as a table of Markdown, beside what was predicted for one H200."""
    lines = ["| what | holds | found | predicted |", "|---|---|---|---|"]
    lines += [f"| {row['name']} | {row['verdict']} | {row['found']} | {row['predicted']} |" for row in trial.results]
    return "\n".join(lines) + "\n"
