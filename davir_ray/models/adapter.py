"""LoRA adapters (peft): a reference that is the base's own weights and a small difference, switched off and on.

Never merged: in bfloat16 a merge rounds the base's weights, and the base could not be had back bit for bit.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from davir_ray.config import FinetuneConfig
from davir_ray.errors import ConfigError, ModelError
from davir_ray.formulas.ranking import seed_from

log = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_NAME = "reference"
_REWRITES_THE_BASE = ("pissa", "olora", "corda", "loftq")


def add_adapter(model: PreTrainedModel, config: FinetuneConfig, rank: int) -> None:
    """Put a new adapter of this rank into a model and freeze everything else.

    ConfigError where no module matches the targets. The new weights are float32 whatever the base's type, for the
    optimiser's small steps.
    """
    from peft import LoraConfig  # late: scoring full references does without peft

    torch.manual_seed(seed_from("lora", config.seed))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=config.lora_alpha or 2 * rank,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets,
        base_model_name_or_path=model.name_or_path,
    )
    try:
        model.add_adapter(lora, adapter_name=_NAME)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"finetune.lora_targets {config.lora_targets!r} does not suit this model: {reason}"
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def attach_adapter(model: PreTrainedModel, folder: str) -> None:
    """Load an adapter into the model it was trained on, switched on.

    ModelError if it does not fit, or is of a kind that changes the base's own weights when it is loaded.
    """
    settings = json.loads(Path(folder, ADAPTER_CONFIG).read_bytes())
    _check_kind(settings, folder)
    _compare_names(model, settings.get("base_model_name_or_path"), folder)
    try:
        info = model.load_adapter(folder, adapter_name=_NAME)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"the adapter {folder} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := getattr(info, problem):
            raise ModelError(
                f"the adapter {folder} does not fit the base: {problem.replace('_', ' ')} such as {min(map(str, keys))}"
            )
    model.eval()


@contextmanager
def adapter_switched_off(model: PreTrainedModel) -> Iterator[None]:
    """The base as if no adapter had ever been attached, bit for bit; nothing to do where none was."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def _check_kind(settings: dict[str, Any], folder: str) -> None:
    """Refuse what switching off does not undo, and what transformers 5.23 cannot load."""
    start = settings.get("init_lora_weights")
    problems = {
        "it trains the base's own biases": settings.get("bias") not in (None, "none"),
        f"{start} rewrites the base's weights": isinstance(start, str) and start.startswith(_REWRITES_THE_BASE),
        "DoRA is not supported": bool(settings.get("use_dora")),
        "trainable_token_indices are not supported": bool(settings.get("trainable_token_indices")),
    }
    for problem, is_so in problems.items():
        if is_so:
            raise ModelError(f"the adapter {folder} cannot be switched off and on: {problem}; merge it into a model")


def _compare_names(model: PreTrainedModel, named: str | None, folder: str) -> None:
    """Warn where the adapter names another base: of the same shape it would load, and score nonsense."""
    if named and Path(named).name != Path(model.name_or_path).name:
        log.warning("the adapter %s was trained on %s; the base here is %s", folder, named, model.name_or_path)
