"""Where a run stands, from any machine that can read its output: no cluster is asked, nothing is written.

python jobs/status.py --output s3://bucket/run1
python jobs/status.py --output s3://bucket/run1 --json
"""

import argparse
import sys

from davir_ray.cli import exit_status, refuse_repeated


def main() -> None:
    """Print the status of the run that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", required=True, help="Folder of the run: a local path or s3://…")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of lines.")
    options = parser.parse_args()
    refuse_repeated(sys.argv[1:])
    from davir_ray.run.status import status  # late: --help need not wait for it

    found = status(options.output)
    print(found.to_json() if options.json else "\n".join(found.lines()))


if __name__ == "__main__":
    sys.exit(exit_status(main))
