"""Score instruction data by DavIR and select the best part of it: the whole chain, skipping complete stages.

    ray job submit --working-dir . -- python jobs/score.py --data s3://bucket/alpaca/ \\
        --base meta-llama/Llama-3.2-1B --output s3://bucket/run1 --select.top_fraction 0.06

The same command continues a stopped run.
"""

import sys

from davir_ray.cli import run_job
from davir_ray.config.run import RunConfig


def main(config: RunConfig) -> None:
    """Run the chain and print where the result is; with --dry_run, only print what would be done."""
    # Imported here, so that a mistake in the options, or a run that is complete, is reported before torch and Ray load.
    if config.dry_run:
        from davir_ray.pipeline import dry_run

        print("\n".join(dry_run(config)))
        return
    from davir_ray.complete import complete_run

    run = complete_run(config)
    if run is None:
        from davir_ray.pipeline import run_all

        run = run_all(config)
    print(f"selected: {run / 'selected'}\nreport:   {run / 'report.html'}")


if __name__ == "__main__":
    sys.exit(run_job(main, RunConfig, __doc__))
