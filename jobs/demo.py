"""A demonstration with planted truth: does DavIR find the examples that a model can learn from?

    python jobs/demo.py [--output DIR]

Generates a small instruction set of known, learnable and unlearnable rows, pre-trains a small base model on the spot,
runs the real chain on a local Ray (prepare, finetune, score, rank, select, report), and compares the selection with a
random one of the same size. No GPU, nothing downloaded. The same command goes on where a stopped demo left off.
"""

import argparse
import sys
from pathlib import Path

from davir_ray.cli import exit_status, refuse_repeated, show_debug
from davir_ray.config.yaml import DEBUG_HELP
from davir_ray.demo.run import run_demo


def main() -> None:
    """Run the demo and print what came of the planted truth."""
    refuse_repeated(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=Path("davir_demo"), help="folder for data, base and run")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    options = parser.parse_args()
    if options.debug:
        show_debug()
    print(run_demo(options.output))


if __name__ == "__main__":
    sys.exit(exit_status(main))
