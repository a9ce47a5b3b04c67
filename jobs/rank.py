"""Rank and select again from the scores of a run, by another order or another rule; no model is loaded.

ray job submit --working-dir . -- python jobs/rank.py --output s3://bucket/run1 --select.top_fraction 0.03
"""

import sys

from davir_ray.cli import run_job
from davir_ray.config import RunConfig


def main(config: RunConfig) -> None:
    """Rank, select, report, and say where the result lies."""
    from davir_ray.pipeline import rank_only  # late: a mistake in the options is told before torch and Ray load

    run = rank_only(config)
    print(f"selected: {run / 'selected'}\nreport:   {run / 'report.html'}")


if __name__ == "__main__":
    sys.exit(run_job(main, RunConfig, __doc__))
