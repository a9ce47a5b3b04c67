"""jobs/status.py: what an output says of its run, read from another process, without Ray."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drivers import PACKAGE

from davir_ray.errors import OutputError
from davir_ray.run.lease import LEASE_FILE, Lease
from davir_ray.run.location import Location
from davir_ray.run.manifest import Manifest
from davir_ray.run.progress import Progress
from davir_ray.run.status import status


def prepared(run: Location) -> None:
    Manifest(
        stage="prepare", fingerprint={}, counts={"prepared": 1998, "left_out": 7, "rejected": 2}, files=[], seconds=21.0
    ).write(run)
    Progress(stage="score", unit="rows", done=256, total=1998, rejects=2).write(run)


def test_a_run_that_a_driver_holds_is_running(local: Location) -> None:
    prepared(local)
    with Lease(local):
        found = status(local.path)
    assert found.state == "running"
    assert found.silent_s is not None
    assert found.silent_s < 60
    lines = found.lines()
    assert lines[0] == local.path
    assert lines[1].split() == [
        "prepare",
        "complete",
        "21",
        "s",
        "1,998",
        "prepared,",
        "7",
        "left",
        "out,",
        "2",
        "rejected",
    ]
    assert lines[2].split()[:2] == ["score", "running"]
    assert "256 of 1,998 rows (13%)" in lines[2]
    assert lines[3].startswith("running: process ")
    assert len(lines) == 4


def test_a_comparison_shows_how_many_arms_are_measured(local: Location) -> None:
    Progress(stage="compare", unit="arms", done=20, total=54).write(local)
    with Lease(local):
        (line,) = status(local.path).lines()[1:-1]
    assert line.split()[:2] == ["compare", "running"]
    assert "20 of 54 arms" in line


def test_a_driver_that_is_silent_may_have_died(local: Location) -> None:
    prepared(local)
    with Lease(local):
        assert "may have died" not in status(local.path).lines()[-1]
        old = time.time() - 600
        os.utime(f"{local.path}/{LEASE_FILE}", (old, old))
        found = status(local.path)
    assert found.state == "silent"
    assert found.lines()[-1].endswith("last heartbeat 10 min ago: it may have died")


def test_a_run_without_a_driver_is_stopped_whatever_the_file_says(local: Location) -> None:
    prepared(local)
    assert status(local.path).state == "stopped"
    assert "the same command continues" in status(local.path).lines()[-1]


def test_a_lease_of_a_dead_process_is_no_driver(local: Location) -> None:
    prepared(local)
    code = (
        "import os, sys; from davir_ray.run.lease import Lease; from davir_ray.run.location import Location; "
        "Lease(Location.of(sys.argv[1])).__enter__(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, local.path], check=False, env={"PYTHONPATH": str(PACKAGE)})
    assert (local / LEASE_FILE).exists()
    assert status(local.path).state == "stopped"


def test_how_a_run_ended_is_shown(local: Location) -> None:
    prepared(local)
    Progress.end(local, "failed", "the disk is full")
    assert status(local.path).state == "failed"
    assert status(local.path).lines()[-1] == "failed: the disk is full"
    Progress.end(local, "complete")
    assert status(local.path).lines()[-1] == "complete"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no run"):
        status(str(tmp_path))


def test_the_job_prints_json_and_needs_neither_ray_nor_torch(local: Location) -> None:
    prepared(local)
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    assert not {'ray', 'torch'} & sys.modules.keys()"
    )
    script = str(PACKAGE / "jobs" / "status.py")
    command = [sys.executable, "-c", f"import sys; sys.argv = {[script, '--output', local.path, '--json']}\n{code}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(PACKAGE)})
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["state"] == "stopped"
    assert values["stages"]["prepare"] == {"prepared": 1998, "left_out": 7, "rejected": 2, "seconds": 21.0}
    assert values["progress"]["done"] == 256
