"""Check a finished run: its files against their checksums, and random scores against a plain loop in float32.

    ray job submit --working-dir . -- python jobs/verify.py --output s3://bucket/run1 [--rows 200] [--seed 0]

Ends with status 1 if a file was changed, or a stored loss is not what the models give.
"""

import argparse
import sys

from jsonargparse import ArgumentParser

from davir_ray.cli import exit_status, refuse_repeated, show_debug
from davir_ray.config.yaml import DEBUG_HELP
from davir_ray.errors import ConfigError


def parser() -> ArgumentParser:
    """Options of this job."""
    options = ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    options.add_argument("--output", type=str, required=True, help="Folder of the run.")
    options.add_argument("--rows", type=int, default=200, help="Rows to score again, chosen at random.")
    options.add_argument("--seed", type=int, default=0, help="Seed of the choice.")
    options.add_argument(
        "--trust_remote_code", action="store_true", help="Run Python code that comes with the run's models."
    )
    options.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    return options


def main() -> None:
    """Verify the run that the command line names and say what was found."""
    refuse_repeated(sys.argv[1:])
    try:
        found = parser().parse_args()
    except argparse.ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if found.rows < 1:
        raise ConfigError(f"rows is {found.rows}; it must be at least 1")
    if found.debug:
        show_debug()
    from davir_ray.pipeline import verify_only  # late: a mistake in the options is told before torch and Ray load

    verified = verify_only(found.output, found.rows, found.seed, trust_remote_code=found.trust_remote_code)
    print("\n".join(verified.lines()))


if __name__ == "__main__":
    sys.exit(exit_status(main))
