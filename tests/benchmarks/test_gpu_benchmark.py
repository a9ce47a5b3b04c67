"""The benchmark of a GPU, tried on a CPU: it starts without Ray and most other packages, and tells what it finds."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from davir_ray.benchmarks.gpu import exactness, speed
from davir_ray.benchmarks.gpu.run import SECTIONS, main
from davir_ray.benchmarks.gpu.shapes import SHAPES, draw, make
from davir_ray.benchmarks.gpu.trial import Trial
from davir_ray.models.kernel.likelihood import Likelihood

ROOT = Path(__file__).parents[2]
ABSENT = (
    "ray", "jsonargparse", "datasets", "s3fs", "aiobotocore", "botocore", "boto3", "scipy", "psutil", "matplotlib",
    "pandas", "accelerate", "peft",
)  # fmt: skip
"""Packages that a machine with torch and transformers need not have."""


@pytest.fixture
def without_packages(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that cannot import ABSENT."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Hiding(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        return None if name.partition('.')[0] in {ABSENT} else super().find_spec(name, path, target)\n"
        "sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


@pytest.mark.slow
def test_it_starts_without_ray_and_most_other_packages(without_packages: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "jobs/benchmark.py", "gpu", "--smoke", "--json", str(tmp_path / "found.json")]
    command += ["--sections", "attention", "families", "scorer", "adapter"]
    done = subprocess.run(command, cwd=ROOT, env=without_packages, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text())}
    assert found["attention"]["verdict"] == "ok"
    assert [row["verdict"] for name, row in found.items() if name.startswith("family")] == ["ok"] * 9
    assert "| attention | ok |" in done.stdout
    assert found["scorer float32"]["verdict"] == "ok"
    assert found["adapter"]["found"] == "peft is not installed"


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in SECTIONS if name not in ("attention", "families", "scoring")]
    assert main(["--smoke", "--json", str(tmp_path / "found.json"), "--sections", *names]) == 0
    found = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text())}
    assert all(
        row["verdict"] == "ok" for name, row in found.items() if name.startswith(("scorer", "adapter", "gradient"))
    )
    assert found["training 1B, all weights"]["values"]["seconds_of_a_step"] > 0
    assert "needs a GPU" in capsys.readouterr().out


def test_what_is_not_exact_fails_and_the_others_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    attend = exactness.packed_attention

    def wrong(*given: Any, **options: Any) -> tuple[torch.Tensor, None]:
        return attend(*given, **options)[0] * 1.1, None

    monkeypatch.setattr(exactness, "packed_attention", wrong)
    monkeypatch.setitem(SECTIONS, "syncs", lambda trial: 1 / 0)
    assert main(["--smoke", "--json", str(tmp_path / "found.json"), "--sections", "attention", "syncs", "memory"]) == 1
    found = {row["name"]: row for row in json.loads((tmp_path / "found.json").read_text())}
    assert [found[name]["verdict"] for name in ("attention", "syncs", "memory")] == ["FAIL", "FAIL", ""]
    assert "ZeroDivisionError" in found["syncs"]["found"]


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_compiled_layers_are_measured_unless_they_are_refused(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """With a compiler that writes no code, and then one that multiplies by a factor."""

    def backend(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Any:
        return lambda *inputs: [
            factor * each if isinstance(each, torch.Tensor) and each.is_floating_point() else each
            for each in graph.forward(*inputs)
        ]

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: compile_module(layer, **how, backend=backend))
    trial = Trial(device=torch.device("cpu"), smoke=True, limit_s=9)
    torch._dynamo.reset()
    likelihood = Likelihood(make(SHAPES["Llama-3.2-1B"], torch.float32, trial.device, tiny=True))
    score = partial(exactness.budgeted, likelihood, draw((5, 9), 500), 32)
    speed._compiled_layers(trial, "Llama", likelihood, 1.0, score)
    found = {row["name"]: row for row in trial.results}
    if factor == 1.0:
        assert found["variant Llama: compiling"]["values"]["seconds"] > 0
        assert found["variant Llama: compiled layers"]["values"]["ratio"] > 0
    else:
        assert "refused: score.compile is true" in found["variant Llama: compiled layers"]["found"]


def test_when_the_time_is_over_nothing_more_is_begun(tmp_path: Path) -> None:
    main(["--smoke", "--limit_s", "0", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["found"] for row in found[1:]] == ["left out: the time is over"] * len(SECTIONS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert main([]) == 2
    assert Trial(device=torch.device("cpu"), smoke=True, limit_s=9).half is torch.float32
