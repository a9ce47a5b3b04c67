"""Rendering and tokenising chats compared with the tokenizer alone on the same texts, in one process and one thread."""

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from davir_ray.benchmarks.measure import describe_machine, in_turn
from davir_ray.config.checks import check
from davir_ray.config.sources import Source
from davir_ray.data.chat import ChatTemplate
from davir_ray.data.conversation import Message
from davir_ray.data.reader import BATCH_ROWS, ExampleReader
from davir_ray.data.records import LeftOut, Record, Reject
from davir_ray.data.tokens import Encoder
from davir_ray.demo.base import train_tokenizer
from davir_ray.errors import ConfigError, DataError
from davir_ray.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

TEMPLATES = ("qwen2_5", "llama3", "qwen3", "gemma4_v5")
"""Templates of TRL that are measured if none is named: short ones and long ones."""

_CPU = torch.device("cpu")
_MAX_TOKENS = 2**30
_TRAINING_CHATS = 2000
_NUM_WORDS, _NUM_SYLLABLES = 20_000, 400
_SHARE_OF_SYSTEM = 0.3
_TURNS, _QUESTION_WORDS, _ANSWER_WORDS, _SENTENCE_WORDS = (2, 3), (10, 60), (100, 300), (5, 20)
"""Smallest and largest numbers, all equally likely."""

_SPECIAL_TOKEN = re.compile(r"<\|[\w:/-]+\|?>|<\w+\|>|<(?:start|end)_of_\w+>")
"""What the trained tokenizer encodes as one special token, where the template names it."""


