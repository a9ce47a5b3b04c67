"""Rank and select again from the scores of a run, by another order or another rule; no model is loaded.

    ray job submit --working-dir . -- python jobs/rank.py --output s3://bucket/run1 --select.top_fraction 0.03

Begins with the run's own order and filters: what is not given stays, and a rule that is given replaces the run's. A
filter is taken back with its default: --select.drop_duplicates false, --select.min_response_tokens null,
--select.balance '[]'. --config may be the file that the run was scored with; what it says of other things than rank and
select must be what the run says. Other options of jobs/score.py are refused.
"""

import sys

from davir_ray.cli import exit_status, parse_rank


def main() -> None:
    """Rank, select, report, and say where the result lies."""
    options = parse_rank(sys.argv[1:], __doc__)
    from davir_ray.pipeline import rank_only  # late: a mistake in the options is told before torch and Ray load

    run = rank_only(options)
    print(f"selected: {run / 'selected'}\nreport:   {run / 'report.html'}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
