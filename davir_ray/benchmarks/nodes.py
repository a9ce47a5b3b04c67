"""The scoring stage's pool on many simulated nodes of one logical GPU each, with a model that only waits.

Nodes are lost and replaced while it works, some shards take three times as long, and a second cluster grows and shrinks
by itself. What was done, where and when is read from the committed files and the actors' notes; the driver reports only
its own CPU and memory, and how long the nodes took to leave.
"""

import json
import logging
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster

from davir_ray.benchmarks.processes import python_process
from davir_ray.config.checks import check
from davir_ray.config.scoring import ScoreConfig
from davir_ray.engine.connect import connected
from davir_ray.engine.pool import Stream
from davir_ray.engine.resources import num_nodes
from davir_ray.errors import ClusterError, IntegrityError
from davir_ray.run.files import in_folder, write_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest, library_versions

log = logging.getLogger(__name__)

_SCHEMA = pa.schema([("example_id", pa.int64()), ("status", pa.string())])

_STRAGGLERS, _SLOWER = 20, 3
"""One shard of so many takes so many times as long."""

_EXAMPLE_TOKENS = 4

_DRIVER = "import sys; from davir_ray.benchmarks.nodes import drive; drive(sys.argv[1])"

_OBJECT_STORE_BYTES = 80 * 2**20
_NODE_ARGS = {"include_log_monitor": False, "object_store_memory": _OBJECT_STORE_BYTES}

_EMPTY = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
"""What the configuration of a cluster must name, though simulated nodes have none of them."""

_WITHOUT_TOKEN = {"RAY_AUTH_MODE": "disabled"}
"""For `ray start`, which asks for a token where it finds one, and for its driver."""

_START_S = 300
"""Seconds that a cluster has to start."""


@dataclass(frozen=True, kw_only=True)
class NodesBenchmark:
    """Score shards with a model that waits, on simulated nodes that come and go.

    50 nodes take about 12 GB of memory on this machine. The clusters are local and are ended with the benchmark.
    """

    json: str | None = None
    """File for the result."""
    nodes: int = 50
    """Number of nodes of one logical GPU."""
    shards_per_node: int = 24
    """Number of shards, for each node."""
    seconds: float = 10.0
    """Seconds that the model waits for a shard."""
    lost: int = 12
    """Number of nodes that are lost, and replaced, one after another, from a quarter of the shards on."""
    lost_every_seconds: float = 5.0
    """Seconds between two losses."""
    autoscaled: int = 6
    """Number of worker nodes that the second cluster grows to. 0: there is none."""

    def __post_init__(self) -> None:
        least = {"nodes": 2, "shards_per_node": 4, "lost": 0, "autoscaled": 0}
        for name, minimum in least.items():
            check(getattr(self, name) >= minimum, name, getattr(self, name), f"at least {minimum}")
        check(self.lost < self.nodes, "lost", self.lost, f"fewer than the {self.nodes} nodes")


class Waiter:
    """Stands for the models of an actor: it waits for each shard, and notes where and when.

    What it returns is the same anywhere, as scores are: a worker may outlive its node by a shard that another has done.
    """

    numerics: dict[str, Any] = {}  # noqa: RUF012 - the protocol's attribute

    def __init__(self, notes: str, seconds: float) -> None:
        self._seconds = seconds
        self._node = ray.get_runtime_context().get_node_id()
        self._notes = Path(notes) / f"{uuid.uuid4().hex}.jsonl"

    def __call__(self, examples: pa.Table) -> pa.Table:
        """One row for each example, after some seconds."""
        number = examples["example_id"][0].as_py()
        note = {"shard": number, "node": self._node, "begun": time.time()}
        self._write(note)
        time.sleep(self._seconds * (_SLOWER if number % _STRAGGLERS == 0 else 1))
        self._write(note | {"ended": time.time()})
        return pa.table({"example_id": examples["example_id"], "status": ["ok"] * examples.num_rows}, schema=_SCHEMA)

    def _write(self, note: dict[str, Any]) -> None:
        with self._notes.open("a") as file:
            file.write(json.dumps(note) + "\n")


