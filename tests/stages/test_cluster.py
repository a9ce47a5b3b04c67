"""A driver's connection to Ray."""

import os
import subprocess
import sys

from davir_ray.stages import cluster

DRIVER = """
import time
import ray
from davir_ray.stages.cluster import connected

@ray.remote
def tell() -> None:
    print("a worker's line", flush=True)

with connected():
    ray.get(tell.remote())
    time.sleep(1)  # long enough for the line to come while the driver works
    ray.get(tell.remote())
print("the result")
"""


def test_standard_output_is_the_result_alone(ray_address: str) -> None:
    """Ray prints there what workers and nodes say, such as the raylet's warning of many workers (2.60)."""
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env={**os.environ, "RAY_ADDRESS": ray_address}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "the result\n"
    assert "a worker's line" in ended.stderr


def test_a_connection_that_is_there_leaves_standard_output_alone(ray_session: None) -> None:
    before = sys.stdout
    with cluster.connected():
        assert sys.stdout is before
