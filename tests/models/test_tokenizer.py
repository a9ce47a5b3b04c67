"""Tokenizers: which of them encode alike, and what changes the digest of one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from davir_ray.errors import ModelError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.tokenizer import check_same_encoding, class_name, class_named, tokenizer_digest

NAMES = ("base", "reference")


def remake(tokenizer: PreTrainedTokenizerFast, change: Callable[[dict[str, Any]], None], **tokens: str) -> Any:
    """The same tokenizer after a change to its JSON."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | tokens
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **special)


def unchanged(_: dict[str, Any]) -> None:
    pass


def swap_merges(parts: dict[str, Any]) -> None:
    merges = parts["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def add_lowercasing(parts: dict[str, Any]) -> None:
    parts["normalizer"] = {"type": "Lowercase"}


def split_digits(parts: dict[str, Any]) -> None:
    parts["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, parts["pre_tokenizer"]],
    }


def test_an_added_padding_token_and_a_chat_template_are_accepted(tokenizer: PreTrainedTokenizerFast) -> None:
    other = remake(tokenizer, unchanged)
    other.add_special_tokens({"pad_token": "[PAD]"})
    other.chat_template = "{{ messages }}"
    check_same_encoding(tokenizer, other, NAMES)


@pytest.mark.parametrize("change", [swap_merges, add_lowercasing, split_digits])
def test_another_encoding_is_refused(
    tokenizer: PreTrainedTokenizerFast, change: Callable[[dict[str, Any]], None]
) -> None:
    other = remake(tokenizer, change)
    with pytest.raises(ModelError, match="base and reference do not encode alike"):
        check_same_encoding(tokenizer, other, NAMES)
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_another_begin_or_end_token_is_refused(tokenizer: PreTrainedTokenizerFast, role: str) -> None:
    other = remake(tokenizer, unchanged, **{role: "<pad>"})
    with pytest.raises(ModelError, match=role):
        check_same_encoding(tokenizer, other, NAMES)
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


def test_the_tokenizer_digest_is_that_of_the_same_tokenizer_loaded_again(
    tokenizer: PreTrainedTokenizerFast, base_folder: Path
) -> None:
    assert tokenizer_digest(Checkpoint.find(str(base_folder)).tokenizer()) == tokenizer_digest(tokenizer)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_a_tokenizer_of_a_known_class_is_the_one_that_transformers_finds(
    base_folder: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(base_folder, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    base = Checkpoint.find(str(tmp_path / "base"))
    found = base.tokenizer()
    again = base.tokenizer(class_name(found))
    assert type(again) is type(found)
    assert tokenizer_digest(again) == tokenizer_digest(found)
    assert again.backend_tokenizer.to_str() == found.backend_tokenizer.to_str()
    for text in ("Say x.", " two  spaces\n", "</s> 12"):
        assert again.encode(text) == found.encode(text)


@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_that_changes_how_text_is_encoded_changes_the_digest(
    tokenizer: PreTrainedTokenizerFast, special: bool
) -> None:
    other = remake(tokenizer, unchanged)
    other.add_tokens(["return"], special_tokens=special)
    assert other("return x")["input_ids"] != tokenizer("return x")["input_ids"]
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


@pytest.mark.parametrize(
    "name", [None, "", "transformers", "transformers.nothing:Tokenizer", "transformers.utils:nothing", "os:getcwd"]
)
def test_a_class_that_is_not_there_is_none(name: str | None) -> None:
    """As in a run that another version of transformers has written: the tokenizer's class is found anew."""
    assert class_named(name) is None


def test_a_class_is_found_by_its_name(tokenizer: PreTrainedTokenizerFast) -> None:
    name = class_name(tokenizer)
    assert name is not None
    assert class_named(name) is type(tokenizer)
    assert class_named("transformers.utils:logging") is None, "a module is no class"
