"""Adapters (peft): a reference that consists of the base's own weights and a small difference, switched on and off.

An adapter is never merged: in bfloat16 a merge rounds the base's weights, which could not be restored exactly.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from safetensors import SafetensorError, safe_open

from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError, ModelError
from davir_ray.formulas.hashing import seed_from
from davir_ray.text import one_line

if TYPE_CHECKING:  # both take seconds to import, and a driver that only looks at an adapter needs neither
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_NAME = "reference"
_MERGE = "merge it into a model (peft's merge_and_unload) and give that"

_DESCRIPTIVE = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out",
}  # fmt: skip
_SUPPORTED = {
    "LORA": _DESCRIPTIVE | {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform",
        "layers_pattern", "lora_bias", "ensure_weight_tying", "eva_config",
    },
    "IA3": _DESCRIPTIVE | {"feedforward_modules", "init_ia3_weights"},
}  # fmt: skip
"""The kinds of adapters that are known to give peft's losses and to leave the base unchanged when switched off, with
their settings that may have any value. All other settings must have peft's defaults."""

_SUPPORTED_VALUES = {
    "task_type": (None, "CAUSAL_LM"),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
"""Further values that these settings may have. Other initialisations of an adapter rewrite the base's weights."""


def add_adapter(model: PreTrainedModel, config: FinetuneConfig, rank: int) -> None:
    """Put a new adapter of this rank into a model and freeze everything else.

    ConfigError if no module matches the targets. The new weights are float32 whatever the base's type, because the
    optimiser's steps are small.
    """
    import torch
    from peft import LoraConfig  # imported late: scoring full references does not need peft

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
        targets = f"finetune.lora_targets {config.lora_targets!r}"
        raise ConfigError(f"{targets} does not suit this model: {one_line(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an adapter. ModelError if they cannot be read."""
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    except ValueError as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / ADAPTER_CONFIG} holds no adapter settings")
    return settings


def attach_adapter(model: PreTrainedModel, folder: str) -> None:
    """Load an adapter into the model it was trained on, switched on.

    ModelError if it does not fit, is of an unsupported kind, or contains weights that would replace the base's.
    """
    settings = read_settings(Path(folder))
    check_kind(settings, folder)
    named = settings.get("base_model_name_or_path")
    # Another base of the same shape would give meaningless losses.
    if named and Path(named).name != Path(model.name_or_path).name:
        log.warning("the adapter %s was trained on %s; the base here is %s", folder, named, model.name_or_path)
    before = {_base_name(name): _Weight.of(value) for name, value in model.named_parameters(remove_duplicate=False)}
    try:
        info = model.load_adapter(folder, adapter_name=_NAME)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the adapter {folder} cannot be loaded: {one_line(error, 400)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := getattr(info, problem):
            raise ModelError(
                f"the adapter {folder} does not fit the base: {problem.replace('_', ' ')} such as {min(map(str, keys))}"
            )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weight = before.get(_base_name(name))
        if weight is not None and weight.differs(parameter):
            raise ModelError(f"the adapter {folder} would replace the base's own {name}; {_MERGE}")
    model.eval()


def detach_adapter(model: PreTrainedModel) -> None:
    """Remove the adapter; what is left of its layers computes what the base does."""
    model.delete_adapter(_NAME)


@contextmanager
def adapter_switched_off(model: PreTrainedModel) -> Iterator[None]:
    """Switch the adapter off for the block, bitwise back to the base. A model without an adapter stays as it is."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    # Not transformers' own enable_adapters: it leaves modules_to_save switched off.
    parts = [part for part in model.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for part in parts:
        part.enable_adapters(False)
    try:
        yield
    finally:
        for part in parts:
            part.enable_adapters(True)


def check_kind(settings: dict[str, Any], uri: str) -> None:
    """Raise ModelError unless an adapter with these settings gives peft's losses and can be switched off."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = str(settings.get("peft_type", "unknown"))
    if kind not in _SUPPORTED:
        raise ModelError(
            f"the adapter {uri} is of the kind {kind}, and only {', '.join(_SUPPORTED)} are supported; {_MERGE}"
        )
    defaults = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]().to_dict()
    for name, value in settings.items():
        switched_off = (defaults[name],) if name in defaults else (None, False)
        if name in _SUPPORTED[kind] or value in _SUPPORTED_VALUES.get(name, switched_off):
            continue
        raise ModelError(f"the adapter {uri} has {name}: {json.dumps(value)}, which is not supported; {_MERGE}")


def check_shapes(folder: Path, shapes: dict[str, torch.Size], base: str) -> None:
    """Raise ModelError if a weight of an adapter does not fit the base's shape, as after a resize of the embeddings."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} is damaged or not a safetensors file: {error}") from error
    for key, shape in found.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        module, _, part = name.partition(".lora_")
        expected = shapes.get(f"{module}.weight" if part else module, shape)
        if part.startswith("embedding_A"):
            fits = shape[1] == expected[0]
        elif part.startswith("B"):
            fits = shape[0] in expected  # the rows, which are the columns of a Conv1D
        else:
            fits = bool(part) or shape == expected
        if not fits:
            raise ModelError(
                f"the adapter {folder} has {name} of shape {list(shape)}, but {base} has {list(expected)}; give the "
                "base that it was trained on, with the embeddings resized as they were then"
            )


def _base_name(name: str) -> str:
    """The name that a parameter of the base has in a model that never had an adapter."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


class _Weight(NamedTuple):
    """A weight of the base, with the address and version that show whether it was written to."""

    parameter: torch.nn.Parameter
    address: int
    version: int

    @classmethod
    def of(cls, parameter: torch.nn.Parameter) -> Self:
        return cls(parameter, parameter.data_ptr(), parameter._version)

    def differs(self, now: torch.nn.Parameter) -> bool:
        """Whether the weight has another value now; a parameter that replaced it may be a copy of it."""
        if now is self.parameter:
            return (now.data_ptr(), now._version) != (self.address, self.version)
        return now.dtype != self.parameter.dtype or not now.equal(self.parameter)
