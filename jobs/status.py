"""How far a run is, from any machine that can read its output.

    python jobs/status.py --output s3://bucket/run1
    python jobs/status.py --output s3://bucket/run1 --json

Needs no cluster and writes nothing.
"""

import sys
from dataclasses import dataclass

from davir_ray.cli import run_job


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """The options of this job."""

    output: str
    """Folder of the run: a local path or s3://…"""
    json: bool = False
    """Print one JSON object instead of lines."""


def main(options: StatusOptions) -> None:
    """Print the status of the run."""
    from davir_ray.run.status import status  # imported here, so that --help is fast

    found = status(options.output)
    print(found.to_json() if options.json else "\n".join(found.lines()))


if __name__ == "__main__":
    sys.exit(run_job(main, StatusOptions, __doc__))
