"""Which plan a fine-tune gets: the first that fits, in the order of what it costs."""

import logging
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from davir_ray.config.training import FinetuneConfig
from davir_ray.engine import ray_train
from davir_ray.engine.resources import Gpu, smallest_gpu
from davir_ray.errors import ModelError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.training.memory import TrainingMemory
from davir_ray.run.location import Location
from davir_ray.stages import finetune, training_plan
from davir_ray.stages.training_plan import choose, plan_training, share_plan

GPUS = FinetuneConfig(num_workers=8, use_gpu=True)


class Model:
    """A stand-in that takes 160 bytes of weights, gradients and moments, and 40 or 10 of activations."""

    def __init__(self, problem: str = "") -> None:
        self.problem = problem
        self.tried: list[tuple[str, bool]] = []

    def state(self, *, strategy: str, num_workers: int) -> TrainingMemory:
        if strategy == self.problem:
            raise ModelError(f"{strategy} is not for it")
        share = num_workers if strategy == "fsdp" else 1
        gathered = 4 if strategy == "fsdp" else 0
        return TrainingMemory(
            weights=40 // share, gradients=40 // share, moments=80 // share, gathered=gathered, activations=0
        )

    def memory(self, *, strategy: str, num_workers: int, recompute: bool) -> TrainingMemory:
        self.tried.append((strategy, recompute))
        if self.problem == "activations":
            raise ModelError("its passes cannot be tried")
        state = self.state(strategy=strategy, num_workers=num_workers)
        return replace(state, activations=10 if recompute else 40)


@pytest.mark.parametrize(
    ("given", "capacity", "strategy", "recompute", "total"),
    [
        ({}, 223, "ddp", False, 200),  # nine tenths of it are used
        ({}, 222, "ddp", True, 170),
        ({}, 188, "fsdp", False, 64),
        ({}, 71, "fsdp", True, 34),
        ({}, 20, "fsdp", True, 34),  # the workers halve their packs
        ({"num_workers": 1}, 188, "ddp", True, 170),  # nothing to share with
        ({"strategy": "fsdp"}, 1000, "fsdp", False, 64),
        ({"strategy": "ddp"}, 100, "ddp", True, 170),
        ({"gradient_checkpointing": False}, 222, "fsdp", False, 64),
        ({"gradient_checkpointing": True}, 1000, "ddp", True, 170),
        ({}, None, "ddp", True, 170),
    ],
)
def test_the_first_plan_that_fits_is_taken(
    given: dict[str, Any], capacity: int | None, strategy: str, recompute: bool, total: int
) -> None:
    plan = choose(Model(), replace(GPUS, **given), capacity)  # type: ignore[arg-type]
    assert (plan.config.strategy, plan.config.gradient_checkpointing) == (strategy, recompute)
    assert plan.memory is not None
    assert plan.memory.total == total


def test_passes_are_not_tried_where_the_weights_alone_do_not_fit() -> None:
    model = Model()
    choose(model, GPUS, 100)  # type: ignore[arg-type]
    assert model.tried == [("fsdp", False)]


@pytest.mark.parametrize(
    ("problem", "capacity", "strategy"),
    [("ddp", 300, "ddp"), ("fsdp", 100, "ddp"), ("activations", 300, "ddp"), ("activations", 100, "fsdp")],
)
def test_what_cannot_be_estimated_is_recomputed_and_said(
    problem: str, capacity: int, strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = choose(Model(problem), GPUS, capacity)  # type: ignore[arg-type]
    assert (plan.config.strategy, plan.config.gradient_checkpointing, plan.memory) == (strategy, True, None)
    assert "not known" in str(plan)
    assert "is not for it" in caplog.text or "cannot be tried" in caplog.text


def test_too_little_memory_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        choose(Model(), GPUS, 20_000_000).warn_if_too_large()  # type: ignore[arg-type]
        assert not caplog.text
        choose(Model(), GPUS, 20).warn_if_too_large()  # type: ignore[arg-type]
    assert "needs about 0.034 kB on each GPU, and the smallest has 0.02 kB; packs are halved" in caplog.text


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0}, "NodeID": "n"}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(ray, "cluster_resources", lambda: node["Resources"])


