"""The benchmark of a start times commands from outside; how long they take decides nothing."""

import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from davir_ray.benchmarks import start
from davir_ray.benchmarks.start import StartBenchmark, seconds_of
from davir_ray.errors import ConfigError, ProgressError

WRITES_A_SHARD = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir()
(folder / "part-00000.parquet").touch()
while not (folder / "seen").exists():
    time.sleep(0.05)
(folder / "ended").touch()
"""


def test_a_command_counts_to_its_end_or_to_its_first_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands end when their shard was there at two pauses, so that it was looked for between them."""
    pauses = Counter[Path]()

    def pause(seconds: float) -> None:
        for shard in tmp_path.glob("*/*.parquet"):
            pauses[shard] += 1
            if pauses[shard] == 2:
                (shard.parent / "seen").touch()
        time.sleep(seconds)

    monkeypatch.setattr(start, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))
    started = time.time()
    first = seconds_of(["-c", WRITES_A_SHARD, str(tmp_path / "a")], tmp_path / "a")
    written, ended = ((tmp_path / "a" / name).stat().st_mtime - started for name in ("part-00000.parquet", "ended"))
    assert written - 0.1 <= first < ended, "it waited for the end"
    started = time.time()
    whole = seconds_of(["-c", WRITES_A_SHARD, str(tmp_path / "b")])
    assert whole >= (tmp_path / "b" / "ended").stat().st_mtime - started - 0.1


def test_a_command_that_fails_is_told_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(ProgressError, match=r"status 3; .*no such thing"):
        seconds_of(["-c", "import sys; print('no such thing'); sys.exit(3)"])
    with pytest.raises(ProgressError, match="status 0"):
        seconds_of(["-c", "pass"], tmp_path / "never")


def test_its_inputs_are_what_a_job_takes(tmp_path: Path) -> None:
    from davir_ray.config.run import RunConfig
    from davir_ray.inputs import check_inputs, with_formats

    start._make_inputs(tmp_path, 40)
    given = {"output": str(tmp_path / "run"), "base": str(tmp_path / "base"), "data": str(tmp_path / "rows.jsonl")}
    config, _ = with_formats(RunConfig(**given))
    check_inputs(config)
    assert config.format == "alpaca"
    assert all((start._JOBS / job).exists() for job in ("score.py", "rank.py"))


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"rows": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        StartBenchmark(**wrong)