def run(settings: NodesBenchmark) -> dict[str, Any]:
    """Score on both clusters; returns the contents of the JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), settings)


def measure(folder: Path, settings: NodesBenchmark) -> dict[str, Any]:
    """The result of `run`; leaves the runs in the folder."""
    result: dict[str, Any] = {"settings": asdict(settings), "lost": _on_nodes_that_are_lost(folder / "lost", settings)}
    if settings.autoscaled:
        result["autoscaled"] = _on_nodes_that_come(folder / "autoscaled", settings)
    machine = {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    return {**result, "versions": library_versions(), "machine": {**machine, "date": time.strftime("%Y-%m-%d")}}


def _on_nodes_that_are_lost(folder: Path, settings: NodesBenchmark) -> dict[str, Any]:
    num_shards = settings.nodes * settings.shards_per_node
    _write_examples(folder, num_shards)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **_NODE_ARGS})
    try:
        nodes = [cluster.add_node(wait=False, num_cpus=1, num_gpus=1, **_NODE_ARGS) for _ in range(settings.nodes)]
        cluster.wait_for_nodes(timeout=_START_S)
        with _driver(folder, settings, {"num_gpus": 1.0}, {"RAY_ADDRESS": cluster.address}) as driver:
            _wait_for_shards(driver, folder, num_shards / 4)
            losses = []
            for node in nodes[: settings.lost]:
                node.kill_raylet()
                losses.append(time.time())
                cluster.add_node(wait=False, num_cpus=1, num_gpus=1, **_NODE_ARGS)
                time.sleep(settings.lost_every_seconds)
            driver.wait()
        return {"nodes_lost": len(losses), **_found(driver, folder, num_shards, settings.nodes)}
    finally:
        cluster.shutdown()


def _on_nodes_that_come(folder: Path, settings: NodesBenchmark) -> dict[str, Any]:
    num_shards = settings.autoscaled * settings.shards_per_node
    _write_examples(folder, num_shards)
    with _autoscaled_cluster(folder, settings.autoscaled) as address:
        options = {"num_gpus": 1.0, "autoscale": [1, settings.autoscaled]}
        with _driver(folder, settings, options, {"RAY_ADDRESS": address, **_WITHOUT_TOKEN}) as driver:
            driver.wait()
        return _found(driver, folder, num_shards, settings.autoscaled)


@contextmanager
def _autoscaled_cluster(folder: Path, num_nodes: int) -> Iterator[str]:
    """A Ray whose autoscaler adds and removes simulated nodes; its processes are ended after the block."""
    port = _free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    gpu = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": _OBJECT_STORE_BYTES}, "max_workers": num_nodes}
    config = {
        "cluster_name": "simulated",
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "gpu": {"node_config": {}, "min_workers": 0, **gpu},
        },
        "max_workers": num_nodes,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.2,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in _EMPTY},
    }
    (folder / "cluster.yaml").write_text(json.dumps(config))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [f"--autoscaling-config={folder / 'cluster.yaml'}", "--include-dashboard=false"]
    command.append(f"--object-store-memory={_OBJECT_STORE_BYTES}")
    environment = {**os.environ, **_WITHOUT_TOKEN, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    with (folder / "cluster.log").open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for_ray(process, address, folder / "cluster.log")
        yield address
    finally:
        try:
            for started in psutil.Process(process.pid).children(recursive=True):
                started.kill()
        except psutil.NoSuchProcess as error:
            log.debug("it has ended by itself: %s", error)
        process.kill()
        process.wait()
        reset_ray_address()  # or every later ray.init() on this machine would look for this Ray


def _wait_for_ray(process: "subprocess.Popen[bytes]", address: str, output: Path) -> None:
    deadline = time.monotonic() + _START_S
    while "Ray runtime started" not in output.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            text = output.read_text(errors="replace")[-1000:]
            raise ClusterError(f"no Ray was started at {address}; the end of its output: {text}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _write_examples(folder: Path, num_shards: int) -> None:
    """A run that looks prepared: shards of one example."""
    run, files = Run.at(folder / "prepared"), []
    (folder / "notes").mkdir(parents=True)
    for number in range(num_shards):
        table = pa.table({"example_id": pa.array([number]), "input_ids": [[1] * _EXAMPLE_TOKENS]})
        files.append(write_parquet(run / "examples" / f"{number:05d}.parquet", table))
    counts = {"prepared": num_shards, "rejected": 0}
    Manifest(stage="prepare", fingerprint={}, counts=counts, files=in_folder("examples", files)).write(run.folder)


@contextmanager
def _driver(
    folder: Path, settings: NodesBenchmark, options: dict[str, Any], variables: dict[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that scores the shards, with more variables in its environment; it has ended after the block."""
    given = {"folder": str(folder), "seconds": settings.seconds, "options": options}
    with python_process(_DRIVER, given, folder / "driver.log", variables) as process:
        yield process


