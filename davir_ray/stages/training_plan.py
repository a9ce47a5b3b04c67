"""How a fine-tune is laid out on the cluster: its workers, its strategy, and whether it recomputes activations.

On GPUs these follow from the memory that the fine-tune is estimated to take and from that of the smallest GPU. Steps
are the same with any plan, except for rounding.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from davir_ray.config.training import SAVE_MEMORY, FinetuneConfig
from davir_ray.engine.ray_train import room_for_workers, trains_on_gpus, with_workers
from davir_ray.engine.resources import room_for, smallest_gpu
from davir_ray.errors import ModelError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.text import format_bytes

if TYPE_CHECKING:  # torch's code for training takes seconds to import, which a driver on CPUs need not wait
    from davir_ray.models.training.memory import TrainedModel, TrainingMemory

log = logging.getLogger(__name__)

_USABLE = 0.9
"""Share of a GPU's memory that a plan may take; the rest is for the CUDA context, NCCL and fragmentation."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A plan, and the memory that it follows from."""

    config: FinetuneConfig
    """The settings with number of workers, device, strategy and recomputation."""
    memory: TrainingMemory | None = None
    """None: it is not known, or was not needed."""
    capacity: int | None = None
    """Bytes of the smallest GPU. None: not known, or the fine-tune is on CPUs."""

    @property
    def fits(self) -> bool:
        """Whether it fits the smallest GPU, as far as that is known."""
        return self.memory is None or self.capacity is None or self.memory.total <= _USABLE * self.capacity

    def warn_if_too_large(self) -> None:
        """Say what to change where the fine-tune does not fit."""
        if not self.fits and self.memory is not None and self.capacity is not None:
            log.warning(
                "the fine-tune needs about %s on each GPU, and the smallest has %s; packs are halved until they fit, "
                "and if none does, %s", format_bytes(self.memory.total), format_bytes(self.capacity), SAVE_MEMORY,
            )  # fmt: skip

    def __str__(self) -> str:
        config, memory = self.config, self.memory
        device = "GPU" if config.use_gpu else "CPU worker"
        plan = f"{config.strategy} on {config.num_workers} {device}{'s' * (config.num_workers != 1)}"
        plan += ", recomputing activations" if config.gradient_checkpointing else ", keeping activations"
        if memory is None:
            return f"{plan}; the memory that it takes is not known"
        summands = ", ".join(f"{name} {format_bytes(size)}" for name, size in vars(memory).items() if size)
        of = f" of {format_bytes(self.capacity)}" if self.capacity else ""
        return f"{plan}; {format_bytes(memory.total)}{of} on each ({summands})"


def plan_training(base: Checkpoint, config: FinetuneConfig, *, with_memory: bool = False) -> TrainingPlan:
    """The plan of a fine-tune on this cluster, as far as the settings leave it open.

    Its memory is estimated where something depends on it, or if it is asked for.
    """
    config = with_workers(config)
    is_open = config.use_gpu and (config.strategy is None or config.gradient_checkpointing is None)
    if not config.use_gpu:
        kept = bool(config.gradient_checkpointing)
        config = replace(config, strategy=config.strategy or "ddp", gradient_checkpointing=kept)
    if not (is_open or with_memory):
        return TrainingPlan(config=config)
    from davir_ray.models.training.memory import TrainedModel  # imported late: see above

    gpu = smallest_gpu() if config.use_gpu else None
    has_bfloat16 = bool(config.use_gpu) if gpu is None else gpu.has_bfloat16
    model = TrainedModel(base, config, "cuda" if config.use_gpu else "cpu", has_bfloat16=has_bfloat16)
    plan = choose(model, config, gpu and gpu.num_bytes)
    if not with_memory:
        plan.warn_if_too_large()
        log.info("the fine-tune's plan: %s", plan)
    return plan


def share_plan(base: Checkpoint, config: FinetuneConfig, num_trainings: int) -> tuple[FinetuneConfig, int]:
    """The settings of each of several trainings that share the cluster, and how many run at a time.

    On GPUs each gets an equal share, but at least one, and more where it would not fit so few. With workers of a given
    number, and on CPUs, where each has one, as many run as fit; one CPU is left for what starts them.
    """
    use_gpu = trains_on_gpus(config)
    if not use_gpu:
        room = room_for(config.num_cpus, 0)
        num_workers = config.num_workers or 1
    else:
        room = room_for_workers(config.num_cpus, use_gpu=True)
        num_workers = config.num_workers or max(1, room // num_trainings)
        while config.num_workers is None and num_workers < room:
            if plan_training(base, replace(config, num_workers=num_workers), with_memory=True).fits:
                break
            num_workers = min(room, 2 * num_workers)
    at_once = max(1, min(num_trainings, room // num_workers))
    return replace(config, use_gpu=use_gpu, num_workers=num_workers), at_once


def choose(model: TrainedModel, config: FinetuneConfig, capacity: int | None) -> TrainingPlan:
    """The first plan that fits a GPU of `capacity` bytes.

    ddp comes before fsdp, and with either what keeps activations before what recomputes them. The last plan is taken if
    none fits: the workers halve their packs until they fit. Activations are recomputed if the capacity or the memory of
    the passes is not known.
    """
    num_workers = config.num_workers or 1
    strategies: list[Literal["ddp", "fsdp"]] = ["ddp", "fsdp"] if num_workers > 1 else ["ddp"]
    strategies = [config.strategy] if config.strategy else strategies
    choices = [False, True] if config.gradient_checkpointing is None else [config.gradient_checkpointing]
    if capacity is None:
        strategies, choices = strategies[:1], choices[-1:]
    options = [(strategy, recompute) for strategy in strategies for recompute in choices]
    safest = replace(config, strategy=strategies[0], gradient_checkpointing=choices[-1])
    plan = TrainingPlan(config=safest, capacity=capacity)
    for strategy, recompute in options:
        try:
            state = model.state(strategy=strategy, num_workers=num_workers)
            safest = replace(safest, strategy=strategy)
            if capacity and state.total > _USABLE * capacity and (strategy, recompute) != options[-1]:
                continue
            memory = model.memory(strategy=strategy, num_workers=num_workers, recompute=recompute)
        except ModelError as error:  # it cannot be sharded, or its passes cannot be tried
            log.warning("the memory of the fine-tune is not known: %s", error)
            return TrainingPlan(config=safest, capacity=capacity)
        plan = replace(plan, config=replace(safest, gradient_checkpointing=recompute), memory=memory)
        if plan.fits:
            return plan
    return plan
