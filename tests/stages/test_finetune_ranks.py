"""What one rank of a fine-tune meets ends all of them by name: two processes of one group, without Ray."""

import gc
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.train
import torch
import torch.distributed as dist
from ranks import run_two_ranks
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from davir_ray.config.training import FinetuneConfig
from davir_ray.engine.progress import WorkDone
from davir_ray.errors import DavirError, IntegrityError, ModelError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel.attention import PACKED_ATTENTION, register_packed_attention
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.training.examples import Objective, TrainingSet, write_examples
from davir_ray.models.training.loop import Trainer
from davir_ray.run.folder import Run
from davir_ray.stages import training_worker as training
from davir_ray.stages.finetune import Training

CONFIG = FinetuneConfig(
    epochs=2, batch_size=4, gradient_checkpointing=False, precision="float32", export_epochs=True,
    checkpoint_every_steps=100,
)  # fmt: skip
MODEL = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


@dataclass(frozen=True)
class WriteAlike:
    """Writes the same examples on each node, but for one, which cannot read them."""

    damaged_on: int | None

    def __call__(self, folder: Path) -> None:
        if dist.get_rank() == self.damaged_on:
            raise IntegrityError(f"the copy of rank {self.damaged_on} is damaged")
        ids = np.arange(8 * 6).reshape(8, 6) % MODEL.vocab_size
        kinds = {"example_id": pa.int64(), "input_ids": pa.list_(pa.int32()), "response_spans": pa.list_(pa.int32())}
        rows = [{"example_id": row, "input_ids": ids[row].tolist(), "response_spans": [3, 6]} for row in range(8)]
        write_examples(folder, [pa.Table.from_pylist(rows, pa.schema(kinds))])


class OnNode:
    """Ray's and Ray Train's contexts of a group whose ranks have a node each, or one together."""

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone

    def get_world_rank(self) -> int:
        return dist.get_rank()

    def get_node_id(self) -> str:
        return f"node of {dist.get_rank()}" if self._alone else "the node"


def place_on(patch: pytest.MonkeyPatch, *, alone: bool) -> None:
    for module, name in ((ray, "get_runtime_context"), (ray.train, "get_context")):
        patch.setattr(module, name, lambda: OnNode(alone=alone))


class WithoutTokenizer(Checkpoint):
    """A base whose tokenizer is gone when the model is written."""

    def tokenizer(self) -> Any:
        raise ModelError("the tokenizer of the base is gone")


class NobodyListens:
    """Stands for the counter, an actor of Ray."""

    def begin(self, key: str) -> None:
        """Nothing."""

    def report(self, key: str, work: WorkDone, total: int | None = None) -> None:
        """Nothing."""


def training_of(folder: Path, damaged_on: int | None = None) -> Training:
    base = WithoutTokenizer.__new__(WithoutTokenizer)
    return Training(
        stage="finetune",
        run=Run.at(folder),
        base=base,
        config=CONFIG,
        write=WriteAlike(damaged_on),
        objective=TrainingSet.mapped,
        spec={},
        folder="reference",
    )


def read_damaged(folder: Path, rank: int) -> None:
    """One rank cannot read what it is to train on."""
    with pytest.MonkeyPatch.context() as patch:
        place_on(patch, alone=True)
        training.train_on_rank(training_of(folder, damaged_on=1), NobodyListens())  # type: ignore[arg-type]


def share_one_copy(of_rank: Training, folder: Path, rank: int) -> Objective:
    """Both ranks of a node map the same files, which nobody else can open any more; notes the files of this rank."""
    with pytest.MonkeyPatch.context() as patch:
        place_on(patch, alone=False)
        examples = training._objective(of_rank)
    dist.barrier()  # the first rank of the node deletes them when all have mapped them
    mapped = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    files = sorted((inode, name) for *_, inode, name in (line for line in mapped if "davir-training-" in line[-1]))
    assert len(files) == 5
    assert all(name.endswith(" (deleted)") for _, name in files)
    (folder / f"mapped-{rank}").write_text(str(files))
    return examples


def export_nothing(folder: Path, rank: int) -> None:
    """Rank 0 cannot write the model after the first epoch, and the others have a second before them."""
    torch.manual_seed(0)
    register_packed_attention()
    model = LlamaForCausalLM._from_config(MODEL, attn_implementation=PACKED_ATTENTION)
    of_rank = training_of(folder)
    examples = share_one_copy(of_rank, folder, rank)
    trainer = Trainer(DistributedDataParallel(Likelihood(model)), examples, replace(CONFIG, epochs=2))
    checkpoints = training.Checkpoints(of_rank, trainer, is_first=rank == 0)
    training._take_steps(of_rank, trainer, NobodyListens(), checkpoints, is_first=rank == 0)  # type: ignore[arg-type]


CASES = {
    read_damaged: "IntegrityError: the copy of rank 1 is damaged",
    export_nothing: "ModelError: the tokenizer of the base is gone",
}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=600))
    for case in CASES:
        with pytest.raises(DavirError) as raised:
            case(folder, rank)
        (folder / f"{case.__name__}-{rank}").write_text(f"{type(raised.value).__name__}: {raised.value}")
        dist.barrier()
    gc.collect()  # what holds the process group must be freed before it is destroyed
    dist.destroy_process_group()


@pytest.mark.slow
def test_an_error_that_one_rank_meets_is_raised_on_all(tmp_path: Path) -> None:
    run_two_ranks(__file__, tmp_path)
    for case, message in CASES.items():
        assert [(tmp_path / f"{case.__name__}-{rank}").read_text() for rank in range(2)] == [message, message]
    assert (tmp_path / "mapped-0").read_text() == (tmp_path / "mapped-1").read_text()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