@dataclass(frozen=True, kw_only=True)
class ChatsBenchmark:
    """Compare rendering and tokenising generated chats, as prepare does it, with the tokenizer alone on the texts that
    transformers writes for them, and with writing these texts.

    A chat has two or three turns of each role, the answers have 100 to 300 words. One process and one thread; without
    options it takes two hours and 2 GB of memory.
    """

    json: str | None = None
    """File for the result."""
    chats: int = 100_000
    """Number of chats."""
    base: str | None = None
    """Base model whose tokenizer and chat template are measured: a folder or a hub name."""
    templates: list[str] = field(default_factory=list)
    """Chat templates to measure without a base, with a tokenizer trained on the chats: names of TRL's, or files. Empty:
    qwen2_5, llama3, qwen3 and gemma4_v5 of TRL."""
    vocab_size: int = 32_000
    """Size of the vocabulary of the trained tokenizer."""
    repeats: int = 5
    """Number of runs of each method; the methods take turns, and medians are reported."""

    def __post_init__(self) -> None:
        if self.base is not None and self.templates:
            raise ConfigError("both base and templates are given; give at most one of the two")
        for name, least in {"chats": 1, "vocab_size": 300, "repeats": 1}.items():
            check(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")


def run(settings: ChatsBenchmark) -> dict[str, Any]:
    """Measure every template; returns the contents of the JSON file. Raises ConfigError for an unknown template."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the workers of prepare, which have one CPU each
    templates = {} if settings.base else {name: _template(name) for name in settings.templates or TEMPLATES}
    chats = list(_generate(settings.chats))
    if settings.base is None:
        tokenizers = _trained(templates, chats, settings.vocab_size)
    else:
        tokenizers = {settings.base: Checkpoint.find(settings.base).tokenizer()}
    machine = describe_machine(_CPU, torch.float32)
    return {
        "settings": asdict(settings),
        "machine": machine | {name: metadata.version(name) for name in ("tokenizers", "jinja2")},
        "templates": {
            name: _measure(name, tokenizer, chats, settings.repeats) for name, tokenizer in tokenizers.items()
        },
    }


def _measure(name: str, tokenizer: Any, chats: list[list[Message]], repeats: int) -> dict[str, Any]:
    log.info("benchmark: the chat template %s", name)
    reader = ExampleReader(
        Encoder(tokenizer, _MAX_TOKENS), ChatTemplate.from_tokenizer(tokenizer, None), keep_record=True
    )
    records = [Record("chats", row, {"messages": messages}) for row, messages in enumerate(chats)]
    num_tokens = {"davir_ray": _prepare(reader, records[:BATCH_ROWS])}  # first, as it says what a template refuses
    texts = [_written(tokenizer, messages) for messages in chats]
    num_tokens["tokenizer"] = _encode(tokenizer, texts[:BATCH_ROWS])
    methods: dict[str, Callable[[], object]] = {
        "davir_ray": lambda: _prepare(reader, records),
        "tokenizer": lambda: _encode(tokenizer, texts),
        "template": lambda: [len(_written(tokenizer, messages)) for messages in chats],
    }
    seconds, _ = in_turn(methods, repeats, _CPU)
    return {
        "characters": sum(map(len, texts)),
        "tokens_of_first_batch": num_tokens,
        "seconds": seconds,
        "ratio": seconds["davir_ray"] / seconds["tokenizer"],
        "ratio_of_template_alone": seconds["template"] / seconds["tokenizer"],
    }


def _prepare(reader: ExampleReader, records: list[Record]) -> int:
    """Turn the records into rows of examples/; returns the number of tokens. DataError for a chat that is refused."""
    num_tokens = 0
    for item in reader.convert(Source(name="benchmark", path="chats", format="messages"), records):
        if isinstance(item, Reject | LeftOut):
            raise DataError(f"a generated chat is refused: {item}; give another template")
        num_tokens += sum(len(row["input_ids"]) for row in item)
    return num_tokens


def _encode(tokenizer: Any, texts: list[str]) -> int:
    """Encode the texts by the same calls as Encoder; returns the number of tokens."""
    options = {"add_special_tokens": False, "split_special_tokens": False, "return_attention_mask": False}
    num_tokens = 0
    for start in range(0, len(texts), BATCH_ROWS):
        encoding = tokenizer(texts[start : start + BATCH_ROWS], **options, verbose=False)
        num_tokens += sum(map(len, encoding["input_ids"]))
    return num_tokens


def _written(tokenizer: Any, messages: list[Message]) -> str:
    """What transformers writes for a chat."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _trained(templates: Mapping[str, str], chats: list[list[Message]], vocab_size: int) -> dict[str, Any]:
    """For each template a tokenizer with it, its special tokens and the vocabulary of the first chats."""
    contents = (message["content"] for messages in chats[:_TRAINING_CHATS] for message in messages)
    trained = train_tokenizer(contents, vocab_size, pad=None)
    tokenizers = {}
    for name, template in templates.items():
        tokenizers[name] = copy.deepcopy(trained)
        special = sorted(set(_SPECIAL_TOKEN.findall(template)))
        tokenizers[name].add_special_tokens({"additional_special_tokens": special})
        tokenizers[name].chat_template = template
    return tokenizers


def _template(name: str) -> str:
    """The text of a template file, or of one that TRL ships."""
    spec = find_spec("trl")
    folders = [Path(place, "chat_templates") for place in (spec and spec.submodule_search_locations) or ()]
    for file in (Path(name), *(folder / f"{name}.jinja" for folder in folders)):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    place = f"in {folders[0]}" if folders else "in TRL, which is not installed (davir_ray[test])"
    raise ConfigError(f"templates has {name!r}, which is neither a file nor {place}; correct it, or give --base")


def _generate(count: int) -> Iterator[list[Message]]:
    """Chats of made-up words, a few of which are frequent and most rare, as in any language."""
    draw = np.random.default_rng(0)
    sounds = [list("bcdfghklmnprstvw"), ["a", "e", "i", "o", "u", "ea", "ou"], ["", "n", "r", "s", "t", "l", "nd"]]
    syllables = ["".join(draw.choice(sound) for sound in sounds) for _ in range(_NUM_SYLLABLES)]
    words = np.array(["".join(draw.choice(syllables, num)) for num in draw.integers(1, 4, _NUM_WORDS)])
    weights = 1 / (np.arange(_NUM_WORDS) + 2.7)  # Zipf's law, with Mandelbrot's constant
    edges = np.cumsum(weights / weights.sum())

    def between(limits: tuple[int, int]) -> int:
        return int(draw.integers(limits[0], limits[1], endpoint=True))

    def prose(num_words: int) -> str:
        drawn = words[np.searchsorted(edges[:-1], draw.random(num_words))].tolist()
        sentences = []
        while drawn:
            length = between(_SENTENCE_WORDS)
            sentences.append(" ".join(drawn[:length]).capitalize() + (".\n\n" if draw.random() < 0.15 else ". "))
            drawn = drawn[length:]
        return "".join(sentences).strip()

    for _ in range(count):
        messages = [{"role": "system", "content": prose(20)}] if draw.random() < _SHARE_OF_SYSTEM else []
        for _ in range(between(_TURNS)):
            messages.append({"role": "user", "content": prose(between(_QUESTION_WORDS))})
            messages.append({"role": "assistant", "content": prose(between(_ANSWER_WORDS))})
        yield messages
