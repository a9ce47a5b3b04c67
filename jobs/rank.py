"""Rank and select again from the scores of a run, by another order or another rule, without loading a model.

    ray job submit --working-dir . -- python jobs/rank.py --output s3://bucket/run1 --select.top_fraction 0.03

Starts from the run's own order and filters: what is not given stays, and a rule that is given replaces the run's. To
remove a filter, give its default: --select.drop_duplicates false, --select.min_response_tokens null, --select.balance
'[]'. --config may be the file that the run was scored with, if everything but rank and select is as in the run. Other
options of jobs/score.py are refused.
"""

import sys

from davir_ray.cli import run_job
from davir_ray.config.rank import RankOptions


def main(options: RankOptions) -> None:
    """Rank, select and report, and print where the result is."""
    # Imported here, so that a mistake in the options is reported before torch and Ray load.
    from davir_ray.pipeline import rank_only

    run = rank_only(options)
    print(f"selected: {run / 'selected'}\nreport:   {run / 'report.html'}")


if __name__ == "__main__":
    sys.exit(run_job(main, RankOptions, __doc__))
