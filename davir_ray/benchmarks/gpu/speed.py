"""How fast scoring and training are on this device, as shares of its own rate of matrix products."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import PreTrainedModel

from davir_ray.benchmarks.gpu.exactness import as_table, budgeted
from davir_ray.benchmarks.gpu.shapes import SHAPES, Sequences, draw_like_alpaca, make
from davir_ray.benchmarks.gpu.trial import Trial
from davir_ray.benchmarks.measure import useful_flops
from davir_ray.benchmarks.workload import Example
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ModelError
from davir_ray.formulas.losses import token_nll
from davir_ray.models.adapter import add_adapter
from davir_ray.models.device import gemm_flops
from davir_ray.models.kernel import likelihood as kernel
from davir_ray.models.kernel.likelihood import TOKENS_PER_PACK, Likelihood
from davir_ray.models.kernel.self_check import self_check
from davir_ray.models.training.examples import TrainingSet
from davir_ray.models.training.loop import Trainer
from davir_ray.text import one_line

_PREDICTED = {
    "Qwen2.5-0.5B": "43 to 46 %, 1,700 pairs/s", "Llama-3.2-1B": "57 to 61 %, 875 pairs/s",
    "Llama-3.1-8B": "67 to 72 %, 157 pairs/s", "Gemma-2-2B": "46 to 48 %, 330 pairs/s",
}  # fmt: skip
"""Of one H200 (790 TFLOP/s), from an op trace and arithmetic; 5 to 10 % less is expected."""

_PACKS = {
    "Qwen2.5-0.5B": (2048, (8192, 16384, 32768)), "Llama-3.2-1B": (2048, (4096, 16384, 65536)),
    "Llama-3.1-8B": (1024, (8192, 16384, 32768)), "Gemma-2-2B": (1024, (16384,)),
}  # fmt: skip
"""Rows that are scored, and the tokens of a pack that are tried."""

_STEPS: dict[str, tuple[str, dict[str, Any], str]] = {
    "1B, all weights": ("Llama-3.2-1B", {"gradient_checkpointing": True}, "347 ms"),
    "1B, all weights, no recomputation": ("Llama-3.2-1B", {"gradient_checkpointing": False}, "262 ms"),
    "8B, adapter": ("Llama-3.1-8B", {"lora_rank": 16, "gradient_checkpointing": True}, ""),
}


def matrix_rate(trial: Trial) -> None:
    """The rate of large matrix products, which the other rates are shares of."""
    rate = gemm_flops(trial.half, trial.device)
    trial.record("matrix rate", None, f"{rate / 1e12:.3g} TFLOP/s", predicted="790 TFLOP/s", rate=rate)


def scoring(trial: Trial) -> None:
    """The share of the matrix rate, and pairs a second, of one model after another; and what variants gain."""
    rate = trial.value("matrix rate", "rate", 0.0) or gemm_flops(trial.half, trial.device)
    for name, (num_rows, budgets) in _PACKS.items():
        if trial.is_over:
            trial.record(f"scoring {name}", None, "left out: the time is over", predicted=_PREDICTED[name])
            continue
        model = make(SHAPES[name], trial.half, trial.device, tiny=trial.smoke)
        likelihood = Likelihood(model)
        examples = draw_like_alpaca(num_rows if trial.is_cuda else 16, int(model.config.vocab_size))
        flops = _flops(model, examples)
        shares, memory = {}, {}
        for budget in budgets:
            taken, memory[budget] = _timed(trial, partial(budgeted, likelihood, examples, budget))
            shares[budget] = flops / taken / rate
        default = TOKENS_PER_PACK[trial.device.type] if trial.is_cuda else budgets[0]
        pairs = len(examples) * shares[default] * rate / flops / 2
        by_pack = ", ".join(f"{budget}: {share:.1%} ({memory[budget]:.1f} GiB)" for budget, share in shares.items())
        trial.record(
            f"scoring {name}", None, f"share of the matrix rate by tokens of a pack {by_pack}; {pairs:,.0f} pairs/s",
            predicted=_PREDICTED[name], shares=shares, pairs_per_second=pairs, memory_gib=memory,
        )  # fmt: skip
        if name in ("Llama-3.2-1B", "Gemma-2-2B") and not trial.is_over:
            _variants(trial, name, likelihood, examples, default)
        del model, likelihood
        trial.clean()


def _flops(model: PreTrainedModel, examples: Sequences) -> float:
    return useful_flops(model, [Example(ids, spans) for ids, spans in examples])


def _timed(trial: Trial, job: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a job that was run once before, the better of two, and its peak of memory in GiB."""
    job()
    trial.clean()
    before = torch.cuda.memory_allocated() if trial.is_cuda else 0
    taken = min(trial.seconds(job) for _ in range(2))
    return taken, trial.peak_gib(before)


