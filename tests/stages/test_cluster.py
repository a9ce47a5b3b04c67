"""A driver's connection to Ray."""

import os
import re
import subprocess
import sys

from davir_ray.stages import cluster

DRIVER = """
import ctypes, logging, sys, time
import ray
from davir_ray.cli import exit_status, show_debug
from davir_ray.stages.cluster import connected
from davir_ray.stages.console import configure_worker_logging

@ray.remote
def work() -> None:
    configure_worker_logging()
    print("a worker's print", flush=True)
    logging.getLogger("davir_ray.models").warning("a worker's warning")
    logging.getLogger("davir_ray.models").info("a worker's news")

def job() -> None:
    if sys.argv[1:] == ["--debug"]:
        show_debug()
    with connected():
        ray.get([work.remote() for _ in range(4)])
        ctypes.CDLL(None).write(2, b"native noise\\n", 13)
        print("a line on standard output")
        time.sleep(3)  # long enough for the lines to come while the driver works
    print("the result")

sys.exit(exit_status(job))
"""


def run_driver(address: str, *options: str) -> tuple[str, list[str]]:
    """Standard output of a job, and the lines on standard error."""
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, *options],
        env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, ended.stderr.splitlines()


def test_a_job_shows_its_result_and_what_its_workers_log(ray_address: str) -> None:
    """Ray prints in a driver what any process prints, and its C++ core writes to standard error itself (2.60)."""
    result, lines = run_driver(ray_address)
    assert result == "the result\n"
    assert sorted(lines) == ["a line on standard output", "a worker's news", "a worker's warning"]


def test_debug_shows_what_any_process_prints(ray_address: str) -> None:
    result, lines = run_driver(ray_address, "--debug")
    assert result == "the result\n"
    assert "native noise" in lines
    printed = [line for line in lines if re.fullmatch(r"\(work pid=\d+\) a worker's print", line)]
    assert len(printed) == 4
    assert sum(line.endswith(") a worker's news") for line in lines) == 4


def test_a_connection_that_is_there_leaves_standard_output_alone(ray_session: None) -> None:
    before = sys.stdout
    with cluster.connected():
        assert sys.stdout is before
