"""Small models of the families that are tried, and examples to score with them."""

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from davir_ray.models.kernel.attention import PACKED_ATTENTION

VOCABULARY = 100
WINDOW = 7
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"sliding_window": WINDOW}
TWO_KINDS = WINDOWED | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}
PACKABLE: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": WINDOWED,
    "Gemma": SMALL | {"num_key_value_heads": 1, "head_dim": 16},
    "Gemma2": TWO_KINDS | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0},
    "Gemma3Text": TWO_KINDS,
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 16},
    "Phi": SMALL,
    "GPT2": GPT2,
    "GPTNeoX": SMALL,
    "Granite": GROUPED | {"logits_scaling": 8.0, "attention_multiplier": 0.5, "residual_multiplier": 0.5},
    "Cohere": GROUPED,
    "Olmo": GROUPED,
    "Olmo2": GROUPED,
    "Mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}
EXPERTS = ("Mixtral", "Qwen3Moe")
"""Their grouped matrix product has no float64 (torch 2.13)."""
UNPACKABLE: dict[str, dict[str, Any]] = {
    "GptOss": GROUPED | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": WINDOW},
    "Bloom": {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
}

Example = tuple[npt.NDArray[np.int32], tuple[int, ...]]


def config_of(family: str) -> PretrainedConfig:
    config: PretrainedConfig = getattr(transformers, f"{family}Config")(**(PACKABLE | UNPACKABLE)[family])
    return config


def make(config: PretrainedConfig) -> PreTrainedModel:
    """A random model with a sharpened head, and with no bias at 0 and no norm at 1, where a mistake would not show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=PACKED_ATTENTION).eval()
    sharpness = 8 / (getattr(config, "logit_scale", None) or 1) * (getattr(config, "logits_scaling", None) or 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
        for parameter in model.get_output_embeddings().parameters():
            parameter *= sharpness
    return model


def draw_examples() -> list[Example]:
    draw = np.random.default_rng(1)
    shapes = [(4, (1, 4)), (9, (4, 9)), (9, (2, 9)), (30, (5, 9, 11, 30)), (2, (1, 2)), (9, (8, 9))]
    return [(draw.integers(0, VOCABULARY, length, dtype=np.int32), spans) for length, spans in shapes]
