"""Python processes that a benchmark starts and watches from outside."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def python_process(
    code: str, given: Mapping[str, Any], output: Path, variables: Mapping[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run code with its settings as JSON in sys.argv[1], with more variables in its environment; ended after the block.

    What it prints is added to the file `output`.
    """
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(given)],
            env={**os.environ, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
