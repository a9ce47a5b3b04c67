"""A step of preference training compared with TRL's DPOTrainer, on the same pairs and model, in one process."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from davir_ray.benchmarks.measure import describe_machine, device_here, in_turn
from davir_ray.benchmarks.workload import load_model, plain_copy, prepared_rows, trained_tokenizer
from davir_ray.config.align import AlignConfig
from davir_ray.config.checks import check
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError, DataError
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.training.loop import Trainer
from davir_ray.models.training.pairs import PairSet
from davir_ray.schema import PAIRS, Status

_TEST_FILE = "hh_harmless_pairs_1k.jsonl.gz"


@dataclass(frozen=True, kw_only=True)
class AlignmentBenchmark:
    """Compare forward and backward over a batch of pairs with TRL's DPOTrainer: time, and memory beyond the model's.

    TRL is measured twice: given the frozen policy's log-probabilities, as ours is by the freeze stage, and computing
    them in each step, which is its default. Without options: a Llama of hidden size 256, 4 layers and a
    vocabulary of 32,000 with random weights, float32, one thread.
    """

    json: str | None = None
    """File for the result."""
    data: str | None = None
    """Pairs. None: hh_harmless_pairs_1k.jsonl.gz in $DAVIR_TEST_DATA."""
    pairs: int = 32
    """Number of pairs to measure with: the first usable ones of the data."""
    batch_size: int = 8
    """Number of pairs in a batch; TRL runs it whole, ours in packs."""
    max_tokens: int = 1024
    """Token limit of a prompt with a response."""
    num_threads: int = 1
    """Number of threads on a CPU. CPU times are easiest to compare with one."""
    repeats: int = 3
    """Number of runs of each method; the methods take turns, and medians are reported."""

    def __post_init__(self) -> None:
        for name in ("pairs", "batch_size", "num_threads", "repeats"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


Method = Callable[[], list[float]]
"""Runs forward and backward over all batches; returns the loss of each."""


def run(settings: AlignmentBenchmark) -> dict[str, Any]:
    """Run all methods in turn; returns the contents of the JSON file. Raises ConfigError if TRL is not installed."""
    try:
        import trl  # noqa: F401 - an optional dependency, only needed here
    except ModuleNotFoundError as error:
        raise ConfigError("TRL is not installed; install davir_ray[test]") from error
    torch.set_num_threads(settings.num_threads)
    device = device_here()
    model, _ = load_model(None, None, torch.float32, device)
    data = settings.data or str(Path(os.environ.get("DAVIR_TEST_DATA", "."), _TEST_FILE))
    tokenizer = trained_tokenizer(data, int(model.config.get_text_config().vocab_size))
    examples = _load_pairs(data, settings, tokenizer)
    frozen, frozen_model = _frozen(model, examples), plain_copy(model, "sdpa", torch.float32)
    _perturb(model)
    objective = PairSet.of([(examples, frozen)], AlignConfig(loss="dpo", beta=0.1))
    starts = range(0, len(objective), settings.batch_size)
    batches = [np.arange(at, min(at + settings.batch_size, len(objective))) for at in starts]
    methods: dict[str, Method] = {"davir_ray": _ours(model, objective, batches)}
    methods |= _trl(model, frozen_model, tokenizer, examples, objective, batches)
    losses = {name: method() for name, method in methods.items()}  # the first run also allocates the gradients
    seconds, memory = in_turn(methods, settings.repeats, device)
    lengths = objective.lengths
    return {
        "settings": asdict(settings),
        "machine": describe_machine(device, torch.float32) | {"trl": metadata.version("trl")},
        "pairs": {"pairs": len(objective), "tokens": int(lengths.sum()), "longest": objective.longest, "data": data},
        "seconds": seconds,
        "extra_memory_mib": memory,
        "speedup_vs_trl": seconds["trl"] / seconds["davir_ray"],
        "speedup_vs_trl_as_it_comes": seconds["trl_with_frozen_forward"] / seconds["davir_ray"],
        "extra_memory_ratio": memory["davir_ray"] / memory["trl"],
        "losses": losses["davir_ray"],
        "largest_difference_of_losses": float(np.ptp(np.array(list(losses.values())), axis=0).max()),
    }


def _load_pairs(data: str, settings: AlignmentBenchmark, tokenizer: Any) -> pa.Table:
    """The first pairs that can be prepared."""
    found = list(islice(prepared_rows(data, "preference", settings.max_tokens, tokenizer), settings.pairs))
    if len(found) < settings.pairs:
        raise DataError(f"{data} has {len(found)} pairs that can be prepared; lower --pairs (now {settings.pairs})")
    return pa.Table.from_pylist([row for pair in found for row in pair], PAIRS)


@torch.inference_mode()
def _frozen(model: PreTrainedModel, examples: pa.Table) -> pa.Table:
    """The frozen policy's losses: those of the model before `_perturb`."""
    objective = PairSet.of([(examples, _losses(examples, [1.0] * examples.num_rows))], AlignConfig(loss="dpo"))
    likelihood = Likelihood(model)
    nlls = [
        float(likelihood(objective.examples.pack(np.array([row]))).sum(dtype=torch.float64))
        for row in range(examples.num_rows)
    ]
    return _losses(examples, nlls)


