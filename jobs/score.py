"""Score instruction data by DavIR and select the best part of it: the whole chain, skipping what is complete.

    ray job submit --working-dir . -- python jobs/score.py --data s3://bucket/alpaca/ --format alpaca \\
        --base meta-llama/Llama-3.2-1B --output s3://bucket/run1 --select.top_fraction 0.06

The same command goes on where a stopped run left off.
"""

import sys

from davir_ray.cli import run_job
from davir_ray.config.run import RunConfig


def main(config: RunConfig) -> None:
    """Run the chain and say where the result lies; with --dry_run, only say what would be done."""
    from davir_ray.pipeline import dry_run, run_all  # late: a mistake in the options is told before torch and Ray load

    if config.dry_run:
        print("\n".join(dry_run(config)))
        return
    run = run_all(config)
    print(f"selected: {run / 'selected'}\nreport:   {run / 'report.html'}")


if __name__ == "__main__":
    sys.exit(run_job(main, RunConfig, __doc__))
