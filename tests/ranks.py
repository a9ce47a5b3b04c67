"""Two processes of one process group, as a fine-tune on two workers has them."""

import os
import subprocess
import sys
from pathlib import Path


def run_two_ranks(script: str, folder: Path, seconds: float = 400) -> None:
    """Run `script RANK FOLDER` as ranks 0 and 1 at the same time; both must end well."""
    commands = [[sys.executable, script, str(rank), str(folder)] for rank in range(2)]
    # The scripts import what lies beside the tests.
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
