"""Does a run's selection train a better model? Fine-tune the base on it and on other rows, and measure each.

    ray job submit --working-dir . -- python jobs/compare.py --run s3://bucket/run1 --output s3://bucket/compare1 \\
        --heldout s3://bucket/alpaca_test/ --heldout_format alpaca --seeds 3

The same command goes on where a stopped comparison left off, arm by arm.
"""

import sys

from davir_ray.cli import run_job
from davir_ray.config.compare import CompareConfig


def main(config: CompareConfig) -> None:
    """Run the comparison and say where the result lies."""
    from davir_ray.compare.job import compare  # late: a mistake in the options is told before torch and Ray load

    output = compare(config)
    print(f"table: {output / 'results.parquet'}\npage:  {output / 'comparison.html'}")


if __name__ == "__main__":
    sys.exit(run_job(main, CompareConfig, __doc__))
