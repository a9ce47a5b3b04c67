"""The likelihood kernel compared with the machine's peak and with other scoring methods, in one process."""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from davir_ray.benchmarks import rivals, scaling
from davir_ray.benchmarks.measure import describe_machine, device_here, in_turn, useful_flops
from davir_ray.benchmarks.workload import Example, load_examples, load_model, num_tokens, plain_copy
from davir_ray.config.checks import check
from davir_ray.config.scoring import Precision
from davir_ray.config.sources import Format
from davir_ray.errors import ConfigError
from davir_ray.models.device import gemm_flops, resolve_dtype
from davir_ray.models.kernel.likelihood import TOKENS_PER_PACK, Likelihood, Pack
from davir_ray.models.kernel.packing import pack
from davir_ray.models.kernel.self_check import self_check

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LikelihoodBenchmark:
    """Measure the likelihood kernel: its share of the machine's matrix rate, its speed and memory relative to other
    methods, and the efficiency of the Ray pipeline.

    Without options: 512 rows of Alpaca, a Llama of hidden size 256, 4 layers and a vocabulary of 32,000 with random
    weights, float32, one thread.
    """

    json: str | None = None
    """File for the result."""
    model: str | None = None
    """Checkpoint to measure: a folder or a hub name."""
    random_init: str | None = None
    """Configuration of a model with random weights, instead of a checkpoint: a hub name or folder, a JSON file, or JSON
    text with a model_type. None: the small Llama."""
    data: str | None = None
    """Rows to score. None: alpaca_9k.jsonl.gz in $DAVIR_TEST_DATA, else random tokens."""
    format: Format = "alpaca"
    """Format of the data."""
    lengths: list[int] = field(default_factory=list)
    """Lengths of sequences of random tokens, used instead of data; repeated until there are enough rows."""
    rows: int = 512
    """Number of examples to score."""
    max_tokens: int = 512
    """Token limit of an example."""
    precision: Precision = "auto"
    """Precision of the forward pass, as in scoring."""
    tokens_per_pack: int | None = None
    """Token budget of a pack, as in scoring."""
    num_threads: int = 1
    """Number of threads on a CPU. CPU times are easiest to compare with one."""
    repeats: int = 3
    """Number of runs of each method; the methods take turns, and medians are reported."""
    rivals: bool = True
    """Also run the other methods. If false, only the kernel runs, for models whose full logits do not fit in memory."""
    reference_rows: int = 64
    """Number of rows, of all lengths, whose losses are compared with a float64 model's; 0: none."""
    training_rows: int = 64
    """Number of rows in the training step that is compared with padded batches; 0: none."""
    pipeline_shards: int = 8
    """Number of shards, of `rows` rows each, to run through the Ray pipeline; 0: none. Eight take over two minutes."""

    def __post_init__(self) -> None:
        if self.model is not None and self.random_init is not None:
            raise ConfigError("both model and random_init are given; give at most one of the two")
        if self.data is not None and self.lengths:
            raise ConfigError("both data and lengths are given; give at most one of the two")
        minimum = {"rows": 1, "max_tokens": 2, "num_threads": 1, "repeats": 1}
        minimum |= {"reference_rows": 0, "training_rows": 0, "pipeline_shards": 0}
        for name, value in minimum.items():
            check(getattr(self, name) >= value, name, getattr(self, name), f"at least {value}")
        if min(self.lengths, default=2) < 2:
            raise ConfigError(
                f"lengths contains {min(self.lengths)}; a sequence needs at least 2 tokens to have one to score"
            )
        if self.pipeline_shards == 1:
            raise ConfigError(
                "pipeline_shards is 1; the first shard warms up, so give at least 2, or 0 to skip the pipeline"
            )


Results = dict[str, Any]
Method = Callable[[Sequence[Example]], list[float]]
"""Returns the summed NLL of each example."""


def run(settings: LikelihoodBenchmark) -> Results:
    """Run the requested measurements; returns the contents of the JSON file."""
    torch.set_num_threads(settings.num_threads)
    device = device_here()
    dtype = resolve_dtype(settings.precision, device)
    model, tokenizer = load_model(settings.model, settings.random_init, dtype, device)
    vocab_size = int(model.config.get_text_config().vocab_size)
    examples, origin = load_examples(
        settings.rows, settings.max_tokens, vocab_size, tokenizer, settings.data, settings.format, settings.lengths
    )
    likelihood = Likelihood(model)
    results: Results = {
        "settings": asdict(settings),
        "examples": {
            "rows": len(examples),
            "tokens": num_tokens(examples),
            "scored_tokens": sum(example.num_scored for example in examples),
            "longest": max(len(example.input_ids) for example in examples),
            "origin": origin,
        },
        "machine": describe_machine(device, dtype),
        "attention": self_check(likelihood),
    }
    results |= _compare_methods(settings, likelihood, examples)
    if settings.reference_rows:
        results |= _compare_with_float64(settings, likelihood, examples)
    if settings.training_rows:
        results |= _compare_training(settings, likelihood, examples[: settings.training_rows])
    if settings.pipeline_shards:
        with tempfile.TemporaryDirectory() as folder:
            results |= scaling.compare_with_scorer(
                Path(folder), model, examples, settings.pipeline_shards, settings.precision, settings.tokens_per_pack
            )
    return results


