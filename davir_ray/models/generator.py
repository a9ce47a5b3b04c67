"""Greedy generation in one worker: prompts in, texts out, by transformers' own `generate`.

An ordinary class: the same object serves a unit test, a notebook and a Ray actor.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.device import DeviceKind, device_name, resolve_dtype, worker_device
from davir_ray.models.memory import TokenBudget
from davir_ray.models.scorer import tokenised
from davir_ray.schema import GENERATIONS, Status

log = logging.getLogger(__name__)

INPUT_COLUMNS = ["example_id", "source", "input_ids", "response_spans"]
"""Columns of examples that generation reads."""

GENERATION_VERSION = 1
"""Increased when a change here may change a text; part of the stage's fingerprint."""

TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 131072}
"""Default token budget of a batch, prompts and new tokens together: the size that the key-value cache grows to (16 GiB
for 131072 tokens of an 8B Llama in bfloat16)."""

Prompt = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """Settings that the texts depend on, besides the model."""

    max_new_tokens: int
    device: DeviceKind = "cpu"
    gpu_share: float = 1.0
    """Of a GPU that several workers share."""
    precision: str = "auto"
    tokens_per_batch: int | None = None
    num_threads: int = 1
    """Number of CPU threads that the process computes with; another number may change the last bits."""
    turn_end: int | None = None
    """A token that ends a text in addition to the checkpoint's: the one that the chat template writes after a turn."""


class Generated(NamedTuple):
    """The continuation of one prompt."""

    tokens: list[int]
    """New tokens, without the end-of-sequence token."""
    finished: bool
    """Whether an end-of-sequence token ended it, rather than the limit."""


class Generator:
    """Holds a model, or a base with an adapter on it, and continues the prompts of tables of examples.

    Decoding is greedy: each step takes the token with the largest logit, whatever the checkpoint's generation settings
    say about sampling, penalties or lengths. If two logits differ only by a rounding error, either may be taken;
    batches depend on the table and the settings alone, so the same table gives the same texts.
    """

    def __init__(self, model: Checkpoint, settings: GeneratorSettings, base: Checkpoint | None = None) -> None:
        """`base` is needed if the model is an adapter."""
        torch.set_num_threads(settings.num_threads)
        device = worker_device(settings.device, settings.gpu_share)
        dtype = resolve_dtype(settings.precision, device)
        self._settings = settings
        self._tokenizer = (base if model.is_adapter and base is not None else model).tokenizer()
        self._model = load(model, base, dtype, device)
        self.stops_at = end_tokens(self._model, self._tokenizer, settings.turn_end)
        # Replaces the checkpoint's own configuration, from which `generate` would take further settings.
        self._model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=self.stops_at or None,
            pad_token_id=pad_token(self._tokenizer, self.stops_at),
        )
        self._budget = TokenBudget(settings.tokens_per_batch or TOKENS_PER_BATCH[device.type])
        self.numerics = {
            "version": GENERATION_VERSION,
            "device": device.type,
            "device_name": device_name(device),
            "weights": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "attention": self._model.config._attn_implementation,
            "stops_at": self.stops_at,
        }
        log.info("generating with %s", self.numerics)

    def __call__(self, examples: pa.Table) -> pa.Table:
        """Continue every prompt of a table with INPUT_COLUMNS; returns GENERATIONS, in the same row order."""
        prompts = prompts_of(examples)
        found = self.generate(prompts, np.asarray(examples["example_id"]))
        # Clean-up, which some tokenizers do by default, would write "3.5" for "3 .5".
        texts = self._tokenizer.batch_decode(
            [one.tokens if one else [] for one in found], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        columns = {
            "example_id": examples["example_id"],
            "source": examples["source"],
            "output": [text if one else None for one, text in zip(found, texts, strict=True)],
            "num_new_tokens": [len(one.tokens) + one.finished if one else None for one in found],
            "finished": [one.finished if one else None for one in found],
            "status": [
                Status.OK if one else Status.OUT_OF_MEMORY if len(prompt) else Status.NO_PREDICTOR
                for prompt, one in zip(prompts, found, strict=True)
            ],
        }
        return pa.table(columns, schema=GENERATIONS)

    def generate(self, prompts: Sequence[Prompt], ids: npt.NDArray[np.int64]) -> list[Generated | None]:
        """The continuation of each prompt; None if the prompt is empty or does not fit the device even alone.

        Batches are sorted by length; `ids` break ties.
        """
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        room = np.full(len(prompts), self._settings.max_new_tokens, dtype=np.int64)  # new tokens for each prompt
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None:
            room = np.clip(positions - lengths, 0, room)
        found: list[Generated | None] = [None] * len(prompts)
        for row in np.flatnonzero((room == 0) & (lengths > 0)):
            found[row] = Generated([], False)
        # All prompts have the same limit, except those that leave fewer of the model's positions.
        for limit in np.unique(room[(lengths > 0) & (room > 0)]):
            rows = np.flatnonzero((lengths > 0) & (room == limit))
            batches = self._budget.run(partial(self._continue, prompts, int(limit)), rows, lengths + limit, ids)
            for batch, new_BN in batches:
                for row, new in zip(batch, new_BN.tolist(), strict=True):
                    end = next((at for at, token in enumerate(new) if token in self.stops_at), None)
                    found[row] = Generated(new[:end], end is not None)
        return found

    @torch.inference_mode()
    def _continue(self, prompts: Sequence[Prompt], limit: int, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """New tokens of some prompts, padded on the right. Prompts are padded on the left, so that all end together."""
        batch = [prompts[row] for row in rows]
        width = max(len(prompt) for prompt in batch)
        ids_BT = torch.full((len(batch), width), int(self._model.generation_config.pad_token_id))
        mask_BT = torch.zeros((len(batch), width), dtype=torch.long)
        for row, prompt in enumerate(batch):
            ids_BT[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask_BT[row, width - len(prompt) :] = 1
        device = self._model.device
        full_BT: Any = self._model.generate(
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), max_new_tokens=limit
        )
        return torch.as_tensor(full_BT[:, width:]).cpu()


def load(model: Checkpoint, base: Checkpoint | None, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with its family's own attention; for an adapter, its base with the adapter switched on."""
    if not model.is_adapter:
        return model.model(dtype, device, attention=None)
    assert base is not None, "an adapter needs its base"
    loaded = base.model(dtype, device, attention=None)
    model.attach_to(loaded)
    return loaded


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turn_end: int | None = None) -> list[int]:
    """Tokens that end a text: those of the checkpoint's configurations, of its tokenizer, and the end of a turn."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = [named] if isinstance(named, int) else list(named or [])
    return sorted({int(token) for token in [*ends, tokenizer.eos_token_id, turn_end] if token is not None})


def pad_token(tokenizer: PreTrainedTokenizerBase, stops_at: list[int]) -> int:
    """A token to pad batches with: masked before a prompt and ignored after an end."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else [*stops_at, 0][0])


def prompts_of(examples: pa.Table) -> list[Prompt]:
    """The tokens of each example before its first scored token; all of them if none is scored."""
    return [input_ids[: spans[0]] if spans else input_ids for input_ids, spans in tokenised(examples)]
