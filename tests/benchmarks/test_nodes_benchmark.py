"""The benchmark of many nodes, on few: what its files say of nodes that are lost, come and go."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from changed_workers import changed_workers

from davir_ray.benchmarks import nodes
from davir_ray.benchmarks.nodes import NodesBenchmark
from davir_ray.errors import ConfigError

NOT_ALONE = """
def not_alone(nodes):
    wait, calls = nodes.Waiter.__call__, itertools.count()

    def call(self, examples):
        if next(calls) >= 3:
            wait_until(lambda: len(list(self._notes.parent.iterdir())) >= 2)
        return wait(self, examples)

    nodes.Waiter.__call__ = call

CHANGES["davir_ray.benchmarks.nodes"] = not_alone
"""
"""An actor waits after three shards until another has begun one, however late its node comes."""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")  # first, as a process has either tokens or none
def test_nodes_that_are_lost_or_come_late_lose_and_double_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changed_workers(tmp_path / "site", NOT_ALONE).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS", "1")
    settings = NodesBenchmark(nodes=3, shards_per_node=8, seconds=0.5, lost=1, lost_every_seconds=1, autoscaled=2)
    result = nodes.measure(tmp_path, settings)
    assert json.loads(json.dumps(result)) == result
    for name, num_nodes in (("lost", 3), ("autoscaled", 2)):
        files = sorted((tmp_path / name / "run" / "scores").glob("*.parquet"))
        ids = [row["example_id"] for file in files for row in pq.read_table(file).to_pylist()]
        assert sorted(ids) == list(range(8 * num_nodes))
        assert result[name]["shards"] == 8 * num_nodes
        assert result[name]["most_at_once_on_a_node"] == 1, "a node has one GPU"
        assert 0 <= result[name]["busy_share"] <= 1, "of the middle half, in which all may wait for a late node"
        assert result[name]["shards_begun_twice"] <= (name == "lost")
    assert result["lost"]["nodes_lost"] == 1
    assert result["lost"]["nodes_used"] >= 3
    assert result["autoscaled"]["nodes_used"] == 2, "the pool grew"
    assert result["autoscaled"]["driver"]["seconds_until_the_nodes_had_left"] > 0


@pytest.mark.parametrize(
    "wrong", [{"nodes": 1}, {"shards_per_node": 3}, {"lost": -1}, {"lost": 50}, {"autoscaled": -1}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        NodesBenchmark(**wrong)