def score_packed(likelihood: Likelihood, examples: Sequence[Example], tokens_per_pack: int | None) -> list[float]:
    """Our method: the summed NLL of each example, in the order given."""
    sums = np.empty(len(examples))
    for rows, built in _packs(likelihood, examples, tokens_per_pack):
        nlls = np.split(likelihood(built).cpu().numpy(), np.cumsum(built.num_scored)[:-1])
        sums[rows] = [nll.sum(dtype=np.float64) for nll in nlls]
    return [float(value) for value in sums]


def _packs(
    likelihood: Likelihood, examples: Sequence[Example], tokens_per_pack: int | None
) -> Iterator[tuple[npt.NDArray[np.int64], Pack]]:
    """The packs, each with the rows of its examples."""
    budget = tokens_per_pack or TOKENS_PER_PACK[likelihood.model.device.type]
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    for rows in pack(lengths, np.arange(len(examples)), budget):
        yield rows, Pack.of([(examples[row].input_ids, examples[row].spans) for row in rows])


@torch.inference_mode()
def _compare_methods(settings: LikelihoodBenchmark, likelihood: Likelihood, examples: Sequence[Example]) -> Results:
    """Run every method on the same rows: ratios of time and memory, and the kernel's rate."""
    model = likelihood.model
    methods: dict[str, Method] = {"davir_ray": lambda rows: score_packed(likelihood, rows, settings.tokens_per_pack)}
    if settings.rivals:
        plain = plain_copy(model, "sdpa" if model._supports_sdpa else "eager", model.dtype)
        methods |= {
            "naive": lambda rows: rivals.padded(plain, rows),
            "one_at_a_time": lambda rows: rivals.one_at_a_time(plain, rows),
            "lm_eval": lambda rows: rivals.lm_eval(plain, rows),
        }
    for method in methods.values():
        method(examples[: rivals.BATCH])  # loads kernels and libraries
    rates: list[float] = []
    seconds, memory = in_turn(
        {name: partial(method, examples) for name, method in methods.items()},
        settings.repeats,
        model.device,
        before_each_turn=lambda: rates.append(gemm_flops(model.dtype, model.device)),
    )
    gemm, flops, ours = median(rates), useful_flops(model, examples), seconds["davir_ray"]
    results: Results = {
        "gemm_tflops": gemm / 1e12,
        "useful_tflops": flops / ours / 1e12,
        "mfu": flops / ours / gemm,
        "examples_per_second": len(examples) / ours,
        "tokens_per_second": num_tokens(examples) / ours,
        "seconds": seconds,
        "extra_memory_mib": memory,
    }
    if settings.rivals:
        results |= {f"speedup_vs_{name}": seconds[name] / ours for name in methods if name != "davir_ray"}
        results["extra_memory_ratio"] = memory["davir_ray"] / memory["naive"]
        results["mfu_of_naive"] = flops / seconds["naive"] / gemm
    return results


@torch.inference_mode()
def _compare_with_float64(
    settings: LikelihoodBenchmark, likelihood: Likelihood, examples: Sequence[Example]
) -> Results:
    """The largest difference of a mean NLL from float64, in nats per token, over rows of all lengths."""
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    picked = np.linspace(0, len(by_length) - 1, min(settings.reference_rows, len(by_length))).astype(int)
    rows = [by_length[at] for at in picked]
    log.info("benchmark: %d rows in float64", len(rows))
    exact = rivals.float64(plain_copy(likelihood.model, "eager", torch.float64), rows)
    ours = score_packed(likelihood, rows, settings.tokens_per_pack)
    differences = [abs(a - b) / row.num_scored for a, b, row in zip(ours, exact, rows, strict=True)]
    return {"max_abs_diff_vs_fp64": max(differences)}


def _compare_training(settings: LikelihoodBenchmark, likelihood: Likelihood, examples: Sequence[Example]) -> Results:
    """Compare forward and backward over the rows with padded batches of 8 and full logits.

    Both run as in a fine-tune: float32 weights, with bfloat16 autocast if the kernel is measured in bfloat16.
    """
    plain = plain_copy(likelihood.model, "sdpa" if likelihood.model._supports_sdpa else "eager", torch.float32).train()
    half = likelihood.model.dtype == torch.bfloat16
    if half:
        likelihood = Likelihood(copy.deepcopy(likelihood.model).float())
    likelihood.train()
    scored = sum(example.num_scored for example in examples)
    device = likelihood.model.device
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=half)

    def ours() -> None:
        with autocast():
            for _, built in _packs(likelihood, examples, settings.tokens_per_pack):
                (likelihood(built).sum() / scored).backward()

    def padded() -> None:
        with autocast():
            for start in range(0, len(examples), rivals.BATCH):
                nll_N = rivals.padded_batch(plain, examples[start : start + rivals.BATCH])
                (nll_N.sum() / scored).backward()  # type: ignore[no-untyped-call]

    def clear_gradients() -> None:
        likelihood.zero_grad(set_to_none=False)
        plain.zero_grad(set_to_none=False)

    methods = {"davir_ray": ours, "padded": padded}
    for method in methods.values():
        method()  # allocates the gradients
    seconds, memory = in_turn(methods, settings.repeats, device, before_each_turn=clear_gradients)
    likelihood.eval().zero_grad()
    return {
        "training_seconds": seconds,
        "training_speedup_vs_padded": seconds["padded"] / seconds["davir_ray"],
        "training_extra_memory_mib": memory,
        "training_extra_memory_ratio": memory["davir_ray"] / memory["padded"],
    }
