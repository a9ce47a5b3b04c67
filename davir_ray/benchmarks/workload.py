"""The workload of the benchmarks: a model, and real or random examples for it."""

import copy
import gzip
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from davir_ray.config.sources import Format, Source
from davir_ray.data.files import list_files, plan_tasks
from davir_ray.data.reader import ExampleReader, ExampleRows
from davir_ray.data.records import LeftOut, Reject
from davir_ray.data.tokens import Encoder
from davir_ray.demo.base import train_tokenizer
from davir_ray.errors import ConfigError, DataError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel.attention import PACKED_ATTENTION, register_packed_attention
from davir_ray.schema import EXAMPLES

log = logging.getLogger(__name__)

SMALL_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
"""The model that the goals in RESULTS.md refer to."""

_TEST_FILE = "alpaca_9k.jsonl.gz"
_MEAN_LENGTH, _LENGTH_SPREAD, _RESPONSE_SHARE = 126, 0.6, 0.43
"""Statistics of Alpaca: mean number of tokens, standard deviation of its logarithm, share of the response."""


@dataclass(frozen=True)
class Example:
    """A tokenised example, as both our kernel and the rivals score it."""

    input_ids: npt.NDArray[np.int32]
    spans: tuple[int, ...]

    @property
    def num_scored(self) -> int:
        """Number of scored tokens."""
        return sum(self.spans[1::2]) - sum(self.spans[::2])


def num_tokens(examples: Sequence[Example]) -> int:
    """Number of tokens of all examples."""
    return sum(len(example.input_ids) for example in examples)


def load_model(
    model: str | None, random_init: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Any]:
    """A checkpoint and its tokenizer, or a model with random weights and no tokenizer; its attention takes packs."""
    if model is not None:
        checkpoint = Checkpoint.find(model)
        return checkpoint.model(dtype, device), checkpoint.tokenizer()
    register_packed_attention()
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(_config(random_init), attn_implementation=PACKED_ATTENTION, dtype=dtype)
    return made.to(device).eval(), None


def plain_copy(model: PreTrainedModel, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of the model that runs with an attention implementation of transformers."""
    plain: PreTrainedModel = copy.deepcopy(model)
    if plain.dtype != dtype:  # .to() would also round the rotary frequencies, which stay in float32
        plain = plain.to(dtype)
    plain.set_attn_implementation(attention)
    if dtype == torch.float64 and plain._can_set_experts_implementation():
        plain.set_experts_implementation("eager")  # grouped matrix products do not support float64
    return plain.eval()


def _config(random_init: str | None) -> PretrainedConfig:
    """A configuration from JSON text, from a JSON file, or from anything that AutoConfig accepts."""
    if random_init is None:
        return AutoConfig.for_model(**SMALL_LLAMA)
    try:
        if random_init.lstrip().startswith("{"):
            fields = json.loads(random_init)
        elif random_init.endswith(".json"):
            fields = json.loads(Path(random_init).read_bytes())
        else:
            return AutoConfig.from_pretrained(random_init)
        if "model_type" not in fields:
            raise ConfigError(f"random_init has no model_type; it has {sorted(fields)}")
        return AutoConfig.for_model(**fields)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"random_init {random_init!r} is not the configuration of a model: {reason}") from error


def load_examples(
    rows: int,
    max_tokens: int,
    vocab_size: int,
    tokenizer: Any,
    data: str | None,
    data_format: Format,
    lengths: Sequence[int],
) -> tuple[list[Example], str]:
    """The examples, and a phrase that says where they come from: the data, given lengths, or lengths like Alpaca's."""
    if lengths:
        return _drawn(list(np.resize(np.array(lengths), rows)), vocab_size), f"random tokens, lengths {list(lengths)}"
    if data is None and (folder := os.environ.get("DAVIR_TEST_DATA")) and Path(folder, _TEST_FILE).exists():
        data = str(Path(folder, _TEST_FILE))
    if data is not None:
        return _real(data, data_format, rows, max_tokens, vocab_size, tokenizer), data
    log.warning("no --data and no DAVIR_TEST_DATA: random tokens are scored, with lengths drawn like those of Alpaca")
    draw = np.random.default_rng(0)
    centre = np.log(_MEAN_LENGTH) - _LENGTH_SPREAD**2 / 2
    sizes = np.clip(draw.lognormal(centre, _LENGTH_SPREAD, rows).astype(int), 16, max_tokens)
    return _drawn(sizes.tolist(), vocab_size), "random tokens, lengths drawn like those of Alpaca"


def _drawn(lengths: list[int], vocab_size: int) -> list[Example]:
    draw = np.random.default_rng(1)
    return [
        Example(
            draw.integers(0, vocab_size, length, dtype=np.int32),
            (max(1, round(length * (1 - _RESPONSE_SHARE))), int(length)),
        )
        for length in lengths
    ]


def _real(data: str, data_format: Format, rows: int, max_tokens: int, vocab_size: int, tokenizer: Any) -> list[Example]:
    """The first rows that can be scored."""
    prepared = prepared_rows(data, data_format, max_tokens, tokenizer or trained_tokenizer(data, vocab_size))
    examples = (
        Example(np.array(row["input_ids"], np.int32), tuple(row["response_spans"]))
        for found in prepared
        for row in found
        if row["response_spans"] and row["response_spans"][0] > 0
    )
    found = list(islice(examples, rows))
    if len(found) < rows:
        raise DataError(f"{data} has {len(found)} rows that can be scored; lower --rows (now {rows})")
    return found


def prepared_rows(data: str, data_format: Format, max_tokens: int, tokenizer: Any) -> Iterator[ExampleRows]:
    """The records that can be prepared, as one example or a pair of them, read by the same code as in a run."""
    source = Source(name="benchmark", path=data, format=data_format)
    slices = [part for task in plan_tasks(list_files(source), 2**62) for part in task]
    reader = ExampleReader(Encoder(tokenizer, max_tokens), None, keep_record=False)
    return (item for item in reader.read(source, slices, None) if not isinstance(item, Reject | LeftOut))


def trained_tokenizer(data: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the data itself, for a model of random weights, which has none."""
    with gzip.open(data, "rt", encoding="utf-8") if data.endswith(".gz") else open(data, encoding="utf-8") as lines:
        return train_tokenizer(lines, vocab_size, pad=None)


def as_shard(examples: Sequence[Example], first_id: int) -> pa.Table:
    """The examples as a shard of examples/, with consecutive ids from `first_id`."""
    rows = [
        {
            "example_id": number,
            "content_hash": number,
            "source": "benchmark",
            "input_ids": example.input_ids,
            "response_spans": example.spans,
            "num_prompt_tokens": len(example.input_ids) - example.num_scored,
            "num_response_tokens": example.num_scored,
            "truncated": False,
        }
        for number, example in enumerate(examples, first_id)
    ]
    return pa.Table.from_pylist(rows, EXAMPLES)
