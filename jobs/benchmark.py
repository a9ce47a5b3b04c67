"""Measure davir_ray against the machine it runs on, and against other ways of doing the same in the same process.

    python jobs/benchmark.py likelihood [--json FILE]
    python jobs/benchmark.py ranking --rows 10000000 [--json FILE]

Prints the result as JSON. davir_ray/benchmarks/RESULTS.md tells what was found and where.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from davir_ray.benchmarks import likelihood, ranking
from davir_ray.cli import exit_status
from davir_ray.errors import ConfigError


def parser() -> ArgumentParser:
    """One subcommand for each benchmark; its options are the fields of its settings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    options: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "exit_on_error": False}
    top = ArgumentParser(description=__doc__, **options)
    commands = top.add_subcommands(required=True, dest="benchmark")
    of_likelihood = ArgumentParser(**options)
    of_likelihood.add_class_arguments(likelihood.LikelihoodBenchmark, as_group=False)
    commands.add_subcommand("likelihood", of_likelihood, help="the kernel that scores: speed, memory, exactness")
    of_ranking = ArgumentParser(**options)
    of_ranking.add_class_arguments(ranking.RankingBenchmark, as_group=False)
    commands.add_subcommand("ranking", of_ranking, help="the exact ranking: speed, memory, balance")
    return top


def main() -> None:
    """Run the benchmark that the command line names."""
    try:
        found: dict[str, Any] = parser().parse_args().as_dict()
    except argparse.ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    options = found[found["benchmark"]]
    settings: likelihood.LikelihoodBenchmark | ranking.RankingBenchmark
    if found["benchmark"] == "likelihood":
        settings = likelihood.LikelihoodBenchmark(**options)
        run = partial(likelihood.run, settings)
    else:
        settings = ranking.RankingBenchmark(**options)
        run = partial(ranking.run, settings)
    if settings.json is not None and not Path(settings.json).absolute().parent.is_dir():
        raise ConfigError(f"json is {settings.json}, whose folder does not exist; make it first")
    text = json.dumps(run(), indent=1)
    print(text)
    if settings.json is not None:
        Path(settings.json).write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
