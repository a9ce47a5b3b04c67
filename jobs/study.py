"""A study on real rows with planted noise: when should the reference not have seen what it scores?

    python jobs/study.py --data alpaca.jsonl.gz --rare gsm8k_train.jsonl.gz [--output DIR] [--base MODEL]

Draws pools of real rows in which some answers are exchanged and some rows are copied, scores each with one reference
(the paper's way) and with folds, and compares the scores with the planted truth. Takes one to two hours on two
cores. The same command continues a stopped study.
"""

import sys
from pathlib import Path

from davir_ray.cli import run_job
from davir_ray.study.options import StudyOptions


def main(options: StudyOptions) -> None:
    """Run the study and print its tables."""
    # Imported here, so that a mistake in the options is reported before torch and Ray load.
    from davir_ray.study.job import design_of, run_study

    print(run_study(Path(options.data), Path(options.rare), Path(options.output), design_of(options.base)))


if __name__ == "__main__":
    sys.exit(run_job(main, StudyOptions, __doc__))
