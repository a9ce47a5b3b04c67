"""What dies in the middle of a run: driver, actor, node, store. The result is that of a run without a death."""

import gzip
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changed_workers import ON_THE_CPU, Gate
from drivers import PACKAGE, Driver, assert_same_content
from object_store.conftest import make_bucket
from object_store.stores import Store, ceph, require_ceph
from ray.cluster_utils import Cluster

from davir_ray.cli import parse_as
from davir_ray.config.run import RunConfig
from davir_ray.engine.console import LOG_LEVEL
from davir_ray.pipeline import run_all
from davir_ray.run.folder import Run
from davir_ray.run.lease import LEASE_FILE, Holder
from davir_ray.run.location import TEMPORARY, FileInfo, Location

pytestmark = pytest.mark.slow

NUM_ROWS = 240
NUM_FILES = 4
SHARD_ROWS = 3
NUM_SHARDS = NUM_ROWS // SHARD_ROWS
"""So many that they are sent in groups; each is committed by itself."""
SETTINGS = {
    "format": "alpaca", "max_bad_fraction": 0.3, "prepare.shard_rows": SHARD_ROWS, "prepare.max_tokens": 512,
    "score.num_actors": 1, "select.top_fraction": 0.25, "select.drop_duplicates": "true",
}  # fmt: skip

API_ON_A_GPU = """
import sys, davir_ray, ray
from davir_ray.config.scoring import ScoreConfig
rows = ray.data.from_items([{"prompt": "Count.", "response": "one two"}] * 8)
scored = davir_ray.score(rows, base=sys.argv[1], reference=sys.argv[2], config=ScoreConfig(num_actors=1, num_gpus=0.5))
print(sum(row["status"] == "ok" for row in scored.take_all()))
"""


