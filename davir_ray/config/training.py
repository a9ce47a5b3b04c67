"""Settings of the fine-tune."""

from dataclasses import dataclass
from typing import Literal

from davir_ray.config.checks import check_fields

SAVE_MEMORY = (
    "give --finetune.lora_rank 16, --finetune.strategy fsdp with more --finetune.num_workers, or a lower "
    "--prepare.max_tokens"
)
"""What to change where an example does not fit a device while training."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The fine-tune of the reference. Defaults: Stanford Alpaca's recipe, as the paper does not state its own."""

    epochs: int = 3
    """Passes over the examples."""
    max_steps: int | None = None
    """Number of optimiser steps, instead of epochs: as many passes as they need, the last one incomplete. None: train
    for epochs."""
    batch_size: int = 128
    """Examples in a global batch, over all workers; each batch is one optimiser step."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate warms up linearly; cosine decay to 0 follows."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """The gradient's norm is clipped to this."""
    seed: int = 0
    """Seed of the data order (with the epoch) and of dropout (with the step)."""
    tokens_per_pack: int | None = None
    """Token budget of one forward and backward pass; gradients accumulate over a batch's packs. None: by device."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: a third more compute for a fraction of the memory. None: if
    they are estimated not to fit a GPU, or no estimate can be made; on CPUs, whose packs are small, never."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto is bfloat16 autocast over float32 weights where the device has it, else float32."""
    num_workers: int | None = None
    """Data-parallel workers (Ray Train). The steps are the same for any number. None: as many as the cluster has GPUs,
    with folds an equal share of them, 1 without GPUs and for each fine-tune of a comparison."""
    strategy: Literal["ddp", "fsdp"] | None = None
    """ddp: each worker holds weights, gradients and AdamW's moments, 16 bytes per parameter. fsdp: these are sharded
    over the workers (FSDP2), for models that do not fit one GPU. The steps are the same. None: ddp if it is
    estimated to fit nine tenths of the cluster's smallest GPU, else fsdp if there are several workers; ddp on CPUs, and
    where the estimate cannot be made."""
    num_cpus: int = 1
    """CPUs of one worker, and its number of threads where it trains on them."""
    use_gpu: bool | None = None
    """Give each worker one GPU. None: true if the cluster has any."""
    checkpoint_every_minutes: float | None = 10.0
    """Minutes between checkpoints; more where saving one, without its upload, takes longer than a twentieth of them.
    After a worker or the driver was killed, training continues from the last. None: by steps alone."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints, besides those by minutes. None: by minutes alone."""
    max_failures: int = 3
    """Number of times that Ray Train restarts lost workers before it gives up."""
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank instead of all weights; needs about ten times the learning rate. None: all
    weights."""
    lora_alpha: int | None = None
    """The adapter's scale is this divided by its rank. None: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout of the adapter's input."""
    lora_targets: str = "all-linear"
    """Modules with an adapter: all-linear (every linear layer but the head), or a regular expression for full names."""
    export_epochs: bool = False
    """Also write the model after each epoch, to reference_epochs/<epoch>/ (reference_folds_epochs/<fold>/<epoch>/)."""

    def __post_init__(self) -> None:
        counts = ["epochs", "max_steps", "batch_size", "tokens_per_pack", "num_workers", "num_cpus"]
        counts += ["checkpoint_every_steps", "lora_rank", "lora_alpha"]
        check_fields(self, "finetune.", counts, lambda count: count >= 1, "at least 1")
        above_0 = ["learning_rate", "max_grad_norm", "checkpoint_every_minutes"]
        shares = ["lora_dropout", "warmup_ratio"]
        check_fields(self, "finetune.", above_0, lambda value: value > 0, "above 0")
        check_fields(self, "finetune.", shares, lambda share: 0 <= share < 1, "from 0 to below 1")
        from_0 = ["weight_decay", "seed", "max_failures"]
        check_fields(self, "finetune.", from_0, lambda value: value >= 0, "0 or more")
