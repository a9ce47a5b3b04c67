"""Tokenizers: a digest that identifies one, and a check that two of them encode text alike."""

import importlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from davir_ray.errors import ModelError
from davir_ray.run.files import digest


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides how text is encoded: vocabulary, merges, normalisation, special tokens."""
    added = sorted((i, str(token), token.special) for i, token in tokenizer.added_tokens_decoder.items())
    return digest([_encoding(tokenizer), added, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}])


def class_name(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Where transformers defines the class of a tokenizer, as module:class; None for code that comes with a model."""
    found = type(tokenizer)
    return f"{found.__module__}:{found.__qualname__}" if found.__module__.startswith("transformers.") else None


def class_named(name: str | None) -> type[Any] | None:
    """The class of that `class_name`; None if this version of transformers has none."""
    module, _, qualname = (name or "").partition(":")
    if not module.startswith("transformers."):
        return None
    try:
        found = getattr(importlib.import_module(module), qualname, None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def check_same_encoding(
    base: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, names: tuple[str, str]
) -> None:
    """Raise ModelError unless both encode text in the same way; added special tokens and chat templates may differ."""
    if _encoding(base) != _encoding(reference) or _added_words(base) != _added_words(reference):
        raise ModelError(
            f"{names[0]} and {names[1]} do not encode alike (vocabulary, merges or normalisation differ), so their "
            "losses are over different tokens; give a reference that was fine-tuned from this base"
        )
    for token in ("bos_token", "eos_token"):
        ours, theirs = getattr(base, token), getattr(reference, token)
        if ours != theirs:
            raise ModelError(f"{names[0]} has {token} {ours!r} and {names[1]} has {theirs!r}; they must be the same")


def _added_words(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    """Added tokens that plain text can spell; special ones it cannot."""
    return sorted((i, str(token)) for i, token in tokenizer.added_tokens_decoder.items() if not token.special)


def _encoding(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of how text becomes ids, without added tokens and chat templates."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest(sorted(tokenizer.get_vocab().items()))
    parts = json.loads(backend.to_str())
    return digest([parts.get(name) for name in ("model", "normalizer", "pre_tokenizer")])
