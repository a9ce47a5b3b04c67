"""The models that a GPU is tried with, with random weights: small ones of each family, and shapes of real ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from davir_ray.models.kernel.attention import PACKED_ATTENTION, register_packed_attention

Sequences = list[tuple[npt.NDArray[np.int32], tuple[int, ...]]]

_SMALL: dict[str, Any] = {
    "vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.08,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama, heads of 64": {"model_type": "llama", **_SMALL},
    "llama, heads of 128": {"model_type": "llama", "head_dim": 128, **_SMALL},
    "qwen2": {"model_type": "qwen2", **_SMALL},
    "qwen3, heads of 128": {"model_type": "qwen3", "head_dim": 128, **_SMALL},
    "mistral, window 64": {"model_type": "mistral", "sliding_window": 64, **_SMALL},
    "gemma3, heads of 256, window 64": {
        "model_type": "gemma3_text", "head_dim": 256, "sliding_window": 64, **_SMALL
    },
    "gemma, heads of 256": {"model_type": "gemma", "head_dim": 256, **_SMALL},
    "gemma2, soft cap": {"model_type": "gemma2", "head_dim": 64, "sliding_window": 64, **_SMALL},
    "phi3, heads of 96": {
        "model_type": "phi3", **_SMALL, "hidden_size": 768, "num_key_value_heads": 4, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": 1,
    },
}  # fmt: skip
"""Small models whose attention takes each of the GPU's paths."""

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "Gemma-2-2B": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "sliding_window": 4096,
    },
}  # fmt: skip
"""Shapes of models whose speed is measured."""

_TINY = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def make(
    shape: dict[str, Any], dtype: torch.dtype, device: torch.device, *, tiny: bool, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights; tiny: much smaller, where only the script is tried."""
    register_packed_attention()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**(shape | (_TINY if tiny else {})))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION, dtype=dtype)
    return model.to(device).eval()


def draw(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> Sequences:
    """Random sequences of these lengths, two thirds of each scored."""
    tokens = np.random.default_rng(seed)
    return [(tokens.integers(2, vocabulary, n, dtype=np.int32), (max(1, n // 3), n)) for n in lengths]


def draw_like_alpaca(num_rows: int, vocabulary: int, seed: int = 0) -> Sequences:
    """Random sequences of the lengths of Alpaca's rows: 126 tokens on average, of which 43 % are scored."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(126) - 0.18, 0.6, num_rows), 8, 512).astype(int)
    return [(random.integers(2, vocabulary, n, dtype=np.int32), (n - max(1, int(0.43 * n)), n)) for n in lengths]
