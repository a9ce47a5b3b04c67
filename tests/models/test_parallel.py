"""Sharded over two processes, a fine-tune takes the steps that it takes replicated; its state and its end are whole."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from davir_ray.config import FinetuneConfig
from davir_ray.data.packing import pack
from davir_ray.errors import ConfigError, IntegrityError, ModelError
from davir_ray.models.adapter import add_adapter
from davir_ray.models.attention import PACKED_ATTENTION
from davir_ray.models.finetune import StepReport, Trainer, TrainingSet, plan, save_reference
from davir_ray.models.likelihood import Likelihood
from davir_ray.models.parallel import SHARDS_FILE, layers_of, sharded, uses_autocast

VOCABULARY = 61
"""Odd, as no other size here: the rows of two ranks differ in number."""

LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    tie_word_embeddings=False,
)
TIED = LlamaConfig(**LLAMA.to_dict() | {"tie_word_embeddings": True})
GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
)
CONFIG = FinetuneConfig(
    epochs=2,
    batch_size=8,
    learning_rate=3e-3,
    tokens_per_pack=48,
    gradient_checkpointing=False,
    precision="float32",
    weight_decay=0.01,
)
CASES: dict[str, tuple[PretrainedConfig, FinetuneConfig]] = {
    "untied": (LLAMA, CONFIG),
    "tied": (TIED, replace(CONFIG, gradient_checkpointing=True)),
    "gpt2": (GPT2, CONFIG),
    "one-pack": (TIED, replace(CONFIG, tokens_per_pack=10_000)),
    "bfloat16": (TIED, replace(CONFIG, precision="bfloat16", gradient_checkpointing=True)),
    "adapter": (TIED, replace(CONFIG, lora_rank=4, learning_rate=3e-2)),
}
"""Of the small packs some batches have an odd number, so one of two ranks has one fewer; of one pack, one has none."""

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


def make(config: PretrainedConfig, finetune: FinetuneConfig, seed: int = 0) -> Likelihood:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    if finetune.lora_rank is not None:
        add_adapter(model, finetune, finetune.lora_rank)
    return Likelihood(model)


def draw_examples(count: int = 20) -> TrainingSet:
    """Sequences that count upwards in steps of 1 to 3: something that can be learnt."""
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for row in range(count):
        length = int(draw.integers(4, 20))
        ids = (draw.integers(VOCABULARY) + np.arange(length) * (1 + row % 3)) % VOCABULARY
        rows.append({"example_id": row, "input_ids": ids.tolist(), "response_spans": [length // 2, length]})
    kinds = {"example_id": pa.int64(), "input_ids": pa.list_(pa.int32()), "response_spans": pa.list_(pa.int32())}
    return TrainingSet.of([pa.Table.from_pylist(rows, pa.schema(kinds))])


def shard(config: PretrainedConfig, finetune: FinetuneConfig, seed: int = 0) -> Likelihood:
    return sharded(partial(make, config, finetune, seed), CPU, autocast=uses_autocast(finetune, CPU))


def train(trainer: Trainer, save_to: Path | None = None, at: int = 0) -> list[float]:
    losses: list[float] = []

    def report(report: StepReport) -> None:
        losses.append(report.loss)
        if save_to is not None and report.step == at:
            trainer.save_state(save_to)

    trainer.train(report)
    return losses


def weights(likelihood: Likelihood) -> Weights:
    return {n: p.detach().clone() for n, p in likelihood.model.named_parameters(remove_duplicate=False) if p.requires_grad}


# --- what two processes do -------------------------------------------------------------------------------------------


def train_replicated(name: str, folder: Path, rank: int) -> None:
    config, finetune = CASES[name]
    likelihood = make(config, finetune)
    losses = train(Trainer(DistributedDataParallel(likelihood), draw_examples(), finetune))
    (folder / f"{name}-ddp-{rank}.json").write_text(json.dumps(losses))
    if rank == 0:
        torch.save(weights(likelihood), folder / f"{name}-ddp.pt")


def train_sharded(name: str, folder: Path, rank: int) -> None:
    config, finetune = CASES[name]
    trainer = Trainer(shard(config, finetune), draw_examples(), finetune)
    losses = train(trainer)
    (folder / f"{name}-fsdp-{rank}.json").write_text(json.dumps(losses))
    found = trainer.gathered_weights()
    if rank == 0:
        torch.save(found, folder / f"{name}-fsdp.pt")


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name in CASES:
        train_replicated(name, folder, rank)
        train_sharded(name, folder, rank)
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
