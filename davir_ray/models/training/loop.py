"""The fine-tuning loop over packs: response tokens only, the same steps at any world size.

The plan is a pure function of (seed, epoch) and the examples: which examples form each global batch, and how they are
packed. Each rank takes its share of a batch's packs. The loss is the sum of response NLLs over the global batch divided
by the number of its response tokens, so neither gradient accumulation nor uneven packs change it. A step
number is enough to resume.
"""

import logging
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from davir_ray.config.training import SAVE_MEMORY, FinetuneConfig
from davir_ray.errors import TrainingError
from davir_ray.formulas.hashing import seed_from
from davir_ray.models.device import uses_autocast
from davir_ray.models.kernel.likelihood import TOKENS_PER_PACK, Likelihood
from davir_ray.models.kernel.packing import deal
from davir_ray.models.training.examples import Objective
from davir_ray.models.training.parallel import Position, Weights, strategy_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One global batch: one optimiser step."""

    step: int
    """Counted from 1."""
    epoch: int
    """Counted from 1."""
    rows: npt.NDArray[np.int64]
    ends_epoch: bool


def plan(num_examples: int, batch_size: int, epochs: int, seed: int, max_steps: int | None = None) -> Iterator[Batch]:
    """Every global batch of the training in order; each epoch is a permutation drawn from (seed, epoch)."""
    step, last = 0, num_steps(num_examples, batch_size, epochs, max_steps)
    for epoch in count(1):
        order = np.random.default_rng([seed, epoch]).permutation(num_examples)
        for start in range(0, num_examples, batch_size):
            step += 1
            end = start + batch_size
            yield Batch(step=step, epoch=epoch, rows=order[start:end], ends_epoch=end >= num_examples)
            if step == last:
                return


def num_steps(num_examples: int, batch_size: int, epochs: int, max_steps: int | None = None) -> int:
    """Number of optimiser steps: `max_steps` if given, else those of `epochs`."""
    return max_steps or epochs * math.ceil(num_examples / batch_size)


def rows_in(steps: int, num_examples: int, batch_size: int) -> int:
    """Number of rows in so many steps: the last batch of an epoch has what the others left."""
    epochs, more = divmod(steps, math.ceil(num_examples / batch_size))
    return epochs * num_examples + more * batch_size


def steps_for(rows: float, num_examples: int, batch_size: int) -> int:
    """Number of steps, at least 1, whose number of rows is nearest to `rows`; of two, the smaller."""
    epochs, more = divmod(rows, num_examples)
    steps = int(epochs) * math.ceil(num_examples / batch_size) + int(more // batch_size)
    fewer, larger = (rows_in(count, num_examples, batch_size) for count in (steps, steps + 1))
    return max(1, steps if rows - fewer <= larger - rows else steps + 1)


def learning_rate_factor(step: int, total: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step, counted from 1: linear warm-up, then a cosine to 0."""
    warmup = math.ceil(warmup_ratio * total)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / max(1, total - warmup)))


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The result of a step; the same on every rank."""

    step: int
    total_steps: int
    epoch: int
    ends_epoch: bool
    loss: float
    """Nats per response token over the global batch, before the step."""
    measures: dict[str, float]
    """The objective's measures over the global batch, the loss among them."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float
    tokens_per_second: float
    """Rate of this step over all ranks, prompt tokens included."""
    num_tokens: int
    """Number of tokens of this step, prompt tokens included."""


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def recompute_activations(model: PreTrainedModel) -> None:
    """Let the layers of a model keep only their inputs for the backward pass, and compute the rest again."""
    with warnings.catch_warnings():  # transformers 5.23 renames the method that 5.17 has
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})