def _variants(trial: Trial, name: str, likelihood: Likelihood, examples: Sequences, budget: int) -> None:
    """What is gained by a compiled softmax, by compiled layers, and by Liger's kernels where they are installed."""
    score = partial(budgeted, likelihood, examples, budget)
    plain, _ = _timed(trial, score)
    with mock.patch.object(kernel, "token_nll", torch.compile(token_nll, dynamic=True)):
        _record_variant(trial, f"{name}: compiled softmax", plain, score)
    _compiled_layers(trial, name, likelihood, plain, score)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=likelihood.model)
        with torch.compiler.set_stance("force_eager"):
            _record_variant(trial, f"{name}: Liger", plain, score)
    else:
        trial.record(f"variant {name}: Liger", None, "is not installed")


def _compiled_layers(
    trial: Trial, name: str, likelihood: Likelihood, plain: float, score: Callable[[], object]
) -> None:
    """What `score.compile` gains, and how long the check at start-up takes, which compiles the layers."""
    likelihood.compile_layers()
    try:
        taken = trial.seconds(lambda: self_check(likelihood))
    except ModelError as error:
        trial.record(f"variant {name}: compiled layers", None, f"refused: {one_line(error, 300)}")
        return
    trial.record(f"variant {name}: compiling", None, f"{taken:.0f} s at start-up", seconds=taken)
    _record_variant(trial, f"{name}: compiled layers", plain, score)


def _record_variant(trial: Trial, name: str, plain: float, score: Callable[[], object]) -> None:
    try:
        taken, _ = _timed(trial, score)
    except Exception as error:  # noqa: BLE001 - a variant that does not run is a result
        trial.record(
            f"variant {name}", None, f"does not run: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
        )
        return
    trial.record(f"variant {name}", None, f"{plain / taken:.2f} times as fast", ratio=plain / taken)


def training(trial: Trial) -> None:
    """A step of the default recipe, and the bytes that a trained parameter takes."""
    for name, (shape, options, predicted) in _STEPS.items():
        if trial.is_over:
            trial.record(f"training {name}", None, "left out: the time is over", predicted=predicted)
            continue
        adapted = "lora_rank" in options
        if adapted and importlib.util.find_spec("peft") is None:
            trial.record(f"training {name}", None, "peft is not installed", predicted=predicted)
            continue
        trial.clean()
        model = make(SHAPES[shape], trial.half if adapted else torch.float32, trial.device, tiny=trial.smoke)
        batch_size, num_steps = (128, 6) if trial.is_cuda else (8, 3)
        examples = draw_like_alpaca(batch_size * num_steps, int(model.config.vocab_size))
        config = FinetuneConfig(batch_size=batch_size, max_steps=num_steps, learning_rate=1e-5, **options)
        if adapted:
            add_adapter(model, config, 16)
        trainer = Trainer(Likelihood(model), TrainingSet.of([as_table(examples)]), config)
        trainer.fit_budget()
        seconds = []
        for report in trainer.steps():
            trial.wait()
            seconds.append(report.num_tokens / report.tokens_per_second)
        step = float(np.median(seconds[1:]))
        num_bytes = trial.peak_gib() * 2**30 / sum(parameter.numel() for parameter in model.parameters())
        trial.record(
            f"training {name}", None,
            f"{1000 * step:.0f} ms a step of {batch_size} rows; {num_bytes:.1f} bytes a parameter at the peak, packs "
            f"of {trainer.budget:,} tokens", predicted=predicted, seconds_of_a_step=step, bytes_a_parameter=num_bytes,
        )  # fmt: skip
        del model, trainer
        trial.clean()
