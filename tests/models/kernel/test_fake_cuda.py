"""The path of a GPU on fake CUDA tensors: devices and types never mix, and no pass waits for the GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS, PACKABLE, draw_examples

from davir_ray.models.kernel.likelihood import Pack

HERE = Path(__file__).parents[2] / "fake_cuda"
TORCH = Path(torch.__file__).parent
NUM_SCORED = sum(Pack.of(draw_examples()).num_scored)
WORK = ("score", "train")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every family did, by kind of work."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler, which the guard of fake CUDA tensors needs")
    guard = tmp_path_factory.mktemp("guard") / "guard.so"
    include = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    command = [compiler, "-shared", "-fPIC", "-O0", "-std=c++20", *include, str(HERE / "guard.cpp")]
    subprocess.run([*command, "-o", str(guard), f"-L{TORCH / 'lib'}", "-lc10"], check=True)
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(HERE / "forwards.py"), str(guard)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("family", PACKABLE)
def test_a_pass_stays_on_the_gpu_and_never_waits_for_it(
    found: dict[str, dict[str, Any]], family: str, work: str
) -> None:
    if work == "train" and family in EXPERTS:
        pytest.skip("the fake product of experts takes no float32, which that of a GPU does (torch 2.13)")
    assert found[work][family] == {"device": "cuda", "dtype": "torch.float32", "rows": NUM_SCORED}