@pytest.fixture(scope="module")
def data(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real rows in several files."""
    folder = tmp_path_factory.mktemp("data")
    with gzip.open(data_folder / "alpaca_9k.jsonl.gz", "rt") as source:
        for number in range(NUM_FILES):
            lines = [next(source) for _ in range(NUM_ROWS // NUM_FILES)]
            (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def options(data: Path, base_folder: Path, reference_folder: Path) -> dict[str, Any]:
    return {"data": data, "base": base_folder, "reference": reference_folder, **SETTINGS}


@pytest.fixture(scope="module")
def undisturbed(options: dict[str, Any], ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run without a death."""
    wanted = {**options, "output": tmp_path_factory.mktemp("undisturbed") / "run"}
    return run_all(parse_as(RunConfig, [f"--{name}={value}" for name, value in wanted.items()]))


@pytest.fixture(scope="module")
def ceph_store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store of this module's own: it is killed."""
    require_ceph()
    with ceph(tmp_path_factory.mktemp("ceph")) as store:
        yield store


def shards_of(output: str) -> tuple[int, int]:
    """Shards to do and shards already done, as the driver says."""
    (found,) = re.findall(r"score: (\d+) shards to do, (\d+) already done", output)
    return int(found[0]), int(found[1])


def moments(run: Run) -> dict[str, Callable[[], bool]]:
    """When a driver is killed: in each stage, at its begin, in the middle or between stages."""

    def at_least(count: int, folder: str) -> Callable[[], bool]:
        return lambda: len((run / folder).names()) >= count

    def complete(stage: str) -> Callable[[], bool]:
        return lambda: f"{stage}.json" in (run / "manifests").names()

    return {
        "the lease is taken": lambda: (run / "lease.json").exists(),
        "the first examples": at_least(1, "examples"),
        "prepare is complete": complete("prepare"),
        "the first scores": at_least(1, "scores"),
        "score is complete": complete("score"),
        "the first ranks": at_least(1, "ranked"),
        "rank is complete": complete("rank"),
        "the first selected": at_least(1, "selected"),
        "select is complete": complete("select"),
    }


def kill_at(
    what: str,
    run: Run,
    options: dict[str, Any],
    logs: Path,
    environment: dict[str, str] | None = None,
    address: str | None = None,
) -> None:
    """One more driver on this output, which is killed at this moment."""
    driver = Driver("score.py", options, logs / f"{what}.log", environment, address)
    committed = scores_before(run)
    driver.wait_for(moments(run)[what], what)
    driver.kill()
    assert_not_scored_again(driver, run, committed)


def run_to_its_end(
    run: Run,
    options: dict[str, Any],
    logs: Path,
    environment: dict[str, str] | None = None,
    address: str | None = None,
) -> None:
    """The last driver on this output."""
    driver = Driver("score.py", options, logs / "the end.log", environment, address)
    committed = scores_before(run)
    assert driver.finish() == 0, driver.output
    assert_not_scored_again(driver, run, committed)


def scores_before(run: Run) -> dict[str, FileInfo]:
    """What is committed when a driver has been started, and what wrote when the last one died may have ended."""
    time.sleep(2)
    return (run / "scores").listed()


def assert_not_scored_again(driver: Driver, run: Run, committed: dict[str, FileInfo]) -> None:
    """What was committed before is there, was not written again, and was not begun, as the driver says."""
    if "shards to do" in driver.output:
        to_do, done = shards_of(driver.output)
        assert to_do + done == NUM_SHARDS
        assert done >= len(committed)  # an actor may have outlived its driver by another shard
    assert_left_as_it_was(run, committed)


def assert_left_as_it_was(run: Run, committed: dict[str, FileInfo]) -> None:
    after = (run / "scores").listed()
    assert {name: after[name] for name in committed} == committed


def test_on_a_disk_a_driver_dies_in_each_stage_and_then_with_its_ray_and_then_an_actor(
    options: dict[str, Any], undisturbed: Run, ray_address: str, tmp_path: Path
) -> None:
    """In the middle of the scores, at a random one: of the small shards, a kill loses one for each actor at most.

    Meanwhile a second driver on the output is refused.
    """
    run = Run.at(tmp_path / "run")
    wanted = {**options, "output": run}
    kill_at("the lease is taken", run, wanted, tmp_path, address=ray_address)
    kill_at("prepare is complete", run, wanted, tmp_path, address=ray_address)

    alone = Gate(tmp_path / "alone", num_shards=random.randint(1, 15))
    first = Driver("score.py", wanted, tmp_path / "alone.log", alone.environment())
    first.wait_for(lambda: len((run / "scores").names()) >= alone.num_shards, f"{alone.num_shards} scores")
    first.kill()

    # In the middle of a group: those that are left are sent two by two.
    gate = Gate(tmp_path / "two", num_shards=random.choice([1, 3, 5]))
    shown = wanted | {"debug": "true", "score.num_actors": 2}
    second = Driver("score.py", shown, tmp_path / "two.log", gate.environment(), ray_address)
    committed = scores_before(run)
    assert len(committed) == alone.num_shards
    second.wait_for(lambda: (Holder.read(run / LEASE_FILE) or Holder()).pid == second.process.pid, "its lease")
    third = Driver("score.py", wanted, tmp_path / "third.log", address=ray_address)
    second.wait_for(lambda: len(gate.actors()) == 2, "two actors")
    assert third.finish() == 2, third.output
    assert f"is being written by process {second.process.pid}" in third.output
    os.kill(random.choice(gate.actors()), signal.SIGKILL)
    gate.open()
    second.wait_for(moments(run)["the first ranks"], "the first ranks")
    second.kill()
    assert_not_scored_again(second, run, committed)
    assert len(gate.actors()) == len(second.actors()) == 3
    scored = run.require("score")
    assert len(scored.files) == NUM_SHARDS
    assert scored.details["retries"] <= 1
    assert not (run / "scores_commits").exists()

    kill_at("the first selected", run, wanted, tmp_path, address=ray_address)
    run_to_its_end(run, wanted, tmp_path, address=ray_address)
    assert_same_content(run, undisturbed)
    assert not list(Path(run.folder.path).rglob(f"{TEMPORARY}*"))
    assert not (run / "prepare_tasks").exists()
    assert not (run / "lease.json").exists()


def test_in_a_store_a_driver_dies_in_each_stage_and_then_the_store(
    ceph_store: Store, options: dict[str, Any], undisturbed: Run, ray_address: str, tmp_path: Path
) -> None:
    """The store dies while shards are written: the driver goes on with it, or ends with a message."""
    uri = f"s3://{make_bucket(ceph_store)}/run"
    run = Run(Location(ceph_store.client(), uri.removeprefix("s3://")))
    wanted, store = {**options, "output": uri}, ceph_store.environment
    kill_at("the first examples", run, wanted, tmp_path, store, ray_address)
    gate = Gate(tmp_path / "first", num_shards=3)
    kill_at("the first scores", run, wanted, tmp_path, store | gate.environment(), ray_address)
    gate.open()  # if the actor should outlive its driver

    gate = Gate(tmp_path / "gate", num_shards=3)
    driver = Driver("score.py", wanted, tmp_path / "store.log", store | gate.environment(), ray_address)
    committed = scores_before(run)
    driver.wait_for(lambda: len((run / "scores").names()) >= len(committed) + gate.num_shards, "more scores")
    more = (run / "scores").listed()
    ceph_store.kill()
    gate.open()
    time.sleep(3)
    ceph_store.restart()
    is_complete = moments(run)["score is complete"]
    while driver.process.poll() is None and not is_complete():
        time.sleep(0.02)
    if driver.process.poll() is None:
        driver.kill()
    else:
        assert driver.process.returncode != 0, driver.output
        assert "The same command continues where this run stopped" in driver.output
        kill_at("score is complete", run, wanted, tmp_path, store, ray_address)
    assert_not_scored_again(driver, run, committed)
    assert_left_as_it_was(run, more)

    kill_at("rank is complete", run, wanted, tmp_path, store, ray_address)
    kill_at("select is complete", run, wanted, tmp_path, store, ray_address)
    run_to_its_end(run, wanted, tmp_path, store, ray_address)
    assert_same_content(run, undisturbed)
    assert not (run / "lease.json").exists()


def test_every_gpu_is_used_of_nodes_that_join_late_die_and_are_replaced(
    options: dict[str, Any], undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On logical GPUs, which Ray counts and hands out like real ones while the models run on CPUs.

    The first actor waits until another has begun a shard on the second node. Then its node dies.
    """
    gate = Gate(tmp_path / "gate", num_shards=3)
    # Of the nodes that start here, and so of their workers.
    for name, value in (gate.environment(ON_THE_CPU) | {LOG_LEVEL: "DEBUG"}).items():
        monkeypatch.setenv(name, value)
    run = Run.at(tmp_path / "run")
    wanted = {**options, "output": run, "output_is_shared": "true", "score.autoscale": "[1, 4]", "debug": "true"}
    del wanted["score.num_actors"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        first = cluster.add_node(num_cpus=2, num_gpus=1)
        variables = {"RAY_ADDRESS": cluster.address, "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "1"}
        driver = Driver("score.py", wanted, tmp_path / "log", variables)
        driver.wait_for(lambda: len(gate.actors()) == 1, "the first actor")
        late = cluster.add_node(num_cpus=2, num_gpus=1)
        driver.wait_for(lambda: len(gate.actors()) == 2, "an actor on the node that joins late")
        first.kill_raylet()
        assert len((run / "scores").names()) < NUM_SHARDS, "all was scored before the kill"
        replacement = cluster.add_node(num_cpus=2, num_gpus=1)
        gate.open()
        assert driver.finish() == 0, driver.output
        command = [sys.executable, "-c", API_ON_A_GPU, str(options["base"]), str(options["reference"])]
        environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(PACKAGE)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.stdout.splitlines()[-1:] == ["8"], ended.stderr
    finally:
        cluster.shutdown()
    assert_same_content(run, undisturbed)
    assert "score: 1 actors (1 to 4) of 1 CPUs and 1 GPUs" in driver.output
    nodes = dict(re.findall(r"pid=(\d+)\S* score: an actor is ready on node (\w+)", driver.output))
    scored_by = {nodes[pid] for pid in re.findall(r"pid=(\d+)\S* score: part-\S+ \d+ rows", driver.output)}
    assert scored_by >= {first.node_id[:8], late.node_id[:8]}
    assert scored_by <= {node.node_id[:8] for node in (first, late, replacement)}, "not the head, which has no GPU"