def drive(given: str) -> None:
    """Score the shards as the stage does, in a process of its own."""
    settings = json.loads(given)
    folder, seconds = Path(settings["folder"]), settings["seconds"]
    examples = Run.at(folder / "prepared")
    stream = Stream(
        stage="score",
        run=Run.at(folder / "run"),
        folder="scores",
        schema=_SCHEMA,
        fingerprint={},
        examples=examples,
        shards=examples.require("prepare").files_in("examples"),
        columns=["example_id", "input_ids"],
        ok_count="scored",
        new_detail="shards_scored_by_this_driver",
        count_tokens=lambda table: table.num_rows * _EXAMPLE_TOKENS,
    )
    notes = str(folder / "notes")
    with connected():
        stream.fill(lambda: Waiter(notes, seconds), ScoreConfig(**settings["options"]))
        ended = {"cpu_seconds": time.process_time(), "resident_mib": psutil.Process().memory_info().rss / 2**20}
        if "autoscale" in settings["options"]:
            ended["seconds_until_the_nodes_had_left"] = _seconds_until_alone()
    (folder / "ended.json").write_text(json.dumps(ended))


def _seconds_until_alone() -> float:
    """Wait until the autoscaler has removed all nodes but the head."""
    started = time.monotonic()
    while num_nodes() > 1:
        if time.monotonic() - started > _START_S:
            raise ClusterError(f"{num_nodes() - 1} nodes that nobody needs are still there after {_START_S} s")
        time.sleep(1)
    return time.monotonic() - started


def _wait_for_shards(driver: "subprocess.Popen[bytes]", folder: Path, number: float) -> None:
    while len(list((folder / "run" / "scores").glob("*.parquet"))) < number:
        if driver.poll() is not None:
            _check_ended(driver, folder)
        time.sleep(0.5)


def _check_ended(driver: "subprocess.Popen[bytes]", folder: Path) -> None:
    if driver.returncode != 0:
        text = (folder / "driver.log").read_text(errors="replace")[-1000:]
        raise ClusterError(f"the driver ended with status {driver.returncode}; the end of its output: {text}")


def _found(driver: "subprocess.Popen[bytes]", folder: Path, num_shards: int, num_gpus: int) -> dict[str, Any]:
    """What the files say: nothing lost or doubled, and how busy the GPUs were in the middle of the run."""
    _check_ended(driver, folder)
    files = sorted((folder / "run" / "scores").glob("*.parquet"))
    ids = [number for file in files for number in pq.read_table(file)["example_id"].to_pylist()]
    if sorted(ids) != list(range(num_shards)):
        raise IntegrityError(f"{len(set(ids))} shards of {num_shards} were committed, {len(ids)} rows in all")
    notes = [json.loads(line) for note in (folder / "notes").iterdir() for line in note.read_text().splitlines()]
    begun, ended = ([note for note in notes if ("ended" in note) == has] for has in (False, True))
    rows = list({note["shard"]: note for note in ended}.values())
    start, end = min(row["begun"] for row in rows), max(row["ended"] for row in rows)
    window = (start + (end - start) / 4, end - (end - start) / 4)
    busy = sum(max(0.0, min(row["ended"], window[1]) - max(row["begun"], window[0])) for row in rows)
    times = Counter(note["shard"] for note in begun)
    return {
        "shards": len(files),
        "shards_begun_twice": sum(number > 1 for number in times.values()),
        "nodes_used": len({note["node"] for note in begun}),
        "most_at_once_on_a_node": max(_most_at_once(rows, node) for node in {row["node"] for row in rows}),
        "busy_share": busy / (num_gpus * (window[1] - window[0])),
        "seconds": end - start,
        "driver": json.loads((folder / "ended.json").read_text()),
    }


def _most_at_once(rows: list[dict[str, Any]], node: str) -> int:
    """The largest number of shards that a node worked on at the same time."""
    edges = sorted(edge for row in rows if row["node"] == node for edge in ((row["begun"], 1), (row["ended"], -1)))
    most = now = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    return most
