"""A complete and unchanged run is known without Ray and torch; whatever differs is left to the stages."""

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from davir_ray.complete import complete_run
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.rank import RankOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.selection import RankConfig, SelectConfig
from davir_ray.pipeline import rank_only, run_all
from davir_ray.run.folder import Run

ROWS = 24


@pytest.fixture(scope="module")
def config(
    data_folder: Path, base_folder: Path, reference_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """Settings whose inputs are files of their own, which a test may change."""
    folder = tmp_path_factory.mktemp("complete")
    shutil.copytree(base_folder, folder / "base")
    shutil.copytree(reference_folder, folder / "reference")
    (folder / "data").mkdir()
    with gzip.open(data_folder / "alpaca_9k.jsonl.gz", "rt") as rows:
        (folder / "data" / "rows.jsonl").write_text("".join(next(rows) for _ in range(ROWS)))
    (folder / "evaluation.jsonl").write_text('{"question": "This question of eight words is not there"}\n')
    return RunConfig(
        decontaminate=str(folder / "evaluation.jsonl"),
        output=str(folder / "run"),
        base=str(folder / "base"),
        reference=str(folder / "reference"),
        data=str(folder / "data"),
        max_bad_fraction=0.5,
        prepare=PrepareConfig(max_tokens=256),
        score=ScoreConfig(num_actors=1, precision="float32"),
        select=SelectConfig(top_k=5),
    )


@pytest.fixture(scope="module")
def run(config: RunConfig, ray_session: None) -> Path:
    """A complete run; a test that changes it restores it."""
    run_all(config)
    return Path(str(config.output))


def test_a_run_is_complete_while_nothing_has_changed(config: RunConfig, run: Path) -> None:
    assert str(complete_run(config)) == str(run)
    assert str(complete_run(replace(config, format="alpaca"))) == str(run), "the format that was found, given"


SETTINGS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "another output": lambda config: replace(config, output=f"{config.output}-2"),
    "a setting that the scores depend on": lambda config: replace(config, keep_token_nll="all"),
    "one that only config.yaml would say": lambda config: replace(config, score=replace(config.score, num_actors=2)),
    "another rule": lambda config: replace(config, select=SelectConfig(top_k=6)),
    "another order": lambda config: replace(config, rank=RankConfig(order="base_nll")),
    "no evaluation set": lambda config: replace(config, decontaminate=None),
    "no reference": lambda config: replace(config, reference=None),
    "a tracker, which gets the results": lambda config: replace(config, track="tensorboard"),
    "the code of a model, which may do anything": lambda config: replace(config, trust_remote_code=True),
    "a mistake, which the stages report": lambda config: replace(config, base=None),
    "a base that is not there": lambda config: replace(config, base="/nowhere/at/all"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_other_settings_are_left_to_the_stages(config: RunConfig, run: Path, what: str) -> None:
    assert complete_run(SETTINGS[what](config)) is None


def _appended(text: str) -> Callable[[bytes], bytes]:
    return lambda content: content + text.encode()


FILES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a row more": ("data/rows.jsonl", _appended('{"instruction": "Say no.", "input": "", "output": "No."}\n')),
    "another file of data": ("data/more.jsonl", _appended('{"instruction": "Say no.", "output": "No."}\n')),
    "another evaluation set": ("evaluation.jsonl", _appended('{"question": "Eight"}\n')),
    "the base's tokenizer": ("base/tokenizer_config.json", _appended("\n")),
    "a chat template beside the base": ("base/chat_template.jinja", _appended("{{ messages }}")),
    "the base's settings": ("base/config.json", _appended("\n")),
    "the base's weights": ("base/model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "the reference's weights": ("reference/model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "the reference's tokenizer": ("reference/tokenizer.json", _appended("\n")),
    "a note of how the reference was trained": ("reference/scoring_spec.json", _appended("{}")),
    "a manifest": ("run/manifests/select.json", lambda content: content.replace(b'"seconds": ', b'"seconds": 1')),
    "the record": ("run/manifests/complete.json", lambda content: content[:100]),
    "the end of the last driver": ("run/progress.json", lambda content: content.replace(b"complete", b"running")),
    "a driver at work": ("run/lease.json", _appended("{}")),
    "the page": ("run/report.html", _appended("changed")),
    "the settings of another command": ("run/config.yaml", _appended("\n")),
}


@pytest.mark.parametrize("what", FILES)
def test_other_files_are_left_to_the_stages(config: RunConfig, run: Path, what: str) -> None:
    name, change = FILES[what]
    file = run.parent / name
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(change(before or b""))
    assert before is None or file.read_bytes() != before
    try:
        assert complete_run(config) is None
    finally:
        file.unlink()
        if before is not None:
            file.write_bytes(before)
    assert complete_run(config) is not None


@pytest.mark.parametrize("version", ["NUMERICS_VERSION", "PREPARE_VERSION"])
def test_what_another_version_computed_is_left_to_the_stages(
    config: RunConfig, run: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"davir_ray.complete.{version}", 0)
    assert complete_run(config) is None


def test_other_libraries_are_left_to_the_stages(config: RunConfig, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0")
    assert complete_run(config) is None


def test_a_lost_shard_is_left_to_the_stages(config: RunConfig, run: Path) -> None:
    shard = next((run / "scores").iterdir())
    shard.rename(run / "lost")
    try:
        assert complete_run(config) is None
    finally:
        (run / "lost").rename(shard)


HEAVY = {
    "torch", "ray", "matplotlib", "scipy", "pandas", "transformers.modeling_utils", "transformers.models.auto",
    "davir_ray.pipeline",
}  # fmt: skip

JOB = """
import runpy, sys
sys.argv = sys.argv[1:]
status = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code
heavy = {heavy} & sys.modules.keys()
assert not heavy, heavy
sys.exit(status)
"""


def test_the_job_says_so_without_what_takes_seconds_to_import_and_changes_nothing(config: RunConfig, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            JOB.replace("{heavy}", repr(HEAVY)),
            "jobs/score.py",
            "--config",
            str(run / "config.yaml"),
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    stages = ("prepare", "score", "rank", "select", "report")
    assert said.stderr.splitlines() == [f"{stage}: complete, skipped" for stage in stages]
    assert said.stdout == f"selected: {run / 'selected'}\nreport:   {run / 'report.html'}\n"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_another_ranking_needs_no_torch_in_its_driver(
    config: RunConfig, run: Path, ray_address: str, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    job = JOB.replace("{heavy}", repr({"torch", "ray.train"}))
    said = subprocess.run(
        [sys.executable, "-c", job, "jobs/rank.py", "--output", str(tmp_path / "run"), "--select.top_k", "3"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "RAY_ADDRESS": ray_address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert "select: 3 of" in said.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the report shows no tokens" not in said.stderr
    assert page != (run / "report.html").read_text()


def test_the_report_is_made_again_where_something_differs_and_only_there(config: RunConfig, run: Path) -> None:
    """By jobs/rank.py: the same rule changes nothing, another changes the page, and the first changes it back."""
    made = (run / "report.html").stat().st_mtime_ns
    rank_only(RankOptions(output=str(run)))
    assert (run / "report.html").stat().st_mtime_ns == made
    rank_only(RankOptions.of({"output": str(run), "select.top_k": 6}, {"output": str(run), "select.top_k": 6}))
    assert (run / "report.html").stat().st_mtime_ns != made
    assert complete_run(config) is None
    run_all(config)
    assert Run.at(run).require("report").fingerprint["config"]["select"]["top_k"] == 5
    assert complete_run(config) is not None
