"""A step of preference training beside TRL's DPOTrainer, on the same pairs and model, in one process."""

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from davir_ray.benchmarks.measure import describe_machine, with_peak
from davir_ray.benchmarks.workload import load_model, plain_copy, trained_tokenizer
from davir_ray.config.align import AlignConfig
from davir_ray.config.sources import Source
from davir_ray.config.training import FinetuneConfig
from davir_ray.data.files import list_files, plan_tasks
from davir_ray.data.reader import ExampleReader
from davir_ray.data.records import Reject
from davir_ray.data.tokens import Encoder
from davir_ray.errors import ConfigError, DataError
from davir_ray.models.device import local_device
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.training.loop import Trainer
from davir_ray.models.training.pairs import PairSet
from davir_ray.schema import PAIRS, Status

log = logging.getLogger(__name__)

_TEST_FILE = "hh_harmless_pairs_1k.jsonl.gz"


@dataclass(frozen=True, kw_only=True)
class AlignmentBenchmark:
    """Measure forward and backward of a batch of pairs against TRL's DPOTrainer: time, memory beyond the model's.

    TRL is given the frozen policy's log-probabilities in one way, as ours has them from the freeze stage, and computes
    them in each step in the other, its default. Without options: a Llama of hidden size 256, 4 layers and a vocabulary
    of 32,000 with random weights, float32, one thread.
    """

    json: str | None = None
    """File for the result."""
    data: str | None = None
    """Pairs. None: hh_harmless_pairs_1k.jsonl.gz in $DAVIR_TEST_DATA."""
    pairs: int = 32
    """Pairs to measure with, the first of the data that can be trained on."""
    batch_size: int = 8
    """Pairs in a batch; TRL's runs as one, ours in packs."""
    max_tokens: int = 1024
    """Token limit of a prompt with a response."""
    num_threads: int = 1
    """Threads on a CPU. Ratios are of CPU seconds, which mean most at one."""
    repeats: int = 3
    """Runs of each way, in turn; medians are told."""

    def __post_init__(self) -> None:
        for name in ("pairs", "batch_size", "num_threads", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


Way = Callable[[], list[float]]
"""All batches, forward and backward; returns the loss of each."""


def run(settings: AlignmentBenchmark) -> dict[str, Any]:
    """Run all ways in turn; returns what goes into the JSON file. ConfigError where TRL is not installed."""
    try:
        import trl  # noqa: F401 - only here, and not a dependency
    except ModuleNotFoundError as error:
        raise ConfigError("TRL is not installed; install davir_ray[test]") from error
    torch.set_num_threads(settings.num_threads)
    device = local_device()
    model, _ = load_model(None, None, torch.float32, device)
    data = settings.data or str(Path(os.environ.get("DAVIR_TEST_DATA", "."), _TEST_FILE))
    tokenizer = trained_tokenizer(data, int(model.config.get_text_config().vocab_size))
    examples = _load_pairs(data, settings, tokenizer)
    frozen, frozen_model = _frozen(model, examples), plain_copy(model, "sdpa", torch.float32)
    _move(model)
    objective = PairSet.of([(examples, frozen)], AlignConfig(loss="dpo", beta=0.1))
    starts = range(0, len(objective), settings.batch_size)
    batches = [np.arange(at, min(at + settings.batch_size, len(objective))) for at in starts]
    ways: dict[str, Way] = {"davir_ray": _ours(model, objective, batches)}
    ways |= _trl(model, frozen_model, tokenizer, examples, objective, batches)
    taken, peaks, losses = _in_turn(settings.repeats, ways, device)
    seconds = {name: median(values) for name, values in taken.items()}
    memory = {name: median(values) for name, values in peaks.items()}
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


def _in_turn(
    repeats: int, ways: dict[str, Way], device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """(seconds, extra memory in MiB) of each run, and the losses; a first run makes the gradients' own memory."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    losses = {name: way() for name, way in ways.items()}
    for turn in range(repeats):
        for name, way in ways.items():
            spent, peak = with_peak(way, device)
            taken[name].append(spent)
            peaks[name].append(peak)
            log.info("benchmark: turn %d of %d, %s: %.2f s, %.0f MiB", turn + 1, repeats, name, spent, peak)
    return taken, peaks, losses


def _load_pairs(data: str, settings: AlignmentBenchmark, tokenizer: Any) -> pa.Table:
    """The first pairs that can be prepared, through the same door as in a run."""
    source = Source(name="benchmark", path=data, format="preference")
    reader = ExampleReader(Encoder(tokenizer, settings.max_tokens), None, keep_record=False)
    slices = [part for task in plan_tasks(list_files(source), 2**62) for part in task]
    pairs = (item for item in reader.read(source, slices, None) if not isinstance(item, Reject))
    found = list(islice(pairs, settings.pairs))
    if len(found) < settings.pairs:
        raise DataError(f"{data} has {len(found)} pairs that can be prepared; lower --pairs (now {settings.pairs})")
    return pa.Table.from_pylist([row for pair in found for row in pair], PAIRS)


@torch.inference_mode()
def _frozen(model: PreTrainedModel, examples: pa.Table) -> pa.Table:
    """The losses under the model as it is."""
    objective = PairSet.of([(examples, _losses(examples, [1.0] * examples.num_rows))], AlignConfig(loss="dpo"))
    likelihood = Likelihood(model)
    nlls = [
        float(likelihood(objective.examples.pack(np.array([row]))).sum(dtype=torch.float64))
        for row in range(examples.num_rows)
    ]
    return _losses(examples, nlls)


@torch.no_grad()
def _move(model: PreTrainedModel) -> None:
    """Move the policy from the frozen one, where every loss is log 2, whatever the way computes."""
    generator = torch.Generator(model.device).manual_seed(0)
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        parameter += 0.1 * parameter.std(correction=0) * noise


def _losses(examples: pa.Table, nlls: list[float]) -> pa.Table:
    status = pa.repeat(Status.OK.value, examples.num_rows)
    return pa.table({"example_id": examples["example_id"], "base_nll": nlls, "status": status})


def _ours(model: PreTrainedModel, objective: PairSet, batches: list[np.ndarray[Any, Any]]) -> Way:
    trainer = Trainer(Likelihood(model), objective, FinetuneConfig(gradient_checkpointing=False, precision="float32"))
    trainer.likelihood.train()

    def way() -> list[float]:
        found = []
        for rows in batches:
            model.zero_grad(set_to_none=False)
            found.append(trainer.backward(rows)[0])
        return found

    return way


def _trl(
    model: PreTrainedModel,
    frozen_model: PreTrainedModel,
    tokenizer: Any,
    examples: pa.Table,
    objective: PairSet,
    batches: list[np.ndarray[Any, Any]],
) -> dict[str, Way]:
    """TRL's loss and backward on its own padded batches of the same tokens, with and without the frozen forward."""
    rows = examples.to_pylist()
    pairs = [_for_trl(*rows[2 * at : 2 * at + 2]) for at in range(len(objective))]
    trained = plain_copy(model, "sdpa", torch.float32).train()
    trainer = _trl_trainer(trained, frozen_model, tokenizer)
    frozen = torch.from_numpy(objective.frozen_logprobs).float().to(model.device)
    collated = [
        {name: value.to(model.device) for name, value in trainer.data_collator([pairs[row] for row in rows]).items()}
        for rows in batches
    ]

    def way(*, given: bool) -> list[float]:
        found = []
        for rows, batch in zip(batches, collated, strict=True):
            trainer.model.zero_grad(set_to_none=False)
            trainer.precompute_ref_logps = given
            logps = {"ref_chosen_logps": frozen[2 * rows], "ref_rejected_logps": frozen[2 * rows + 1]} if given else {}
            loss = trainer.compute_loss(trainer.model, batch | logps)
            loss.backward()
            found.append(float(loss.detach()))
        return found

    return {"trl": lambda: way(given=True), "trl_with_frozen_forward": lambda: way(given=False)}


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

    # Its own preparation of data is not measured: one row lets it start.
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved there
        config = DPOConfig(
            output_dir=folder, loss_type="sigmoid", beta=0.1, bf16=False, gradient_checkpointing=False,
            report_to="none", use_cpu=model.device.type == "cpu", disable_tqdm=True, max_length=None,
        )  # fmt: skip
        return DPOTrainer(model=model, ref_model=frozen, args=config, train_dataset=rows, processing_class=tokenizer)
