"""The fine-tune is the same for any number of workers and after any death, and says where it diverged."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pytest
import ray
import ray.train.torch
import torch
from drivers import PACKAGE, Driver, checkpoint_is_known
from fsspec.implementations.local import LocalFileSystem
from ray.train.torch import TorchConfig
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM
from without_ray_train import without_ray_train

from davir_ray.cli import parse_as
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.run import RunConfig
from davir_ray.config.scoring import ScoreConfig
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.engine import ray_train
from davir_ray.engine.connect import own_interrupts
from davir_ray.engine.progress import ProgressCounter
from davir_ray.engine.resources import Gpu
from davir_ray.engine.trackers import Step
from davir_ray.engine.tracking import StepLog, Tracking
from davir_ray.errors import ClusterError, IntegrityError, ModelError, StorageError, TrainingError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.training.memory import TrainedModel
from davir_ray.pipeline import finetune_only
from davir_ray.run.files import read_parquet
from davir_ray.run.folder import Run
from davir_ray.run.manifest import Manifest
from davir_ray.stages import finetune as stage
from davir_ray.stages import training_plan
from davir_ray.stages.finetune import Training, finetune
from davir_ray.stages.prepare import Preparation, prepare, scoring_spec
from davir_ray.stages.score import score

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS = 24
RECIPE: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 3e-4,
    "max_grad_norm": 3.0,
    "precision": "float32",
}
LONG: dict[str, Any] = RECIPE | {"epochs": 25, "batch_size": 4, "checkpoint_every_steps": 15}
SHARDED: dict[str, Any] = {"strategy": "fsdp", "num_workers": 2}
LONG_STEPS = 25 * ROWS // 4


def real_source(data_folder: Path) -> Source:
    return Source(name="alpaca", path=str(data_folder / "alpaca_9k.jsonl.gz"), format="alpaca")


def settings(base_folder: Path) -> Preparation:
    return Preparation(
        base=Checkpoint.find(str(base_folder)), config=PrepareConfig(max_tokens=256, shard_rows=10), limit=ROWS
    )


@pytest.fixture(scope="module")
def prepared(data_folder: Path, base_folder: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "run"
    prepare(Run.at(folder), [real_source(data_folder)], settings(base_folder), max_bad_fraction=1)
    return folder


def finetune_copy(prepared: Path, base_folder: Path, target: Path, **options: Any) -> Manifest:
    shutil.copytree(prepared, target, dirs_exist_ok=True)
    return finetune_in(target, base_folder, **options)


def finetune_in(target: Path, base_folder: Path, steps: StepLog | None = None, **options: Any) -> Manifest:
    spec = scoring_spec(settings(base_folder), [Source(name="alpaca", path="any", format="alpaca")])
    base = Checkpoint.find(str(base_folder))
    return finetune(Run.at(target), base, FinetuneConfig(**options), spec, steps=steps)


@pytest.mark.slow
def test_an_adapter_is_trained_scored_with_and_is_no_whole_model(
    prepared: Path, base_folder: Path, tmp_path: Path
) -> None:
    """After the training, Ctrl-C and the memory are the driver's again."""
    run, interrupt = Run.at(tmp_path / "run"), signal.getsignal(signal.SIGINT)
    manifest = finetune_copy(
        prepared, base_folder, tmp_path / "run", **RECIPE | {"learning_rate": 1e-2}, lora_rank=16, num_workers=2
    )
    assert signal.getsignal(signal.SIGINT) is interrupt
    deadline = time.monotonic() + 300
    while controllers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not controllers()
    losses = [loss for _, loss in manifest.details["loss_by_step"]]
    assert losses[-1] < losses[0]
    reference = Checkpoint.find(str(run / "reference"))
    assert reference.is_adapter
    base_cache = str(tmp_path / "cache")
    score(run, Checkpoint.find(str(base_folder)), reference, ScoreConfig(num_actors=1, base_cache=base_cache))
    scores = pa.concat_tables([read_parquet(run / "scores" / name) for name in (run / "scores").names()])
    assert pc.mean(scores["davir"]).as_py() > 0
    assert len(list(Path(base_cache).rglob("*.parquet"))) == len((run / "scores").names())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def controllers() -> list[str]:
    """Ray Train's controllers that this process keeps alive."""
    names = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            names.append(child.name())
    return [name for name in names if name.startswith("ray::TrainContr")]


