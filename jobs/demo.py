"""A demonstration on data with a known answer: does DavIR find the examples that a model can learn from?

    python jobs/demo.py [--output DIR]

Generates a small instruction set of known, learnable and unlearnable rows, among them copies of wrong answers, and
pre-trains a small base model on the spot. Then it runs the real chain on a local Ray twice (prepare, finetune, score,
rank, select, report): in DIR/run with one reference, which has seen all that it scores, in DIR/folds with two folds,
where each row is scored by a reference that has not seen it. It compares both selections with a random one of the same
size. Needs no GPU and downloads nothing. The same command continues a stopped demo.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from davir_ray.cli import run_job


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of this job."""

    output: str = "davir_demo"
    """Folder for the data, the base and the two runs."""
    overwrite: bool = False
    """Redo what another version of the demo has made in that folder."""


def main(options: DemoOptions) -> None:
    """Run the demo and print how the selections compare with the known answer."""
    # Imported here, so that a mistake in the options is reported before torch and Ray load.
    from davir_ray.demo.run import run_demo

    print(run_demo(Path(options.output), overwrite=options.overwrite))


if __name__ == "__main__":
    sys.exit(run_job(main, DemoOptions, __doc__))
