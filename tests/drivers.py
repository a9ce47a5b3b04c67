"""Jobs as processes of their own, to be watched, killed and started again."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow as pa

import davir_ray
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run

PACKAGE = Path(davir_ray.__file__).parent.parent
DATA_FOLDERS = ("examples", "rejects", "scores", "ranked", "selected")


class Driver:
    """One run of a job; its output goes to a file.

    It starts a Ray of its own, or uses the running one at `address`, where it gives its workers `environment` as a
    submitted job does.
    """

    def __init__(
        self,
        job: str,
        options: Mapping[str, Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
        address: str | None = None,
    ) -> None:
        command = [sys.executable, str(PACKAGE / "jobs" / job)]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        if address:
            kept["RAY_ADDRESS"] = address
            # There Ray Data keeps its share of the CPUs for a driver that was killed, 180 s long if nothing is said.
            kept["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "15"
            if environment:
                runtime = {"runtime_env": {"env_vars": dict(environment)}}
                kept["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(runtime)
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env={**kept, "PYTHONPATH": str(PACKAGE), **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 400) -> None:
        """Return when the condition holds; it must while the job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.output}"
            time.sleep(0.02)

    def actors(self) -> set[int]:
        """The process ids of scoring actors that it has shown so far."""
        return {int(pid) for pid in re.findall(r"ShardWorker\S+ pid=(\d+)", self.output)}

    def wait_for_actors(self) -> set[int]:
        """Wait for the lines of an actor: Ray brings them later than the actor's files."""
        self.wait_for(lambda: bool(self.actors()), "a line of an actor")
        return self.actors()

    def kill(self) -> None:
        """As a machine that is taken away does."""
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """With the Ray that it started and all its workers, as a power cut does."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(processes, timeout=300)
        assert not alive

    def finish(self, seconds: float = 900) -> int:
        """Wait for the end; returns the exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job does not end:\n{self.output}") from None


def checkpoint_is_known(run: Path) -> Callable[[], bool]:
    """Whether a killed training would go on by now: Ray Train deletes older checkpoints than one it knows."""
    seen = set[Path]()

    def is_known() -> bool:
        seen.update(run.glob("checkpoints/*/checkpoint_*/training_state.sha256"))
        return not all(path.exists() for path in seen)

    return is_known


def content_of(run: Run) -> dict[str, pd.DataFrame]:
    """Every data folder of a run as a table, the rows in the order of its files."""
    tables = {}
    for folder in DATA_FOLDERS:
        files = [read_parquet(run / folder / name) for name in (run / folder).names(".parquet")]
        if files:
            tables[folder] = pa.concat_tables(files).to_pandas()
    return tables


def assert_same_content(run: Run, other: Run) -> None:
    """Every column of every data folder is equal, to the bit."""
    left, right = content_of(run), content_of(other)
    assert left.keys() == right.keys()
    for folder, table in left.items():
        pd.testing.assert_frame_equal(table, right[folder], check_exact=True)
