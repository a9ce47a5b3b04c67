"""Write the selection, the mixture or all ranked rows of a finished run for a trainer, with what it loads them by.

    ray job submit --working-dir . -- python jobs/export.py --run s3://bucket/run1 --to trl --output s3://bucket/export1

--push_to_hub org/name uploads it as a data set, private unless --public is given.
"""

import sys

from davir_ray.cli import run_job
from davir_ray.config.export import ExportOptions


def main(options: ExportOptions) -> None:
    """Export and print where the rows are."""
    # Imported here, so that a mistake in the options is reported before torch and Ray load.
    from davir_ray.export.job import export

    output = export(options)
    print(f"rows: {output / 'data'}")
    if options.push_to_hub is not None:
        print(f"hub:  {options.push_to_hub}")


if __name__ == "__main__":
    sys.exit(run_job(main, ExportOptions, __doc__))