@pytest.mark.slow
def test_a_stopped_and_resumed_training_has_one_curve_with_every_step_once(
    prepared: Path, base_folder: Path, tmp_path: Path
) -> None:
    class Stopping(StepLog):
        def add(self, step: Step) -> None:
            super().add(step)
            if step.step == 5:
                raise StorageError("the store is away")

    recipe: dict[str, Any] = RECIPE | {"checkpoint_every_steps": 2, "max_failures": 0}
    run = Run.at(tmp_path / "run")
    with Tracking(run, "tensorboard") as tracking:
        tracking.steps = Stopping()
        with pytest.raises(StorageError):
            finetune_copy(prepared, base_folder, tmp_path / "run", **recipe, steps=tracking.steps)
    with Tracking(run, "tensorboard") as tracking:
        manifest = finetune_in(tmp_path / "run", base_folder, **recipe, steps=tracking.steps)
        tracking.log_results({"score/scored": 24})
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
        assert [event.step for event in curves[f"train/{name}"]] == [1, 2, 3, 4, 5, 6], name
        assert all(event.value > 0 for event in curves[f"train/{name}"][:-1]), name
    losses = [loss for _, loss in manifest.details["loss_by_step"]]
    np.testing.assert_allclose([event.value for event in curves["train/loss"]], losses, rtol=1e-6)
    rates = [event.value for event in curves["train/learning_rate"]]
    assert rates[0] == pytest.approx(recipe["learning_rate"])
    assert rates == sorted(rates, reverse=True)
    assert [(event.step, event.value) for event in curves["score/scored"]] == [(6, 24)]


@pytest.mark.slow
def test_a_worker_that_runs_out_of_memory_continues_with_half_the_budget(
    prepared: Path, base_folder: Path, tmp_path: Path
) -> None:
    class RunsOut(StepLog):
        """Ends the first attempt at step 4, as a GPU does whose memory is full; notes the budget of the second."""

        def add(self, step: Step) -> None:
            with (tmp_path / "steps").open("a") as file:
                file.write(f"{step.step} ")
            noted = list(tmp_path.glob("run/checkpoints/*.tokens_per_pack"))
            if noted:
                (tmp_path / "budget").write_text(noted[0].read_text())
            elif step.step == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")

    recipe = RECIPE | {"checkpoint_every_steps": 2, "max_failures": 1, "tokens_per_pack": 1000}
    manifest = finetune_copy(prepared, base_folder, tmp_path / "run", **recipe, steps=RunsOut())
    steps = (tmp_path / "steps").read_text().split()
    assert steps[:4] == ["1", "2", "3", "4"]
    assert steps[4:] in (["3", "4", "5", "6"], ["1", "2", "3", "4", "5", "6"])  # whether the upload had ended
    assert (tmp_path / "budget").read_text() == "500"
    assert manifest.counts["steps"] == 6
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_exit_that_ray_train_makes_of_ctrl_c_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), own_interrupts():
        sys.exit(0)


