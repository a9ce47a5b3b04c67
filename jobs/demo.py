"""A demonstration on data with a known answer: does DavIR find the examples that a model can learn from?

    python jobs/demo.py [--output DIR]

Generates a small instruction set of known, learnable and unlearnable rows, pre-trains a small base model on the spot,
runs the real chain on a local Ray (prepare, finetune, score, rank, select, report), and compares the selection with a
random one of the same size. Needs no GPU and downloads nothing. The same command continues a stopped demo.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from davir_ray.cli import run_job


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of this job."""

    output: str = "davir_demo"
    """Folder for the data, the base and the run."""


def main(options: DemoOptions) -> None:
    """Run the demo and print how the selection compares with the known answer."""
    # Imported here, so that a mistake in the options is reported before torch and Ray load.
    from davir_ray.demo.run import run_demo

    print(run_demo(Path(options.output)))


if __name__ == "__main__":
    sys.exit(run_job(main, DemoOptions, __doc__))
