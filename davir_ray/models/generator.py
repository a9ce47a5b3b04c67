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
from davir_ray.models.device import device_name, local_device, resolve_dtype
from davir_ray.models.memory import TokenBudget
from davir_ray.schema import GENERATIONS, Status

log = logging.getLogger(__name__)

INPUT_COLUMNS = ["example_id", "source", "input_ids", "response_spans"]
"""Columns of examples that generation reads."""

GENERATION_VERSION = 1
"""Raised when a change here may change a text; part of the stage's fingerprint."""

TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 131072}
"""Token budget of a batch unless the settings say otherwise: prompts and all new tokens, which the cache of keys and
values grows to (16 GiB for 131072 tokens of an 8B Llama in bfloat16)."""

Prompt = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """What the texts depend on beside the model."""

    max_new_tokens: int
    precision: str = "auto"
    tokens_per_batch: int | None = None
    num_threads: int = 1
    """Threads of the process on a CPU: another number may change the last bits."""
    turn_end: int | None = None
    """A token that ends a text beside those of the checkpoint: what the chat template puts behind a turn."""


class Generated(NamedTuple):
    """The continuation of one prompt."""

    tokens: list[int]
    """New tokens, without the one that ended it."""
    finished: bool
    """Ended by an end-of-sequence token, not by the limit."""


class Generator:
    """Holds a model, or a base with an adapter on it, and continues the prompts of tables of examples.

    Greedy: at each step the token with the largest logit, whatever the checkpoint's generation settings say of
    sampling, penalties or lengths. Of two logits that differ by a rounding either may win: batches are a function of
    the table and the settings alone, so the same table gives the same texts.
    """

    def __init__(self, model: Checkpoint, settings: GeneratorSettings, base: Checkpoint | None = None) -> None:
        """`base` is wanted where the model is an adapter."""
        torch.set_num_threads(settings.num_threads)
        device = local_device()
        dtype = resolve_dtype(settings.precision, device)
        self._settings = settings
        self._tokenizer = (base if model.is_adapter and base is not None else model).tokenizer()
        self._model = load(model, base, dtype, device)
        self.stops_at = end_tokens(self._model, self._tokenizer, settings.turn_end)
        # A configuration of our own: `generate` would take what this one leaves open from the checkpoint's.
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
        # Cleaning up, which some tokenizers do unless told, would write "3.5" for "3 .5".
        texts = self._tokenizer.batch_decode(
            [one.tokens if one else [] for one in found], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        columns = {
            "example_id": examples["example_id"],
            "source": examples["source"],
            "output": [text if one else None for one, text in zip(found, texts, strict=True)],
            "num_new_tokens": [len(one.tokens) + one.finished if one else None for one in found],
            "finished": [one.finished if one else None for one in found],
            "status": [_status(prompt, one) for prompt, one in zip(prompts, found, strict=True)],
        }
        return pa.table(columns, schema=GENERATIONS)

    def generate(self, prompts: Sequence[Prompt], ids: npt.NDArray[np.int64]) -> list[Generated | None]:
        """The continuation of each prompt; None where it is empty, or does not fit the device even alone.

        `ids` break ties in the order of batches.
        """
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        room = self._room(lengths)
        found: list[Generated | None] = [None] * len(prompts)
        for row in np.flatnonzero((room == 0) & (lengths > 0)):
            found[row] = Generated([], False)
        # One turn, unless a prompt leaves less of the model's positions than the limit.
        for limit in np.unique(room[(lengths > 0) & (room > 0)]):
            rows = np.flatnonzero((lengths > 0) & (room == limit))
            batches = self._budget.run(partial(self._continue, prompts, int(limit)), rows, lengths + limit, ids)
            for batch, new_BN in batches:
                for row, new in zip(batch, new_BN.tolist(), strict=True):
                    found[row] = _until_end(new, self.stops_at)
        return found

    def _room(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """New tokens that each prompt may get."""
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        most = np.full(len(lengths), self._settings.max_new_tokens, dtype=np.int64)
        return most if positions is None else np.clip(positions - lengths, 0, most)

    @torch.inference_mode()
    def _continue(self, prompts: Sequence[Prompt], limit: int, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """New tokens of some prompts, padded on the right; the prompts are padded on the left, so all end together."""
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
    """The model with its family's usual attention; an adapter on its base, switched on."""
    if not model.is_adapter:
        return model.model(dtype, device, attention=None)
    assert base is not None, "an adapter needs its base"
    loaded = base.model(dtype, device, attention=None)
    model.attach_to(loaded)
    return loaded


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turn_end: int | None = None) -> list[int]:
    """Tokens that end a text: those of the checkpoint's generation_config or config, the tokenizer's, a turn's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = [named] if isinstance(named, int) else list(named or [])
    return sorted({int(token) for token in [*ends, tokenizer.eos_token_id, turn_end] if token is not None})


def pad_token(tokenizer: PreTrainedTokenizerBase, stops_at: list[int]) -> int:
    """A token to fill batches with: masked before a prompt, and never looked at behind an end."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else [*stops_at, 0][0])


def prompts_of(examples: pa.Table) -> list[Prompt]:
    """The tokens of each example up to what is scored first; all of them where nothing is."""
    ids, spans = (examples[name].combine_chunks() for name in ("input_ids", "response_spans"))
    values, edges = np.asarray(ids.values), np.asarray(ids.offsets)
    ends = [span[0] if span else None for span in spans.to_pylist()]
    return [values[edges[row] : edges[row + 1]][:end] for row, end in enumerate(ends)]


def _until_end(new: list[int], stops_at: list[int]) -> Generated:
    """New tokens up to the first that ends the text."""
    end = next((place for place, token in enumerate(new) if token in stops_at), None)
    return Generated(new[:end], end is not None)


def _status(prompt: Prompt, generated: Generated | None) -> Status:
    if generated is not None:
        return Status.OK
    return Status.OUT_OF_MEMORY if len(prompt) else Status.NO_PREDICTOR