@pytest.mark.slow
def test_one_and_two_workers_take_the_same_steps_and_so_do_two_that_share_a_model(
    prepared: Path, base_folder: Path, tmp_path: Path
) -> None:
    with without_ray_train():
        one = finetune_copy(prepared, base_folder, tmp_path / "one", **RECIPE, num_workers=1, export_epochs=True)
    two = finetune_copy(prepared, base_folder, tmp_path / "two", **RECIPE, num_workers=2, tokens_per_pack=600)
    shared = finetune_copy(prepared, base_folder, tmp_path / "shared", **RECIPE | SHARDED, export_epochs=True)
    losses = [np.array(manifest.details["loss_by_step"]) for manifest in (one, two, shared)]
    for others in losses[1:]:
        np.testing.assert_allclose(losses[0], others, rtol=1e-5)
    assert len(losses[0]) == one.counts["steps"] == two.counts["steps"] == shared.counts["steps"] == 6
    assert losses[0][-1, 1] < losses[0][0, 1]
    first, second, third = (weights(tmp_path / name / "reference") for name in ("one", "two", "shared"))
    assert first.keys() == second.keys() == third.keys() == weights(base_folder).keys()
    for name, value in first.items():
        for other in (second, third):
            apart = (value - other[name]).abs()
            # Adam divides by the gradient's size: where a gradient is all rounding, a step may go either way.
            assert (apart > 1e-5).float().mean() < 1e-4, name
            assert apart.max() < RECIPE["learning_rate"], name
    assert (first["lm_head.weight"] - weights(base_folder)["lm_head.weight"]).abs().max() > 1e-4

    for run, final in (("one", first), ("shared", third)):
        exported = tmp_path / run / "reference_epochs"
        assert sorted(path.name for path in exported.iterdir()) == ["1", "2"]
        for name, value in weights(exported / "2").items():
            assert torch.equal(value, final[name])
        assert not torch.equal(weights(exported / "1")["lm_head.weight"], final["lm_head.weight"])
        for folder in (exported / "1", tmp_path / run / "reference"):
            assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size > 0
            assert (folder / "scoring_spec.json").is_file()
    assert not (tmp_path / "one" / "checkpoints").exists()
    assert not (tmp_path / "two" / "reference_epochs").exists()


@pytest.mark.slow
def test_divergence_names_the_step_and_the_value(prepared: Path, base_folder: Path, tmp_path: Path) -> None:
    recipe = RECIPE | {"learning_rate": 1e30, "max_failures": 0}
    message = r"(nan|inf).* at step [2-6]; .*learning_rate \(now 1e\+30\)"
    with pytest.raises(TrainingError, match=message), without_ray_train():
        finetune_copy(prepared, base_folder, tmp_path / "run", **recipe)
    assert not (tmp_path / "run" / "reference").exists()
    assert Run.at(tmp_path / "run").manifest("finetune") is None


@pytest.mark.slow
def test_a_base_with_nan_weights_is_refused_before_the_first_step(
    prepared: Path, base_folder: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(base_folder, tmp_path / "base")
    tensors = weights(base_folder)
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"), without_ray_train():
        finetune_copy(prepared, broken, tmp_path / "run", **RECIPE, max_failures=0)


def test_workers_that_do_not_fit_are_refused_before_training(prepared: Path, base_folder: Path, tmp_path: Path) -> None:
    for number, options in enumerate([{"num_workers": 99}, {"num_cpus": 99}, {"use_gpu": True}]):
        with pytest.raises(ClusterError, match="do not fit"):
            finetune_copy(prepared, base_folder, tmp_path / str(number), **RECIPE, **options)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "after the last step"])
def test_a_store_that_takes_no_checkpoint_ends_a_training_that_goes_on_and_not_one_that_is_done(
    prepared: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def train_worker(of_run: Training, counter: ProgressCounter) -> dict[str, Any]:
        import ray.train

        from davir_ray.stages import training_worker as training  # in the worker nothing is patched

        ends = threading.Event()

        class Full(LocalFileSystem):  # type: ignore[misc]
            def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
                assert when == "at once" or ends.wait(600)
                (tmp_path / "refused").touch()
                raise OSError(errno.ENOSPC, "no space left")

        def export(*given: Any, **options: Any) -> Any:
            ends.set()
            return exported(*given, **options)

        exported, training._export = training._export, export
        storage = ray.train.get_context().get_storage()
        storage.storage_filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(Full()))
        return training.train_on_rank(of_run, counter)

    monkeypatch.setattr(stage, "_train_on_rank", train_worker)
    recipe = RECIPE | {"checkpoint_every_steps": 4, "max_failures": 0}
    if when == "at once":
        # An upload ends no training whose last step is taken before: there are many.
        with pytest.raises(StorageError, match="checkpoints: no space is left there"):
            finetune_copy(prepared, base_folder, tmp_path / "run", **recipe | {"epochs": 1000})
    else:
        assert finetune_copy(prepared, base_folder, tmp_path / "run", **recipe).counts["steps"] == 6
        assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "refused").exists()


