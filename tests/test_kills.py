"""What dies in the middle of a run: driver, actor, node, store. The result is that of a run without a death."""

import gzip
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drivers import Driver, assert_same_content
from object_store.conftest import make_bucket
from object_store.stores import Store, ceph, require_ceph
from ray.cluster_utils import Cluster

from davir_ray.cli import parse_as
from davir_ray.config.run import RunConfig
from davir_ray.pipeline import run_all
from davir_ray.run.folder import Run
from davir_ray.run.location import TEMPORARY, FileInfo, Location

pytestmark = pytest.mark.slow

NUM_ROWS = 240
NUM_FILES = 4
SHARD_ROWS = 12
NUM_SHARDS = NUM_ROWS // SHARD_ROWS
WITH_ITS_RAY = "half of the scores"
"""When a driver dies with a Ray that it started itself; at other moments its Ray lives on, as a cluster does."""
SETTINGS = {
    "format": "alpaca", "max_bad_fraction": 0.3, "prepare.shard_rows": SHARD_ROWS, "prepare.max_tokens": 512,
    "score.num_actors": 1, "select.top_fraction": 0.25, "select.drop_duplicates": "true",
}  # fmt: skip


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
    """When the driver is killed: in each stage, at its begin, in the middle or between stages."""

    def at_least(count: int, folder: str) -> Callable[[], bool]:
        return lambda: len((run / folder).names()) >= count

    def complete(stage: str) -> Callable[[], bool]:
        return lambda: f"{stage}.json" in (run / "manifests").names()

    return {
        "the lease is taken": lambda: (run / "lease.json").exists(),
        "the first examples": at_least(1, "examples"),
        "prepare is complete": complete("prepare"),
        "the first scores": at_least(1, "scores"),
        WITH_ITS_RAY: at_least(NUM_SHARDS // 2, "scores"),
        "score is complete": complete("score"),
        "the first ranks": at_least(1, "ranked"),
        "rank is complete": complete("rank"),
        "the first selected": at_least(1, "selected"),
        "select is complete": complete("select"),
    }


IN_A_STORE = ["the first examples", "the first scores", "rank is complete", "select is complete"]
"""The moments with the output in a store; on a disk the driver is killed at all the others."""


def kill_at(
    chosen: dict[str, Callable[[], bool]],
    run: Run,
    options: dict[str, Any],
    logs: Path,
    environment: dict[str, str] | None = None,
    address: str | None = None,
) -> None:
    """One driver after another on the same output, each killed at the next of these moments; the last one ends.

    None scores again, or changes, what was committed before it.
    """
    for number, (what, condition) in enumerate([*chosen.items(), ("the end", None)]):
        ray = None if what == WITH_ITS_RAY else address
        driver = Driver("score.py", options, logs / f"{number}.log", environment, ray)
        time.sleep(2)  # while it starts, what writes when its driver dies may end
        committed = (run / "scores").listed()
        if condition is None:
            assert driver.finish() == 0, driver.output
        else:
            driver.wait_for(condition, what)
            driver.kill()
        if "shards to do" in driver.output:
            to_do, done = shards_of(driver.output)
            assert to_do + done == NUM_SHARDS
            assert done >= len(committed)  # an actor may have outlived its driver by another shard
        assert_left_as_it_was(run, committed)


def assert_left_as_it_was(run: Run, committed: dict[str, FileInfo]) -> None:
    """What was committed before is there, and was not written again."""
    after = (run / "scores").listed()
    assert {name: after[name] for name in committed} == committed


def test_a_driver_that_dies_in_each_stage_and_scored_shards_that_are_not_scored_again(
    options: dict[str, Any], undisturbed: Run, ray_address: str, tmp_path: Path
) -> None:
    run = Run.at(tmp_path / "run")
    chosen = {what: condition for what, condition in moments(run).items() if what not in IN_A_STORE}
    kill_at(chosen, run, {**options, "output": run}, tmp_path, address=ray_address)
    after_half_of_the_scores = (tmp_path / f"{list(chosen).index(WITH_ITS_RAY) + 1}.log").read_text()
    assert 0 < shards_of(after_half_of_the_scores)[0] < NUM_SHARDS, "all was scored before the kill"
    assert_same_content(run, undisturbed)
    assert not list(Path(run.folder.path).rglob(f"{TEMPORARY}*"))
    assert not (run / "prepare_tasks").exists()
    assert not (run / "lease.json").exists()


def test_an_actor_that_dies_and_a_second_driver_on_one_output(
    options: dict[str, Any], undisturbed: Run, ray_address: str, tmp_path: Path
) -> None:
    run = Run.at(tmp_path / "run")
    shown = {**options, "output": run, "debug": "true"}
    first = Driver("score.py", shown, tmp_path / "first.log", address=ray_address)
    first.wait_for(lambda: (run / "lease.json").exists(), "the lease")
    second = Driver("score.py", {**options, "output": run}, tmp_path / "second.log", address=ray_address)
    first.wait_for(lambda: bool((run / "scores").names()), "the first scores")
    (pid,) = first.wait_for_actors()
    os.kill(pid, signal.SIGKILL)
    assert second.finish() == 2, second.output
    assert f"is being written by process {first.process.pid}" in second.output
    assert first.finish() == 0, first.output
    assert len(first.actors()) == 2
    assert_same_content(run, undisturbed)


def test_of_hundreds_of_small_shards_a_kill_loses_one_for_each_actor_at_most(
    options: dict[str, Any], ray_address: str, tmp_path: Path
) -> None:
    """Shards are sent in groups, but committed one by one: at a random moment, first the driver, then an actor."""
    run = Run.at(tmp_path / "run")
    wanted = {**options, "output": run, "prepare.shard_rows": 1, "score.num_actors": 2, "debug": "true"}
    wanted |= {"limit": 2 * NUM_ROWS // 3}
    first = Driver("score.py", wanted, tmp_path / "first.log", address=ray_address)
    moment = random.randint(1, 60)
    first.wait_for(lambda: len((run / "scores").names()) >= moment, f"{moment} scores")
    first.kill()
    time.sleep(2)
    committed = (run / "scores").listed()
    second = Driver("score.py", wanted, tmp_path / "second.log", address=ray_address)
    moment = len(committed) + random.randint(1, 60)
    second.wait_for(lambda: len((run / "scores").names()) >= moment, f"{moment} scores")
    os.kill(random.choice(sorted(second.wait_for_actors())), signal.SIGKILL)
    assert second.finish() == 0, second.output
    to_do, done = shards_of(second.output)
    assert done >= len(committed)
    assert to_do > 0
    scored = run.require("score")
    assert len(scored.files) == to_do + done == run.require("prepare").counts["prepared"]
    assert scored.details["retries"] <= 1
    assert_left_as_it_was(run, committed)
    assert not (run / "scores_commits").exists()


def test_a_node_that_dies(options: dict[str, Any], undisturbed: Run, tmp_path: Path) -> None:
    run = Run.at(tmp_path / "run")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        node = cluster.add_node(num_cpus=2)
        wanted = {**options, "output": run, "output_is_shared": "true", "score.num_actors": 3}
        driver = Driver("score.py", wanted, tmp_path / "log", address=cluster.address)
        driver.wait_for(lambda: len((run / "scores").names()) >= 4, "the first scores")
        node.kill_raylet()
        assert len((run / "scores").names()) < NUM_SHARDS, "all was scored before the kill"
        assert driver.finish() == 0, driver.output
    finally:
        cluster.shutdown()
    assert_same_content(run, undisturbed)


def test_a_store_that_dies_while_shards_are_written(
    ceph_store: Store, options: dict[str, Any], undisturbed: Run, ray_address: str, tmp_path: Path
) -> None:
    uri = f"s3://{make_bucket(ceph_store)}/run"
    run = Location(ceph_store.client(), uri.removeprefix("s3://"))
    wanted = {**options, "output": uri}
    first = Driver("score.py", wanted, tmp_path / "first.log", ceph_store.environment, ray_address)
    first.wait_for(lambda: len((run / "scores").names()) >= 3, "the first scores")
    ceph_store.kill()
    time.sleep(3)
    ceph_store.restart()
    status = first.finish()
    committed = (run / "scores").listed()
    assert len(committed) >= 3
    if status != 0:
        assert "The same command continues where this run stopped" in first.output
        again = Driver("score.py", wanted, tmp_path / "again.log", ceph_store.environment, ray_address)
        assert again.finish() == 0, again.output
    assert_left_as_it_was(Run(run), committed)
    assert_same_content(Run(run), undisturbed)


def test_a_driver_that_dies_in_each_stage_with_its_output_in_a_store(
    ceph_store: Store, options: dict[str, Any], undisturbed: Run, ray_address: str, tmp_path: Path
) -> None:
    uri = f"s3://{make_bucket(ceph_store)}/run"
    run = Location(ceph_store.client(), uri.removeprefix("s3://"))
    chosen = {what: moments(Run(run))[what] for what in IN_A_STORE}
    kill_at(chosen, Run(run), {**options, "output": uri}, tmp_path, ceph_store.environment, ray_address)
    assert_same_content(Run(run), undisturbed)
    assert not (run / "lease.json").exists()
