"""The model of a fine-tune: a checkpoint prepared for training, and saved as a checkpoint again."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from davir_ray.config.training import FinetuneConfig
from davir_ray.models.adapter import add_adapter
from davir_ray.models.checkpoint import Checkpoint, quiet
from davir_ray.models.device import uses_autocast
from davir_ray.models.hub import hub_offline
from davir_ray.models.kernel.likelihood import Likelihood
from davir_ray.models.kernel.self_check import self_check
from davir_ray.models.training.parallel import Weights


def trainable(
    base: Checkpoint, config: FinetuneConfig, dtype: torch.dtype, device: torch.device, *, dropout: bool
) -> Likelihood:
    """The base, checked, with a new adapter if configured; modules that text does not reach are frozen."""
    likelihood = Likelihood(base.model(dtype, device))
    self_check(likelihood, autocast=uses_autocast(config.precision, device), gradients=True)
    if not dropout:
        switch_off_dropout(likelihood.model)
    if config.lora_rank is not None:
        add_adapter(likelihood.model, config, config.lora_rank)
    freeze_what_text_does_not_reach(likelihood.model)
    return likelihood


def freeze_what_text_does_not_reach(model: PreTrainedModel) -> None:
    """Freeze a vision tower and the like: data-parallel training would wait forever for their gradients."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    reached = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Set all dropout of the model to 0; an adapter that is added later has its own.

    As in TRL, preference training compares the policy with a frozen policy that has no dropout.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # passed to attention in each call
                setattr(module, name, 0.0)


def save_reference(likelihood: Likelihood, tokenizer: Any, folder: Path, weights: Weights | None = None) -> None:
    """Write the model as a Hugging Face folder, or its adapter as a peft folder: safetensors and tokenizer.

    `weights` are the gathered weights of a sharded model.
    """
    if weights is None and getattr(likelihood.model, "_hf_peft_config_loaded", False):
        # If the adapter is on the head or an embedding, peft would also save the base's own weights of it.
        weights = {name: value for name, value in likelihood.model.state_dict().items() if ".base_layer." not in name}
    with quiet(), hub_offline():
        likelihood.model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