# --- placement on GPUs -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_worker_is_given_a_logical_gpu_of_its_own(prepared: Path, base_folder: Path, tmp_path: Path) -> None:
    """Of two logical GPUs, which Ray counts and nobody has: the plan is made for them and followed.

    The workers train on the CPU over gloo, where they would choose their GPUs and nccl.
    """
    shutil.copytree(prepared, tmp_path / "run")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE), str(PACKAGE / "tests")])
    command = [sys.executable, __file__, str(tmp_path), str(base_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    placed = [json.loads((tmp_path / f"placed-{rank}.json").read_text()) for rank in range(2)]
    assert sorted(one["gpus"] for one in placed) == [["0"], ["1"]]
    assert [one["device"] for one in placed] == [f"cuda:{one['gpus'][0]}" for one in placed]
    assert all(one["resources"] == {"CPU": 2, "GPU": 1} for one in placed)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "reference").config.vocab_size > 0
    details = Run.at(tmp_path / "run").require("finetune").details
    assert [details[name] for name in ("workers", "strategy", "gradient_checkpointing")] == [2, "fsdp", False]


def train_on_logical_gpus(folder: Path, base_folder: Path) -> None:
    ray.init("local", num_cpus=6, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="WARNING")

    def train_worker(of_run: Training, counter: ProgressCounter) -> dict[str, Any]:
        import ray.train

        from davir_ray.stages import training_worker as training

        here = ray.get_runtime_context()
        found = {"gpus": here.get_accelerator_ids()["GPU"], "resources": here.get_assigned_resources()}
        found["device"] = str(training.get_device())
        (folder / f"placed-{ray.train.get_context().get_world_rank()}.json").write_text(json.dumps(found))
        training.get_device = lambda: torch.device("cpu")
        training.worker_device = lambda kind: torch.device("cpu")
        return training.train_on_rank(of_run, counter)

    stage._train_on_rank = train_worker
    ray_train.TorchTrainer = partial(ray.train.torch.TorchTrainer, torch_config=TorchConfig(backend="gloo"))
    base, spec = Checkpoint.find(str(base_folder)), {"any": "spec"}
    recipe = RECIPE | {"num_cpus": 2, "tokens_per_pack": 64}
    with pytest.raises(ClusterError, match=r"3 training workers .* do not fit .* room for 2;"):
        finetune(Run.at(folder / "run"), base, FinetuneConfig(**recipe | {"num_workers": 3}), spec)
    model = TrainedModel(base, FinetuneConfig(**recipe), "cuda", has_bfloat16=False)
    whole = model.memory(strategy="ddp", num_workers=2, recompute=True).total
    parts = model.memory(strategy="fsdp", num_workers=2, recompute=False).total
    training_plan.smallest_gpu = lambda: Gpu((whole + parts) // 2 / 0.9, has_bfloat16=False)
    finetune(Run.at(folder / "run"), base, FinetuneConfig(**recipe), spec)


# --- deaths ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of the long recipe without a death."""
    target = tmp_path_factory.mktemp("undisturbed") / "run"
    with without_ray_train():
        finetune_copy(prepared, base_folder, target, **LONG)
    return weights(target / "reference")


def wait_for_checkpoint(run: Path, seconds: float = 400) -> None:
    deadline, is_known = time.monotonic() + seconds, checkpoint_is_known(run)
    while time.monotonic() < deadline:
        if is_known():
            return
        time.sleep(0.02)
    raise TimeoutError("no checkpoint was written")


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_ends_with_the_same_weights(
    prepared: Path,
    base_folder: Path,
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, pids = tmp_path / "run", tmp_path / "pids"

    def train_worker(of_run: Training, counter: ProgressCounter) -> dict[str, Any]:
        import ray.train

        from davir_ray.stages.training_worker import train_on_rank

        with open(pids, "a") as file:
            file.write(f"{os.getpid()} {ray.train.get_checkpoint() is not None}\n")
        return train_on_rank(of_run, counter)

    def kill() -> None:
        wait_for_checkpoint(run)
        os.kill(int(pids.read_text().split()[0]), signal.SIGKILL)

    monkeypatch.setattr(stage, "_train_on_rank", train_worker)
    killer = threading.Thread(target=kill)
    killer.start()
    manifest = finetune_copy(prepared, base_folder, run, **LONG)
    killer.join()
    assert [line.split()[1] for line in pids.read_text().splitlines()] == ["False", "True"]
    assert manifest.counts["steps"] == len(manifest.details["loss_by_step"]) == LONG_STEPS
    for name, value in weights(run / "reference").items():
        assert torch.equal(value, undisturbed[name])


@pytest.fixture(scope="module")
def killed(data_folder: Path, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a fine-tune that was killed after a checkpoint, and all its workers with it.

    A training whose driver dies alone, while its workers go on for a while, is that of test_align.py.
    """
    folder = tmp_path_factory.mktemp("killed")
    run = folder / "run"
    options = {f"finetune.{name}": value for name, value in LONG.items()} | {
        "data": data_folder / "alpaca_9k.jsonl.gz", "format": "alpaca", "base": base_folder, "output": run,
        "limit": ROWS, "prepare.max_tokens": 256, "prepare.shard_rows": 10, "max_bad_fraction": 1,
    }  # fmt: skip
    # With a Ray of its own: in one that lives on, Ray Train's cleaner would ask a dashboard that is not there, forever.
    first = Driver("finetune.py", options, folder / "first.log")
    try:
        wait_for_checkpoint(run)
    finally:
        first.kill_all()
    assert not (run / "reference").exists()
    return options


@pytest.fixture
def mended(killed: dict[str, Any], tmp_path: Path) -> Iterator[None]:
    """Leaves the checkpoints as they were before a test."""
    kept = shutil.copytree(killed["output"] / "checkpoints", tmp_path / "checkpoints")
    yield
    shutil.rmtree(killed["output"] / "checkpoints")
    shutil.copytree(kept, killed["output"] / "checkpoints")


@pytest.mark.slow
@pytest.mark.usefixtures("mended")
def test_a_damaged_checkpoint_is_named(killed: dict[str, Any]) -> None:
    """The parts of a sharded one are those of test_parallel.py."""
    checksums = killed["output"].glob("checkpoints/*/checkpoint_*/training_state.sha256")
    states = [max(found.parent.iterdir(), key=lambda file: file.stat().st_size) for found in checksums]
    assert states
    for state in states:
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(bytes(content))
    with pytest.raises(IntegrityError) as raised:
        finetune_only(parse_as(RunConfig, [f"--{name}={value}" for name, value in killed.items()]))
    named = [f"the checkpoint {state.parent} is damaged ({state.name} does not" for state in states]
    assert any(text in str(raised.value) for text in named)


@pytest.mark.slow
def test_a_killed_driver_can_be_started_again_and_ends_with_the_same_weights(
    killed: dict[str, Any], undisturbed: dict[str, torch.Tensor], ray_address: str, tmp_path: Path
) -> None:
    again = Driver("finetune.py", killed, tmp_path / "again.log", address=ray_address)
    assert again.finish() == 0, again.output
    assert f"reference: {killed['output']}/reference" in again.output
    assert "continuing after step" in again.output
    for name, value in weights(killed["output"] / "reference").items():
        assert torch.equal(value, undisturbed[name])


if __name__ == "__main__":
    train_on_logical_gpus(Path(sys.argv[1]), Path(sys.argv[2]))
