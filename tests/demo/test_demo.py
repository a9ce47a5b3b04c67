"""The demo as a user runs it: the planted truth must come out against a random control, in files and on the page."""

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

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
    return printed[printed.index("class ") : printed.index(" seconds in all")].rpartition("\n")[0]


def column(folder: Path, name: str) -> list[Any]:
    return pq.read_table(folder, columns=[name])[name].to_pylist()


def planted_classes(output: Path) -> list[str]:
    rows = (output / "instructions.jsonl").read_text().splitlines()
    return [json.loads(row)["planted_class"] for row in rows]


def selected_classes(run: Path) -> Counter[str]:
    return Counter(json.loads(record)["planted_class"] for record in column(run / "selected", "record"))


@pytest.fixture(scope="module")
def control(finished: tuple[Path, str]) -> list[Counter[str]]:
    """The classes of a thousand random selections as large as the demo's."""
    classes, draw = planted_classes(finished[0]), np.random.default_rng(7)
    num_selected = selected_classes(finished[0] / "run").total()
    return [
        Counter(classes[row] for row in draw.choice(len(classes), num_selected, replace=False)) for _ in range(1000)
    ]


@pytest.mark.slow
def test_the_reference_that_has_seen_all_selects_learnable_rows_and_memorised_copies(
    finished: tuple[Path, str], control: list[Counter[str]]
) -> None:
    selected = selected_classes(finished[0] / "run")
    for name in ("learnable", "noise_duplicates"):
        assert selected[name] > 1.5 * max(drawn[name] for drawn in control), name
    for name in ("known", "noise"):
        assert selected[name] < min(drawn[name] for drawn in control), name


@pytest.mark.slow
def test_references_that_have_not_seen_the_rows_select_the_learnable_ones(
    finished: tuple[Path, str], control: list[Counter[str]]
) -> None:
    run = finished[0] / "folds"
    selected = selected_classes(run)
    assert selected["learnable"] > max(drawn["learnable"] for drawn in control)
    assert selected["learnable"] > 0.9 * selected.total()
    assert selected["noise_duplicates"] < 0.75 * np.mean([drawn["noise_duplicates"] for drawn in control])
    folds_of: dict[int, set[int]] = defaultdict(set)
    for text, fold in zip(column(run / "examples", "content_hash"), column(run / "examples", "fold"), strict=True):
        folds_of[text].add(fold)
    assert all(len(folds) == 1 for folds in folds_of.values()), "a copy is in another fold"


@pytest.mark.slow
def test_the_demo_prints_and_reports_what_each_way_selects(finished: tuple[Path, str]) -> None:
    output, printed = finished
    classes = planted_classes(output)
    for name in ("run", "folds"):
        facts = json.loads((output / name / "report.json").read_text())
        reported = {row["name"]: row for row in facts["planted"]["classes"]}
        selected = selected_classes(output / name)
        for planted in ("known", "learnable", "noise", "noise_duplicates"):
            (line,) = [line for line in printed.splitlines() if re.match(rf"{planted} +\d", line)]
            assert reported[planted]["share_of_selected"] == pytest.approx(selected[planted] / selected.total())
            assert f"{selected[planted] / selected.total():.1%}" in line.split()
            assert f"{reported[planted]['share_of_random']:.1%}" in line.split()
        warnings = [finding for finding in facts["findings"] if "--prepare.folds 2" in finding["text"]]
        assert len(warnings) == (name == "run")
        of_row = dict(
            zip(
                column(output / name / "examples", "source_row"), column(output / name / "scores", "davir"), strict=True
            )
        )
        learnable, copies = (
            np.array([of_row[row] for row, own in enumerate(classes) if own == planted])
            for planted in ("learnable", "noise_duplicates")
        )
        (line,) = [line for line in printed.splitlines() if line.startswith("AUROC")]
        assert f"{(learnable[:, None] > copies).mean():.2f}" == line.split()[-1 if name == "folds" else -2]
        assert str(output / name / "report.html") in printed
        assert "learnable" in (output / name / "report.html").read_text()


@pytest.mark.slow
def test_the_readme_shows_this_table(finished: tuple[Path, str]) -> None:
    """Its numbers are of one machine: the digits of shares and of the AUROC may differ."""

    def shape(text: str) -> list[str]:
        lines = text[text.index("class   ") :].splitlines()[:6]
        return [re.sub(r"\d+\.\d+", "#", " ".join(line.split())) for line in lines]

    assert shape((ROOT / "README.md").read_text()) == shape(finished[1])


@pytest.mark.slow
def test_running_the_demo_again_skips_every_stage(finished: tuple[Path, str], ray_address: str) -> None:
    output, printed = finished

    def scores() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns for name in ("run", "folds") for path in (output / name / "scores").iterdir()
        }

    before = scores()
    again = run_demo(output, RAY_ADDRESS=ray_address)
    assert tables_of(again) == tables_of(printed)
    assert scores() == before
