"""The two local nodes: a job submitted with the token runs on both, nobody else gets in, and nothing is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from deployment import CLUSTER, ROOT, check_ray_command

pytestmark = pytest.mark.slow

PATIENCE_S = 300
RAY = str(Path(sys.executable).parent / "ray")


class Nodes:
    """The running script, and all that it starts."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "nodes.log"
        kept = {
            key: text for key, text in os.environ.items() if not key.startswith("RAY_AUTH") and key != "RAY_ADDRESS"
        }
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(CLUSTER / "local_two_nodes.py")],
                env=kept,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def environment(self) -> dict[str, str]:
        """What the script tells to export, once it does."""
        deadline = time.monotonic() + PATIENCE_S
        while "Ctrl-C" not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.2)
        (exports,) = re.findall(r"export (RAY_.+)", self.output)
        return dict(word.split("=", 1) for word in exports.split())

    def processes(self) -> list[psutil.Process]:
        """All that it has started and that runs."""
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    if nodes.process.poll() is None:
        for process in [nodes.process, *nodes.processes()]:
            process.kill()
        nodes.process.wait()


def test_a_job_runs_on_both_and_nothing_stays(
    nodes: Nodes, base_folder: Path, reference_folder: Path, tmp_path: Path
) -> None:
    told = nodes.environment()
    address = told["RAY_API_SERVER_ADDRESS"]
    folder = Path(told["RAY_AUTH_TOKEN_PATH"]).parent
    assert Path(told["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o077 == 0

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=PATIENCE_S)
    assert refused.value.code == 401

    (command,) = re.findall(r"ray job submit .+", nodes.output)
    check_ray_command(command.split())
    (tmp_path / "data.jsonl").write_text('{"question": "What is 2 + 2?", "answer": "2 + 2 = 4"}\n' * 5)
    options = {"data": tmp_path / "data.jsonl", "format": "gsm8k", "base": base_folder, "reference": reference_folder}
    options |= {"output": tmp_path / "run", "select.top_k": 2}
    submit = command.partition(" -- ")[0].split()[1:]
    words = [*submit, "--", "python", "jobs/score.py", "--dry_run", "--output_is_shared"]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    submitted = subprocess.run(
        [RAY, *words], env={**os.environ, **told}, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    said = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, said
    assert "cluster: 3 actors to score" in said, "two nodes of two CPUs, one of the four left for reads"

    started = nodes.processes()
    assert {"raylet", "gcs_server"} <= {process.name() for process in started}
    listening = {address for process in started for address in listens_at(process)}
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}

    nodes.process.send_signal(signal.SIGTERM)
    assert nodes.process.wait(PATIENCE_S) == 0
    _, alive = psutil.wait_procs(started, timeout=PATIENCE_S)
    assert alive == []
    assert not folder.exists()


def listens_at(process: psutil.Process) -> list[str]:
    try:
        connections = process.net_connections("tcp")
    except psutil.Error:  # it has ended
        return []
    return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]
