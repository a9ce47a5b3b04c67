"""The whole chain with every path in a real store: the result is that on a disk, throttled or not; no secret left."""

import gzip
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drivers import Driver, assert_same_content
from object_store.conftest import make_bucket
from object_store.proxy import FaultyProxy
from object_store.stores import Store
from without_ray_train import without_ray_train

from davir_ray.cli import parse_as
from davir_ray.config.run import RunConfig
from davir_ray.pipeline import run_all
from davir_ray.run.folder import Run
from davir_ray.run.location import Location

pytestmark = pytest.mark.slow

NUM_ROWS = 120
SETTINGS = {
    "format": "alpaca", "max_bad_fraction": 0.2, "prepare.shard_rows": 16, "prepare.max_tokens": 256,
    "finetune.epochs": 1, "finetune.batch_size": 32, "finetune.learning_rate": 1e-3, "finetune.lora_rank": 4,
    "score.num_actors": 1, "select.top_fraction": 0.25, "select.jsonl": "true",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of real data, and two that are bad."""
    folder = tmp_path_factory.mktemp("rows")
    with gzip.open(data_folder / "alpaca_9k.jsonl.gz", "rt") as source:
        lines = [next(source) for _ in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("".join(lines) + "{\n[]\n")
    return folder


@pytest.fixture(scope="module")
def on_disk(rows: Path, base_folder: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run on a local disk."""
    output = tmp_path_factory.mktemp("disk") / "run"
    options = {"data": rows, "base": base_folder, "output": output, **SETTINGS}
    with without_ray_train():
        return run_all(parse_as(RunConfig, [f"--{name}={value}" for name, value in options.items()]))


def upload(store: Store, rows: Path, base_folder: Path) -> dict[str, Any]:
    """Everything that a run needs into a new bucket; returns the options that name it."""
    bucket = f"s3://{make_bucket(store)}"
    client = store.client()
    for folder, name in ((rows, "data"), (base_folder, "base")):
        for file in folder.iterdir():
            client.put_file(str(file), f"{bucket}/{name}/{file.name}")
    places = {"data": f"{bucket}/data/", "base": f"{bucket}/base", "output": f"{bucket}/run"}
    return {**places, "score.base_cache": f"{bucket}/cache", **SETTINGS}


def location(store: Store, uri: str) -> Run:
    return Run(Location(store.client(), uri.removeprefix("s3://")))


@pytest.fixture
def proxy(store: Store) -> Iterator[FaultyProxy | None]:
    """What throttles one in ten of the requests to moto; nothing throttles the other store."""
    if store.name != "moto":
        yield None
        return
    with FaultyProxy(store.endpoint, share=0.1).serving() as proxy:
        yield proxy
        assert proxy.counts["refused"] > 10


def test_every_path_in_a_store_throttled_or_not(
    store: Store,
    proxy: FaultyProxy | None,
    rows: Path,
    base_folder: Path,
    on_disk: Run,
    ray_address: str,
    tmp_path: Path,
) -> None:
    options = upload(store, rows, base_folder)
    secret = {**store.environment, "DAVIR_RAY_CACHE": str(tmp_path / "cache")}
    if proxy is not None:
        secret["AWS_ENDPOINT_URL"] = proxy.endpoint
    with tempfile.TemporaryDirectory(prefix="r") as temporary:  # a short path: Ray's sockets lie below it
        # With one of the stores in a Ray of its own, whose files are looked through.
        alone = {"RAY_TMPDIR": temporary, "TMPDIR": temporary} if proxy is not None else {}
        first = Driver("score.py", options, tmp_path / "first.log", secret | alone, None if alone else ray_address)
        assert first.finish() == 0, first.output
        left = [tmp_path, Path(temporary)]
        assert grep(store.secret, left) == []
        assert grep(store.key, left) == []
    run = location(store, options["output"])
    assert_same_content(run, on_disk)
    for path in run.folder.fs.find(run.folder.path):
        content = run.folder.fs.cat_file(path)
        assert store.secret.encode() not in content, path
        assert store.key.encode() not in content, path
    assert not (run / "checkpoints").exists()
    complete = ["prepare", "finetune", "score"]
    if proxy is not None:
        score_again_in_a_store_that_only_throttles(run, options, secret, proxy, ray_address, tmp_path)
        complete.remove("score")
    again = Driver("score.py", options, tmp_path / "again.log", secret, ray_address)
    assert again.finish() == 0, again.output
    assert [stage for stage in complete if f"{stage}: complete, skipped" not in again.output] == []
    assert not (run / "lease.json").exists()
    assert_same_content(run, on_disk)


def score_again_in_a_store_that_only_throttles(
    run: Run, options: dict[str, Any], secret: dict[str, str], proxy: FaultyProxy, ray_address: str, logs: Path
) -> None:
    """The driver ends with the reason. It begins with one shard, and all is throttled when there is another."""
    (run / "manifests" / "score.json").remove_file()
    for name in (run / "scores").names()[1:]:
        (run / "scores" / name).remove_file()
    share, proxy.share = proxy.share, 0.0
    # Fewer attempts than by default, whose waits add up to minutes.
    driver = Driver("score.py", options, logs / "throttled.log", secret | {"AWS_MAX_ATTEMPTS": "2"}, ray_address)
    driver.wait_for(lambda: len((run / "scores").names()) > 1, "another scored shard")
    proxy.share = 1.0
    assert driver.finish() != 0
    assert "throttled" in driver.output.splitlines()[-1]
    proxy.share = share
    assert run.manifest("score") is None


def grep(secret: str, folders: list[Path]) -> list[str]:
    """Files that hold the secret."""
    found = subprocess.run(["grep", "-rlaF", secret, *map(str, folders)], capture_output=True, text=True, check=False)
    return found.stdout.split()