class Trainer:
    """The model, its optimiser and the position in the plan; every rank has one."""

    def __init__(
        self, module: Likelihood | DistributedDataParallel, objective: Objective, config: FinetuneConfig
    ) -> None:
        self._module = module
        self._strategy = strategy_of(module)
        self._strategy.check_lengths(objective.longest)
        self._objective = objective
        self._config = config
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._device = self.likelihood.model.device
        self._optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self._device.type == "cuda",  # else each step holds a copy of the gradients, 4 bytes per parameter
        )
        self._budget = config.tokens_per_pack or TOKENS_PER_PACK[self._device.type]
        self._step = 0
        self._history: list[list[float]] = []
        self._total = num_steps(len(objective), config.batch_size, config.epochs, config.max_steps)
        self._autocast = uses_autocast(config.precision, self._device)
        if config.gradient_checkpointing:
            recompute_activations(self.likelihood.model)

    @property
    def likelihood(self) -> Likelihood:
        """The module without its data-parallel wrapper."""
        return self._strategy.likelihood

    @property
    def every_rank_saves(self) -> bool:
        """Whether `save_state` is called on every rank, each for its part, and not on rank 0 alone."""
        return self._strategy.every_rank_saves

    def steps(self) -> Iterator[StepReport]:
        """Take the steps after the current position; a step is taken when the caller asks for its report.

        Every rank must iterate to the end.
        """
        self._module.train()
        config = self._config
        for batch in plan(len(self._objective), config.batch_size, config.epochs, config.seed, config.max_steps):
            if batch.step <= self._step:
                continue
            started = time.perf_counter()
            measured, norm = self._train_batch(batch)
            self._step = batch.step
            self._history.append(measured)
            num_tokens = int(self._objective.lengths[batch.rows].sum())
            yield StepReport(
                step=batch.step,
                total_steps=self._total,
                epoch=batch.epoch,
                ends_epoch=batch.ends_epoch,
                loss=measured[0],
                measures=dict(zip(self._objective.measures, measured, strict=True)),
                grad_norm=norm,
                learning_rate=self._optimizer.param_groups[0]["lr"],
                tokens_per_second=num_tokens / (time.perf_counter() - started),
                num_tokens=num_tokens,
            )

    @property
    def step(self) -> int:
        """The last step that was taken, by this trainer or by the one whose state it loaded."""
        return self._step

    @property
    def budget(self) -> int:
        """Maximum number of tokens of a pack."""
        return self._budget

    def limit_budget(self, num_tokens: int) -> None:
        """Take no larger packs than this."""
        self._budget = min(self._budget, num_tokens)

    def fit_budget(self) -> None:
        """Halve the budget until its largest pack fits the device of every rank, forward and backward.

        Called on every rank before the first step. TrainingError if the longest example does not fit by itself. Sharded
        ranks cannot try again, because those that have room wait for one that has none: OutOfMemoryError is raised.
        """
        self._module.train()
        lengths = self._objective.lengths
        longest_first = np.argsort(-lengths, kind="stable")[: self._config.batch_size]
        while True:
            fitting = int(np.searchsorted(np.cumsum(lengths[longest_first]), self._budget, side="right"))
            rows = longest_first[: max(1, fitting)]
            if self.agreed(self._fits(rows)):
                return
            if len(rows) == 1:
                raise TrainingError(
                    f"an example of {lengths[rows[0]]} tokens does not fit the memory of {self._device} while "
                    f"training; {SAVE_MEMORY}"
                )
            torch.cuda.empty_cache()
            self._budget = max(1, int(lengths[rows].sum()) // 2)
            log.warning("out of memory; continuing with packs of %d tokens", self._budget)

    def _fits(self, rows: npt.NDArray[np.int64]) -> bool:
        """Whether these rows fit the device of this rank beside gradients of earlier packs and AdamW's moments."""
        self._strategy.exchange_gradients(False)
        trained = [_local(p) for p in self._module.parameters() if p.requires_grad]
        try:
            moments = 0 if self._optimizer.state else 2 * sum(part.numel() for part in trained)
            reserved = torch.empty(moments, dtype=torch.float32, device=self._device)
            for _ in range(2):
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                    nll_R: torch.Tensor = self._module(self._objective.pack(rows))
                self._objective.sums(nll_R, rows)[0].backward()  # type: ignore[no-untyped-call]
            del reserved
        except torch.OutOfMemoryError:
            if not self._strategy.repeats_alone:
                raise
            return False
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        return True

    def agreed(self, own: bool) -> bool:
        """Whether every rank says yes; called on every rank."""
        if self._world_size == 1:
            return own
        answer = torch.tensor(int(own), device=self._device)
        dist.all_reduce(answer, dist.ReduceOp.MIN)
        return bool(answer)

    def summary(self, max_points: int) -> dict[str, Any]:
        """The last step, its loss, and the curve of each measure: (last step, mean) of several equal ranges of steps.

        Each value was measured over a global batch before its step. The loss of a fine-tune is in nats per response
        token.
        """
        ranges = np.array_split(np.arange(len(self._history)), min(max_points, len(self._history)))
        history = np.array(self._history)
        curves = {
            name: [[int(steps[-1]) + 1, float(history[steps, column].mean())] for steps in ranges]
            for column, name in enumerate(self._objective.measures)
        }
        return {"step": self._step, "loss": self._history[-1][0], "by_step": curves}

    def save_state(self, folder: Path) -> None:
        """Write trained weights, optimiser and position, for `load_state` after parallel.py's `add_checksums`."""
        self._strategy.save(folder, self._optimizer, Position(self._step, self._history))

    def load_state(self, folder: Path) -> None:
        """Continue after the step of a saved state; called on every rank. IntegrityError if the state is damaged."""
        position = self._strategy.load(folder, self._optimizer)
        self._step, self._history = position.step, position.history
        log.info("continuing after step %d of %d", self._step, self._total)

    def gathered_weights(self) -> Weights | None:
        """The weights for `save_reference`; called on every rank. None: the model's own."""
        return self._strategy.gathered()

    def _train_batch(self, batch: Batch) -> tuple[list[float], float]:
        """Take one optimiser step; returns the global batch's measures, the loss first, and the gradient's norm."""
        config = self._config
        torch.manual_seed(seed_from("dropout", config.seed, batch.step, self._rank))
        measured = self.backward(batch.rows)
        norm = self._strategy.clip_gradients(config.max_grad_norm)
        if not math.isfinite(measured[0]) or not math.isfinite(norm):
            raise TrainingError(
                f"the loss is {measured[0]} and the gradient's norm {norm} at step {batch.step}; "
                f"lower --finetune.learning_rate (now {config.learning_rate}) or look at the data of that step"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(batch.step, self._total, config.warmup_ratio)
        self._optimizer.step()
        self._strategy.zero_gradients(self._optimizer)
        return measured, norm

    def backward(self, rows: npt.NDArray[np.int64]) -> list[float]:
        """Accumulate the gradient of (summed loss / weight) over a global batch; returns its measures, the loss first.

        Called on every rank.
        """
        objective = self._objective
        weight = objective.weight(rows)
        turns = deal(objective.lengths[rows], objective.ids[rows], self._budget, self._world_size)
        totals_K = torch.zeros(len(objective.measures), dtype=torch.float64, device=self._device)
        for at, packs in enumerate(turns, start=1):
            mine = packs[self._rank]
            # A rank without a pack repeats another's with weight 0: ranks must run equally often.
            share = 0.0 if mine is None else 1.0
            packed = rows[next(other for other in packs if other is not None) if mine is None else mine]
            self._strategy.exchange_gradients(at == len(turns))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                nll_R: torch.Tensor = self._module(objective.pack(packed))
            sums_K = share * objective.sums(nll_R, packed)
            # Gradients are averaged over ranks, but their sum over the global batch is needed.
            (sums_K[0] * (self._world_size / weight)).backward()  # type: ignore[no-untyped-call]
            totals_K += sums_K.detach().double()
        if self._world_size > 1:
            dist.all_reduce(totals_K)
        return [total / weight for total in totals_K.tolist()]
