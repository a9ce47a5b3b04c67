"""Jobs as users run them: submitted to a cluster that wants a token, stopped, submitted again, watched from outside."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from changed_workers import Gate
from drivers import PACKAGE
from object_store.conftest import make_bucket
from object_store.stores import Store

from davir_ray.run.location import Location

pytestmark = pytest.mark.slow

NUM_ROWS = 400
SHARD_ROWS = 10
NUM_SHARDS = NUM_ROWS // SHARD_ROWS


@dataclass(frozen=True)
class Head:
    """A cluster of one node, and what a user needs to reach it."""

    dashboard: str
    metrics: str
    environment: dict[str, str]

    def ray(self, *words: str, seconds: float = 400) -> subprocess.CompletedProcess[str]:
        """`ray …` with the token."""
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        environment = {**self.environment, "RAY_API_SERVER_ADDRESS": self.dashboard}
        return subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
            check=False, cwd=PACKAGE,
        )  # fmt: skip

    def submit(self, name: str, *words: str, wait: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python …`, as the README has it."""
        options = ["--submission-id", name, "--working-dir", "."] + ([] if wait else ["--no-wait"])
        options += ["--runtime-env-json", json.dumps({"env_vars": variables})] if variables else []
        return self.ray("job", "submit", *options, "--", "python", *words)

    def state(self, name: str) -> str:
        """What `ray job status` says."""
        return self.ray("job", "status", name).stdout


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` with a token, as a process that ends with the tests."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    gcs, dashboard, metrics, agent = free_ports(4)
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # Short, for Ray's socket paths have a limit; its last writers end a moment after their parent.
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as temporary:
        environment = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": temporary}
        ports = {"port": gcs, "dashboard-port": dashboard, "metrics-export-port": metrics}
        ports |= {"dashboard-agent-listen-port": agent}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "3"]
        command += [word for name, port in ports.items() for word in (f"--{name}", str(port))]
        command += ["--dashboard-host", "127.0.0.1", "--temp-dir", temporary, "--disable-usage-stats"]
        log = Path(temporary, "head.log")
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            found = Head(f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", environment)
            wait_until_ready(found, process, log)
            yield found
        finally:
            # At once: asked to end, `ray start` waits half a minute for what it started.
            for started in [process_of_head := psutil.Process(process.pid), *process_of_head.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    started.kill()
            process.wait()


def wait_until_ready(head: Head, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until it takes jobs: the agent that starts them comes up last."""
    deadline = time.monotonic() + 400
    while True:
        ended = head.ray("job", "submit", "--", "true")
        if ended.returncode == 0:
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"{log.read_text()}\n{ended.stdout}"
        time.sleep(1)


@pytest.fixture(scope="module")
def data(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl.gz"
    shutil.copy(data_folder / "gsm8k_train.jsonl.gz", file)
    return file


@pytest.fixture(scope="module")
def settings(data: Path, base_folder: Path, reference_folder: Path) -> dict[str, Any]:
    return {
        "data": str(data), "format": "gsm8k", "limit": NUM_ROWS, "base": str(base_folder),
        "reference": str(reference_folder), "prepare": {"shard_rows": SHARD_ROWS}, "max_bad_fraction": 0.5,
        "score": {"num_actors": 1}, "select": {"top_k": 24},
    }  # fmt: skip


def test_a_job_with_everything_in_a_store_that_is_stopped_goes_on_when_it_is_submitted_again(
    head: Head, moto_store: Store, settings: dict[str, Any], tmp_path: Path
) -> None:
    bucket = f"s3://{make_bucket(moto_store)}"
    place = Location(moto_store.client(), bucket.removeprefix("s3://"))
    (place / "run.yaml").write_text(json.dumps({**settings, "output": f"{bucket}/run"}))
    words, run = ("jobs/score.py", "--config", f"{bucket}/run.yaml"), place / "run"
    gate = Gate(tmp_path / "gate", num_shards=3)
    held = moto_store.environment | gate.environment()
    assert head.submit("first", *words, wait=False, **held).returncode == 0
    deadline = time.monotonic() + 400
    while len((run / "scores").names()) < gate.num_shards:
        assert time.monotonic() < deadline, head.ray("job", "logs", "first").stdout
        time.sleep(0.05)
    assert head.ray("job", "stop", "first").returncode == 0
    assert "Job 'first' was stopped" in head.state("first")
    gate.open()

    ended = head.submit("again", *words, **moto_store.environment)
    assert ended.returncode == 0, ended.stdout
    assert f"{NUM_SHARDS - gate.num_shards} shards to do, {gate.num_shards} already done" in ended.stdout
    assert "Job 'again' succeeded" in head.state("again")
    assert f"selected: {bucket}/run/selected" in ended.stdout
    assert f"score: {NUM_ROWS} of {NUM_ROWS} rows (100%)" in ended.stdout
    assert {"prepare.json", "score.json", "rank.json", "select.json", "report.json"} <= set((run / "manifests").names())
    assert len((run / "scores").names()) == NUM_SHARDS

    status = subprocess.run(
        [sys.executable, str(PACKAGE / "jobs" / "status.py"), "--output", f"{bucket}/run", "--json"],
        env={**os.environ, **moto_store.environment, "PYTHONPATH": str(PACKAGE)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(status.stdout)["state"] == "complete"

    with urllib.request.urlopen(head.metrics) as answer:
        counters = [line for line in answer.read().decode().splitlines() if "davir_ray_rows_total{" in line]
    new_rows = NUM_ROWS - gate.num_shards * SHARD_ROWS
    assert any('stage="score"' in line and line.endswith(f" {new_rows}.0") for line in counters), counters


def test_a_mistake_is_a_failed_job_that_says_why(head: Head, settings: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({**settings, "output": str(tmp_path / "run"), "select": {"top_k": NUM_ROWS + 1}}))
    ended = head.submit("mistake", "jobs/score.py", "--config", str(config))
    assert ended.returncode == 1
    told = head.state("mistake")
    assert "Job 'mistake' failed" in told
    assert f"score.py: select.top_k is {NUM_ROWS + 1}, but only {NUM_ROWS} rows are prepared" in told
    logs = head.ray("job", "logs", "mistake").stdout.splitlines()
    assert [line for line in logs if line.strip()][-1].startswith("score.py: select.top_k is")


def test_without_the_token_nothing_is_submitted(head: Head) -> None:
    stranger = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    stranger |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 32}
    ended = Head(head.dashboard, head.metrics, stranger).ray("job", "submit", "--", "true")
    assert ended.returncode != 0
    assert "submitted successfully" not in ended.stdout


def test_neither_runs_nor_the_history_are_uploaded(head: Head, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(PACKAGE / "jobs", copy / "jobs")
    shutil.copy(PACKAGE / ".rayignore", copy)
    for folder in ("runs", "davir_demo", ".git", ".venv"):
        (copy / folder).mkdir()
        (copy / folder / "large").write_bytes(b"0")
    listing = "import os; print('uploaded', sorted(os.listdir('.')))"
    ended = head.ray("job", "submit", "--working-dir", str(copy), "--", "python", "-c", listing)
    assert "uploaded ['.rayignore', 'jobs']" in ended.stdout or "uploaded ['jobs']" in ended.stdout, ended.stdout
