"""The path of a GPU on fake CUDA tensors: devices and types never mix, and no pass waits for the GPU.

Kernels compute nothing there, so nothing is said about numbers, nor about the grouped products of experts in float32.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import PACKABLE, draw_examples

from davir_ray.config.align import PAIR_LOSSES
from davir_ray.models.kernel.likelihood import Pack

HERE = Path(__file__).parents[2] / "fake_cuda"
TORCH = Path(torch.__file__).parent
NUM_SCORED = sum(Pack.of(draw_examples()).num_scored)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.version.cuda is not None or sys.platform != "linux",
        reason="only a torch for CPUs, on Linux, takes fake GPUs; one for CUDA has its own functions of these names",
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every family did, by kind of work."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler, which the guard of fake CUDA tensors needs")
    guard = tmp_path_factory.mktemp("guard") / "guard.so"
    include = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    command = [compiler, "-shared", "-fPIC", "-O0", "-std=c++20", *include, str(HERE / "guard.cpp")]
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, "-o", str(guard), *libraries], check=True)
    done = subprocess.run(
        [sys.executable, str(HERE / "forwards.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": str(guard)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("work", ["score", "score_adapter"])
@pytest.mark.parametrize("family", PACKABLE)
def test_scoring_stays_on_the_gpu_and_never_waits_for_it(
    found: dict[str, dict[str, Any]], family: str, work: str
) -> None:
    passes = {"score": 1, "score_adapter": 2}[work]  # with an adapter that of the base, too
    assert found[work][family] == {"kinds": ["cuda float32"], "shapes": [[NUM_SCORED]] * passes}


@pytest.mark.parametrize("work", ["train", "train_adapter"])
@pytest.mark.parametrize("family", PACKABLE)
def test_a_step_forward_and_backward_stays_on_the_gpu_and_never_waits_for_it(
    found: dict[str, dict[str, Any]], family: str, work: str
) -> None:
    """Experts are trained by batched products, as the fake grouped ones refuse float32 (torch 2.13); with an adapter by
    grouped ones, in bfloat16.
    """
    assert found[work][family].get("kinds") == ["cuda float32"], found[work][family]
    loss, *gradients = found[work][family]["shapes"]
    assert loss == []
    assert len(gradients) > 10


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_the_loss_of_pairs_stays_on_the_gpu_and_never_waits_for_it(found: dict[str, dict[str, Any]], loss: str) -> None:
    assert found["train_pairs"][loss].get("kinds") == ["cuda float32", "cuda float64"], found["train_pairs"][loss]