@torch.no_grad()
def _perturb(model: PreTrainedModel) -> None:
    """Change the policy: while it equals the frozen one, every loss is log 2, even in a wrong implementation."""
    generator = torch.Generator(model.device).manual_seed(0)
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        parameter += 0.1 * parameter.std(correction=0) * noise


def _losses(examples: pa.Table, nlls: list[float]) -> pa.Table:
    status = pa.repeat(Status.OK.value, examples.num_rows)
    return pa.table({"example_id": examples["example_id"], "base_nll": nlls, "status": status})


def _ours(model: PreTrainedModel, objective: PairSet, batches: list[np.ndarray[Any, Any]]) -> Method:
    trainer = Trainer(Likelihood(model), objective, FinetuneConfig(gradient_checkpointing=False, precision="float32"))
    trainer.likelihood.train()

    def method() -> list[float]:
        found = []
        for rows in batches:
            model.zero_grad(set_to_none=False)
            found.append(trainer.backward(rows)[0])
        return found

    return method


def _trl(
    model: PreTrainedModel,
    frozen_model: PreTrainedModel,
    tokenizer: Any,
    examples: pa.Table,
    objective: PairSet,
    batches: list[np.ndarray[Any, Any]],
) -> dict[str, Method]:
    """TRL's loss and backward on its own padded batches of the same tokens, without and with the frozen forward."""
    rows = examples.to_pylist()
    pairs = [_for_trl(*rows[2 * at : 2 * at + 2]) for at in range(len(objective))]
    trained = plain_copy(model, "sdpa", torch.float32).train()
    trainer = _trl_trainer(trained, frozen_model, tokenizer)
    frozen = torch.from_numpy(objective.frozen_logprobs).float().to(model.device)
    collated = [
        {name: value.to(model.device) for name, value in trainer.data_collator([pairs[row] for row in rows]).items()}
        for rows in batches
    ]

    def method(*, given: bool) -> list[float]:
        found = []
        for rows, batch in zip(batches, collated, strict=True):
            trainer.model.zero_grad(set_to_none=False)
            trainer.precompute_ref_logps = given
            logps = {"ref_chosen_logps": frozen[2 * rows], "ref_rejected_logps": frozen[2 * rows + 1]} if given else {}
            loss = trainer.compute_loss(trainer.model, batch | logps)
            loss.backward()
            found.append(float(loss.detach()))
        return found

    return {"trl": lambda: method(given=True), "trl_with_frozen_forward": lambda: method(given=False)}


def _for_trl(chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, list[int]]:
    start = chosen["response_spans"][0]
    return {
        "prompt_ids": chosen["input_ids"][:start],
        "chosen_ids": chosen["input_ids"][start:],
        "rejected_ids": rejected["input_ids"][start:],
    }


def _trl_trainer(model: PreTrainedModel, frozen: PreTrainedModel, tokenizer: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    # TRL's preparation of data is not measured; it needs one row to start.
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved there
        config = DPOConfig(
            output_dir=folder, loss_type="sigmoid", beta=0.1, bf16=False, gradient_checkpointing=False,
            report_to="none", use_cpu=model.device.type == "cpu", disable_tqdm=True, max_length=None,
        )  # fmt: skip
        return DPOTrainer(model=model, ref_model=frozen, args=config, train_dataset=rows, processing_class=tokenizer)
