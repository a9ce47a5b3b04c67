"""Fine-tune the base on the whole set and stop when the reference is there.

    ray job submit --working-dir . -- python jobs/finetune.py --data s3://bucket/alpaca/ --format alpaca \\
        --base meta-llama/Llama-3.2-1B --output s3://bucket/run1

jobs/score.py with the same options goes on from there: so all of its options are taken, and what it does later (score,
rank, select) is not looked at here.
"""

import sys

from davir_ray.cli import run_job
from davir_ray.config.run import RunConfig


def main(config: RunConfig) -> None:
    """Prepare, fine-tune, and say where the reference lies."""
    from davir_ray.pipeline import finetune_only  # late: a mistake in the options is told before torch and Ray load

    print(f"reference: {finetune_only(config)}")


if __name__ == "__main__":
    sys.exit(run_job(main, RunConfig, __doc__))
