"""Train a policy on preference pairs by DavIR-DPO, DPO, IPO or length-normalised DPO, and measure the result.

    ray job submit --working-dir . -- python jobs/align.py --data s3://bucket/pairs/ --format preference \\
        --base org/model --output s3://bucket/aligned --align.loss davir_dpo --align.heldout_fraction 0.1

The same command continues a stopped run.
"""

import sys

from davir_ray.cli import run_job
from davir_ray.config.align import AlignRunConfig


def main(config: AlignRunConfig) -> None:
    """Run the chain and print where the policy and the report are; with --dry_run, only print what would be done."""
    # Imported here, so that a mistake in the options is reported before torch and Ray load.
    from davir_ray.align.job import dry_run, run_alignment

    if config.dry_run:
        print("\n".join(dry_run(config)))
        return
    run = run_alignment(config)
    print(f"policy: {run / 'policy'}\nreport: {run / 'report.html'}")


if __name__ == "__main__":
    sys.exit(run_job(main, AlignRunConfig, __doc__))
