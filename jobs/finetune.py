"""Fine-tune the base on the whole set and stop when the reference is complete.

    ray job submit --working-dir . -- python jobs/finetune.py --data s3://bucket/alpaca/ \\
        --base meta-llama/Llama-3.2-1B --output s3://bucket/run1

jobs/score.py with the same options continues from there. Therefore all of its options but --dry_run and --reference are
accepted here; those of the later stages (score, rank, select) have no effect.
"""

import sys

from davir_ray.cli import run_job
from davir_ray.config.run import RunConfig


def main(config: RunConfig) -> None:
    """Prepare, fine-tune, and print where the reference is."""
    # Imported here, so that a mistake in the options is reported before torch and Ray load.
    from davir_ray.pipeline import finetune_only

    run = finetune_only(config)
    print(f"reference: {run / ('reference' if config.prepare.folds == 1 else 'reference_folds')}")


if __name__ == "__main__":
    sys.exit(run_job(main, RunConfig, __doc__))