def test_on_gpus_the_plan_follows_their_memory(
    eight_gpus: None, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Checkpoint.find(str(base_folder))
    config = FinetuneConfig(tokens_per_pack=512)
    monkeypatch.setattr(training_plan, "smallest_gpu", lambda: Gpu(10**12, True))
    roomy = plan_training(base, config)
    assert (roomy.config.strategy, roomy.config.gradient_checkpointing) == ("ddp", False)
    assert (roomy.config.num_workers, roomy.config.use_gpu) == (8, True)
    assert roomy.memory is not None
    monkeypatch.setattr(training_plan, "smallest_gpu", lambda: Gpu(roomy.memory.state, True))
    tight = plan_training(base, config)
    assert (tight.config.strategy, tight.config.num_workers) == ("fsdp", 8)
    assert tight.memory is not None
    assert tight.memory.total < roomy.memory.total
    assert f"of {training_plan.format_bytes(roomy.memory.state)} on each (weights " in str(tight)


def test_a_gpu_without_bfloat16_is_planned_in_float32(
    eight_gpus: None, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config = Checkpoint.find(str(base_folder)), FinetuneConfig(tokens_per_pack=512, lora_rank=4)
    plans = []
    for has_bfloat16 in (True, False):
        monkeypatch.setattr(training_plan, "smallest_gpu", partial(Gpu, 10**12, has_bfloat16))
        plans.append(plan_training(base, config).memory)
    half, full = plans
    assert half is not None
    assert full is not None
    assert full.weights > 1.8 * half.weights
    assert full.activations > half.activations


def test_a_node_whose_torch_sees_no_gpu_says_so(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On the real node, which claims to have one."""
    nodes = [node | {"Resources": node["Resources"] | {"GPU": 1.0}} for node in ray.nodes()]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert smallest_gpu() is None
    assert "torch sees none" in caplog.text


def test_a_training_keeps_the_strategy_that_it_began_with(
    eight_gpus: None, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = SimpleNamespace(base=Checkpoint.find(str(base_folder)), config=FinetuneConfig(tokens_per_pack=64))

    def planned(num_bytes: int, given: str | None = None) -> str | None:
        monkeypatch.setattr(training_plan, "smallest_gpu", partial(Gpu, num_bytes, True))
        training.config = replace(training.config, strategy=given)
        return finetune.planned(training, Location.of(tmp_path), "name").strategy  # type: ignore[arg-type]

    assert planned(10**12) == "ddp"
    assert planned(10**6) == "fsdp"  # nothing has begun
    (tmp_path / "name").mkdir()  # Ray Train's
    assert planned(10**12) == "fsdp"
    assert planned(10**6, given="ddp") == "ddp"
    assert (tmp_path / "name.strategy").read_text() == "ddp"


@pytest.mark.parametrize(
    ("num_gpus", "wanted", "num_trainings", "num_bytes", "expected"),
    [
        (8, None, 2, 10**12, (4, 2)),
        (8, None, 3, 10**12, (2, 3)),
        (1, None, 2, 10**12, (1, 1)),
        (8, 8, 2, 10**12, (8, 1)),
        (2, None, 4, 10**12, (1, 2)),
        (8, None, 8, 10**12, (1, 8)),
        (8, None, 8, 10**6, (8, 1)),  # one GPU is too small, and so are two and four
    ],
)
def test_trainings_share_the_gpus_and_get_more_where_they_need_them(
    num_gpus: int,
    wanted: int | None,
    num_trainings: int,
    num_bytes: int,
    expected: tuple[int, int],
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": float(num_gpus)}}
    monkeypatch.setattr(ray_train.ray, "nodes", lambda: [node])
    monkeypatch.setattr(ray_train, "has_gpu", lambda: True)
    monkeypatch.setattr(training_plan, "smallest_gpu", partial(Gpu, num_bytes, True))
    base = Checkpoint.find(str(base_folder))
    config, at_once = share_plan(base, FinetuneConfig(num_workers=wanted, tokens_per_pack=64), num_trainings)
    assert (config.num_workers, at_once) == expected
    assert config.use_gpu


def test_on_cpus_one_is_left_for_what_starts_the_trainings(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 9.0}}])
    base = Checkpoint.find(str(base_folder))
    config, at_once = share_plan(base, FinetuneConfig(num_cpus=2, use_gpu=False), 10)
    assert (config.num_workers, at_once) == (1, 4)


def test_where_nothing_is_open_nothing_is_asked(
    eight_gpus: None, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> None:
        raise AssertionError("the cluster was asked for its memory")

    monkeypatch.setattr(training_plan, "smallest_gpu", asked)
    base = Checkpoint.find(str(base_folder))
    given = plan_training(base, FinetuneConfig(strategy="fsdp", gradient_checkpointing=False))
    assert (given.config.strategy, given.config.gradient_checkpointing) == ("fsdp", False)
    on_cpus = plan_training(base, FinetuneConfig(use_gpu=False))
    assert (on_cpus.config.strategy, on_cpus.config.gradient_checkpointing) == ("ddp", False)
    assert plan_training(base, FinetuneConfig(use_gpu=False, gradient_checkpointing=True)).config.gradient_checkpointing
    shown = str(plan_training(base, FinetuneConfig(use_gpu=False), with_memory=True))
    assert shown.startswith("ddp on 1 CPU worker, keeping activations; ")


FRESH = """
import sys
from davir_ray.config.training import FinetuneConfig
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.training.memory import TrainedModel
model = TrainedModel(Checkpoint.find(sys.argv[1]), FinetuneConfig(tokens_per_pack=64), "cpu", has_bfloat16=False)
print(model.memory(strategy="ddp", num_workers=1, recompute=False).activations)
"""


@pytest.mark.slow
def test_a_process_that_has_built_no_model_can_plan(base_folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FRESH, str(base_folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 64 * 64 * 4
