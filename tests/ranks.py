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
        # Of both: a rank whose peer has ended says no more than that.
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    finally:
        for process in processes:
            process.kill()
