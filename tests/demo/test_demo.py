"""The demo as a user runs it: the planted truth must come out against a random control, in files and on the page."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished demo, and what it printed."""
    output = tmp_path_factory.mktemp("demo")
    return output, run_demo(output)


def run_demo(output: Path, **variables: str) -> str:
    command = [sys.executable, "jobs/demo.py", "--output", str(output)]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tables_of(printed: str) -> str:
    """What the demo itself found; Ray may put warnings of its own in front."""
    return printed[printed.index("class ") : printed.index("selected:")]


def planted_classes(output: Path) -> list[str]:
    rows = (output / "instructions.jsonl").read_text().splitlines()
    return [json.loads(row)["planted_class"] for row in rows]


@pytest.mark.slow
def test_the_learnable_class_dominates_the_selection_against_a_random_control(finished: tuple[Path, str]) -> None:
    output, _ = finished
    classes = planted_classes(output)
    chosen = pq.read_table(output / "run" / "selected", columns=["record"])["record"].to_pylist()
    selected = Counter(json.loads(record)["planted_class"] for record in chosen)
    draw = np.random.default_rng(7)
    control = [
        sum(classes[row] == "learnable" for row in draw.choice(len(classes), len(chosen), replace=False))
        for _ in range(1000)
    ]
    assert selected["learnable"] > max(control)
    assert selected["learnable"] > sum(count for name, count in selected.items() if name != "learnable")


@pytest.mark.slow
def test_the_demo_prints_and_reports_shares_correlations_and_places(finished: tuple[Path, str]) -> None:
    output, printed = finished
    facts = json.loads((output / "run" / "report.json").read_text())
    reported = {row["name"]: row for row in facts["planted"]["classes"]}
    for name in ("known", "learnable", "noise", "noise_duplicates"):
        assert f"{reported[name]['share_of_selected']:.1%}" in printed
        assert f"{reported[name]['share_of_random']:.1%}" in printed
    for word in ("rho_sum", "rho_mean", "davir", str(output / "run" / "selected"), str(output / "run" / "report.html")):
        assert word in printed
    assert "learnable" in (output / "run" / "report.html").read_text()


@pytest.mark.slow
def test_running_the_demo_again_skips_every_stage(finished: tuple[Path, str], ray_address: str) -> None:
    output, printed = finished
    scores = {path: path.stat().st_mtime_ns for path in (output / "run" / "scores").iterdir()}
    again = run_demo(output, RAY_ADDRESS=ray_address)
    assert tables_of(again) == tables_of(printed)
    assert scores == {path: path.stat().st_mtime_ns for path in (output / "run" / "scores").iterdir()}
