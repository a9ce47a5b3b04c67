"""Check a finished run: its files against their checksums, and random scores against a plain loop in float32.

    ray job submit --working-dir . -- python jobs/verify.py --output s3://bucket/run1 [--rows 200] [--seed 0]

Ends with status 1 if a file has changed, or a stored loss differs from what the models compute.
"""

import sys
from dataclasses import dataclass

from davir_ray.cli import run_job
from davir_ray.config.checks import check


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The options of this job."""

    output: str
    """Folder of the run."""
    rows: int = 200
    """Rows to score again, chosen at random."""
    seed: int = 0
    """Seed of the random choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the run's models."""

    def __post_init__(self) -> None:
        check(self.rows >= 1, "rows", self.rows, "at least 1")


def main(options: VerifyOptions) -> None:
    """Verify the run and print the result."""
    # Imported here, so that a mistake in the options is reported before torch and Ray load.
    from davir_ray.pipeline import verify_only

    code = options.trust_remote_code
    print("\n".join(verify_only(options.output, options.rows, options.seed, trust_remote_code=code).lines()))


if __name__ == "__main__":
    sys.exit(run_job(main, VerifyOptions, __doc__))
