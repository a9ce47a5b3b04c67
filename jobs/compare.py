"""Does a run's selection train a better model? Fine-tune the base on it and on other rows, and measure every model.

    ray job submit --working-dir . -- python jobs/compare.py --run s3://bucket/run1 --output s3://bucket/compare1 \\
        --heldout s3://bucket/alpaca_test/ --heldout_format alpaca --seeds 3

The same command continues a stopped comparison, arm by arm.
"""

import sys

from davir_ray.cli import run_job
from davir_ray.config.compare import CompareConfig


def main(config: CompareConfig) -> None:
    """Run the comparison and print where the result is."""
    # Imported here, so that a mistake in the options is reported before torch and Ray load.
    from davir_ray.compare.job import compare

    output = compare(config)
    print(f"table: {output / 'results.parquet'}\npage:  {output / 'comparison.html'}")


if __name__ == "__main__":
    sys.exit(run_job(main, CompareConfig, __doc__))
