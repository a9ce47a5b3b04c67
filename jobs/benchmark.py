"""Measure davir_ray against the machine it runs on, and against other ways of doing the same in the same process.

    python jobs/benchmark.py likelihood [--json FILE]
    python jobs/benchmark.py ranking --rows 10000000 [--json FILE]
    python jobs/benchmark.py scaling [--json FILE]
    python jobs/benchmark.py align [--json FILE]

Prints the result as JSON. davir_ray/benchmarks/RESULTS.md tells what was found and where.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from davir_ray.benchmarks import alignment, likelihood, ranking, scaling
from davir_ray.cli import exit_status, refuse_repeated
from davir_ray.config.yaml import load_yaml_strictly
from davir_ray.errors import ConfigError

BENCHMARKS: dict[str, tuple[type[Any], Callable[[Any], dict[str, Any]], str]] = {
    "likelihood": (likelihood.LikelihoodBenchmark, likelihood.run, "the kernel that scores: speed, memory, exactness"),
    "ranking": (ranking.RankingBenchmark, ranking.run, "the exact ranking: speed, memory, balance"),
    "align": (alignment.AlignmentBenchmark, alignment.run, "a step of preference training beside TRL's"),
    "scaling": (scaling.ScalingBenchmark, scaling.run, "the scoring stage: 1, 2 and 4 actors, time to the first shard"),
}
"""Settings, what runs, and a line of help, by name of the subcommand."""


def parser() -> ArgumentParser:
    """One subcommand for each benchmark; its options are the fields of its settings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    load_yaml_strictly()
    options: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "exit_on_error": False,
        "allow_abbrev": False,
    }
    top = ArgumentParser(description=__doc__, **options)
    commands = top.add_subcommands(required=True, dest="benchmark")
    for name, (settings, _, told) in BENCHMARKS.items():
        command = ArgumentParser(**options)
        command.add_class_arguments(settings, as_group=False)
        commands.add_subcommand(name, command, help=told)
    return top


def main() -> None:
    """Run the benchmark that the command line names."""
    refuse_repeated(sys.argv[1:])
    try:
        found: dict[str, Any] = parser().parse_args().as_dict()
    except argparse.ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    kind, run, _ = BENCHMARKS[found["benchmark"]]
    settings = kind(**found[found["benchmark"]])
    if settings.json is not None and not Path(settings.json).absolute().parent.is_dir():
        raise ConfigError(f"json is {settings.json}, whose folder does not exist; make it first")
    text = json.dumps(run(settings), indent=1)
    print(text)
    if settings.json is not None:
        Path(settings.json).write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
