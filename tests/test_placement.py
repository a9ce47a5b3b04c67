"""Where the actors of a pool stand: what fits, what is left free, and nodes that join late.

No machine of these tests has a GPU: its placement is tested with logical ones, which Ray counts and hands out like real
ones while the models run on CPUs.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from davir_ray.config.scoring import ScoreConfig
from davir_ray.engine.connect import NO_PROGRESS
from davir_ray.engine.resources import Pool, actor_cpus, plan_pool, pool_size, room_for
from davir_ray.errors import ClusterError, ConfigError
from davir_ray.run.folder import Run

NODES = [
    [{"CPU": 4.0}],
    [{"CPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}],
    [{"CPU": 3.0, "GPU": 8.0}, {"CPU": 1.0}],
    [{"CPU": 8.0, "GPU": 1.0}, {"memory": 1.0}],
    [{"CPU": 0.5}],
    [],
]

ON_ONE_CPU = """
import sys, ray
from davir_ray.cli import parse_as
from davir_ray.config.run import RunConfig
from davir_ray.pipeline import run_all
ray.init("local", num_cpus=1, include_dashboard=False)
run_all(parse_as(RunConfig, sys.argv[1:]))
"""


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, float]]], None]:
    """Let Ray tell of these nodes."""

    def tell(nodes: list[dict[str, float]]) -> None:
        dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [*({"Alive": True, "Resources": node} for node in nodes), dead])
        total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
        monkeypatch.setattr(ray, "cluster_resources", lambda: total)

    return tell


@pytest.mark.parametrize(
    ("nodes", "num_cpus", "num_gpus"), list(itertools.product(NODES, (0.5, 1.0, 2.0, 8.0), (0.0, 0.1, 0.5, 1.0, 2.0)))
)
def test_as_many_as_fit_with_room_left_for_writing(
    cluster_of: Any, nodes: list[dict[str, float]], num_cpus: float, num_gpus: float
) -> None:
    """The most that can be placed one after another, in exact tenths."""
    cluster_of(nodes)
    free = [{name: round(10 * value) for name, value in node.items()} for node in nodes]
    wanted = {"CPU": round(10 * num_cpus), "GPU": round(10 * num_gpus)}
    placed = 0
    while place := next((n for n in free if all(n.get(name, 0) >= size for name, size in wanted.items())), None):
        for name, size in wanted.items():
            place[name] = place.get(name, 0) - size
        placed += 1
    if placed and max(node.get("CPU", 0) for node in free) < min(10, wanted["CPU"]):
        placed -= 1  # then a task that writes has its place
    room = max(0, room_for(num_cpus, num_gpus))
    assert room == placed
    if placed:
        assert pool_size(None, num_cpus, num_gpus) == placed == pool_size(placed, num_cpus, num_gpus)
    with pytest.raises(ClusterError, match="do not fit"):
        pool_size(placed + 1, num_cpus, num_gpus)


def test_one_actor_to_a_gpu_unless_fractions_are_asked_for(cluster_of: Any) -> None:
    cluster_of([{"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}])
    assert plan_pool(ScoreConfig()) == Pool(2, 2, 2)
    assert plan_pool(ScoreConfig(num_gpus=0.25)) == Pool(8, 8, 8)
    assert plan_pool(ScoreConfig(num_gpus=0)) == Pool(11, 11, 11)


def test_one_cpu_has_room_for_an_actor_and_for_what_reads_and_writes(cluster_of: Any) -> None:
    cluster_of([{"CPU": 1.0}])
    assert plan_pool(ScoreConfig()) == Pool(1, 1, 1)
    assert 2 * actor_cpus(1.0) <= 1
    with pytest.raises(ClusterError, match=r"2 actors of 0\.5 CPUs.*lower score\.num_actors"):
        plan_pool(ScoreConfig(num_actors=2))
    with pytest.raises(ClusterError, match=r"1 actors of 2 CPUs.*score\.num_cpus"):
        plan_pool(ScoreConfig(num_cpus=2))
    cluster_of([{"CPU": 1.0}, {"CPU": 1.0}])
    assert actor_cpus(1.0) == 1.0


def test_a_pool_that_grows_begins_with_what_fits(cluster_of: Any) -> None:
    cluster_of([{"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}])
    assert plan_pool(ScoreConfig(autoscale=[1, 16])) == Pool(1, 16, 2)
    assert plan_pool(ScoreConfig(autoscale=[1, 1])) == Pool(1, 1, 1)
    assert plan_pool(ScoreConfig(autoscale=[5, 16])) == Pool(2, 16, 2), "more would take what reads and writes need"
    assert Pool(5, 16, 5).at_most(3) == Pool(3, 3, 3)
    cluster_of([{"CPU": 4.0}])
    assert plan_pool(ScoreConfig(autoscale=[2, 16], num_gpus=1)) == Pool(2, 16, 2), "the nodes with GPUs are to come"


@pytest.mark.parametrize("wrong", [[2, 1], [0, 3], [1], [1, 2, 3]])
def test_a_wrong_range_is_refused(wrong: list[int]) -> None:
    with pytest.raises(ConfigError, match="ascending numbers"):
        ScoreConfig(autoscale=wrong)


def test_a_number_and_a_range_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="one of the two"):
        ScoreConfig(autoscale=[1, 2], num_actors=1)


@pytest.mark.slow
def test_one_cpu_runs_the_whole_chain_with_the_defaults(
    data_folder: Path, base_folder: Path, reference_folder: Path, tmp_path: Path
) -> None:
    options = {
        "data": data_folder / "alpaca_9k.jsonl.gz", "format": "alpaca", "limit": 40, "prepare.shard_rows": 16,
        "base": base_folder, "reference": reference_folder, "max_bad_fraction": 0.1, "output": tmp_path / "run",
        "select.top_k": 5, "score.no_progress_timeout_s": 120,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-c", ON_ONE_CPU, *words],
        env=kept | {NO_PROGRESS: "120"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    manifest = Run.at(tmp_path / "run").manifest("select")
    assert manifest is not None
    assert manifest.counts["selected"] == 5
