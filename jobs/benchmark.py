"""Benchmark davir_ray against the peak of its machine, and against other implementations in the same process.

    python jobs/benchmark.py likelihood [--json FILE]                  the scoring kernel: speed, memory, exactness
    python jobs/benchmark.py ranking --rows 10000000 [--json FILE]     the exact ranking: speed, memory, balance
    python jobs/benchmark.py align [--json FILE]                       a step of preference training, against TRL's
    python jobs/benchmark.py scaling [--json FILE]                     the scoring stage: 1, 2 and 4 actors, time to
                                                                       the first shard
    python jobs/benchmark.py control --shards 1000 [--json FILE]       many small shards: commits per second, the
                                                                       driver's CPU and memory, a resume
    python jobs/benchmark.py prepare --data FILE [--json FILE]         rows prepared per second, against datasets.map
    python jobs/benchmark.py start [--json FILE]                       what a user waits for: a complete run, a new
                                                                       ranking, the first scored shard
    python jobs/benchmark.py nodes --nodes 50 [--json FILE]            the pool on simulated nodes: placement, losses,
                                                                       growing and shrinking
    python jobs/benchmark.py chats [--json FILE]                       rendering and tokenising chats, against the
                                                                       tokenizer alone
    python jobs/benchmark.py gpu [--json FILE]                         a GPU: exactness, memory, speed; needs neither
                                                                       Ray nor downloads (--help has its options)

Prints the result as JSON, that of a GPU as a table. davir_ray/benchmarks/RESULTS.md has the results and the machines.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Run the benchmark that the command line names; returns the exit status."""
    if sys.argv[1:2] == ["gpu"]:
        # First, because it must start where the packages that the others need are absent.
        from davir_ray.benchmarks.gpu.run import main as try_gpu

        return try_gpu(sys.argv[2:])

    from davir_ray.benchmarks import alignment, chats, control, likelihood, nodes, preparing, ranking, scaling, start
    from davir_ray.cli import run_job
    from davir_ray.errors import ConfigError

    run: dict[type[Any], Any] = {
        likelihood.LikelihoodBenchmark: likelihood.run,
        ranking.RankingBenchmark: ranking.run,
        alignment.AlignmentBenchmark: alignment.run,
        scaling.ScalingBenchmark: scaling.run,
        control.ControlBenchmark: control.run,
        preparing.PrepareBenchmark: preparing.run,
        start.StartBenchmark: start.run,
        nodes.NodesBenchmark: nodes.run,
        chats.ChatsBenchmark: chats.run,
    }

    def measure(settings: Any) -> None:
        if settings.json is not None and not Path(settings.json).absolute().parent.is_dir():
            raise ConfigError(f"json is {settings.json}, whose folder does not exist; create it first")
        text = json.dumps(run[type(settings)](settings), indent=1)
        print(text)
        if settings.json is not None:
            Path(settings.json).write_text(text + "\n")

    names = ("likelihood", "ranking", "align", "scaling", "control", "prepare", "start", "nodes", "chats")
    return run_job(measure, dict(zip(names, run, strict=True)), __doc__)


if __name__ == "__main__":
    sys.exit(main())
