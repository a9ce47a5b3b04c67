"""Benchmark davir_ray against the peak of its machine, and against other implementations in the same process.

    python jobs/benchmark.py likelihood [--json FILE]                  the scoring kernel: speed, memory, exactness
    python jobs/benchmark.py ranking --rows 10000000 [--json FILE]     the exact ranking: speed, memory, balance
    python jobs/benchmark.py align [--json FILE]                       a step of preference training, against TRL's
    python jobs/benchmark.py scaling [--json FILE]                     the scoring stage: 1, 2 and 4 actors, time to
                                                                       the first shard
    python jobs/benchmark.py chats [--json FILE]                       rendering and tokenising chats, against the
                                                                       tokenizer alone

Prints the result as JSON. davir_ray/benchmarks/RESULTS.md has the results and the machines.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from davir_ray.benchmarks import alignment, chats, likelihood, ranking, scaling
from davir_ray.cli import run_job
from davir_ray.errors import ConfigError

SETTINGS: dict[str, type[Any]] = {
    "likelihood": likelihood.LikelihoodBenchmark,
    "ranking": ranking.RankingBenchmark,
    "align": alignment.AlignmentBenchmark,
    "scaling": scaling.ScalingBenchmark,
    "chats": chats.ChatsBenchmark,
}
RUN: dict[type[Any], Callable[[Any], dict[str, Any]]] = {
    likelihood.LikelihoodBenchmark: likelihood.run,
    ranking.RankingBenchmark: ranking.run,
    alignment.AlignmentBenchmark: alignment.run,
    scaling.ScalingBenchmark: scaling.run,
    chats.ChatsBenchmark: chats.run,
}


def main(settings: Any) -> None:
    """Run the benchmark of these settings and print its result."""
    if settings.json is not None and not Path(settings.json).absolute().parent.is_dir():
        raise ConfigError(f"json is {settings.json}, whose folder does not exist; create it first")
    text = json.dumps(RUN[type(settings)](settings), indent=1)
    print(text)
    if settings.json is not None:
        Path(settings.json).write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(run_job(main, SETTINGS, __doc__))
