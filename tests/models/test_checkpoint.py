"""Checkpoints: what is refused, what is identified, which tokenizers belong together."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedTokenizerFast

from davir_ray.errors import ModelError
from davir_ray.formulas.ranking import seed_from
from davir_ray.models.attention import PACKED_ATTENTION
from davir_ray.models.checkpoint import (
    SPEC_FILE,
    Checkpoint,
    check_same_encoding,
    resolve_dtype,
    tokenizer_digest,
)

NAMES = ("base", "reference")


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(base_folder, tmp_path / "model"))


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


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_for_packs_in_evaluation_mode(folder: Path) -> None:
    checkpoint = Checkpoint.find(str(folder))
    model = checkpoint.model(torch.float32, torch.device("cpu"))
    assert not model.training
    assert model.config._attn_implementation == PACKED_ATTENTION
    assert model.dtype == torch.float32
    assert checkpoint.tokenizer().eos_token == "</s>"
    assert checkpoint.config().hidden_size == 64


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_a_folder_of_pickled_weights_is_refused(folder: Path, pickled: str) -> None:
    (folder / "model.safetensors").rename(folder / pickled)
    with pytest.raises(ModelError, match="safetensors"):
        Checkpoint.find(str(folder))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        Checkpoint.find(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "~/nowhere-at-all", "a/b/c"])
def test_what_looks_like_a_path_is_never_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        Checkpoint.find(name)


def test_a_hub_name_is_pinned_to_the_commit_seen_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def answer(name: str, **options: object) -> SimpleNamespace:
        asked.append(options.get("revision"))
        return SimpleNamespace(_commit_hash="abc")

    monkeypatch.setattr(AutoConfig, "from_pretrained", answer)
    checkpoint = Checkpoint.find("org/model")
    checkpoint.config()
    assert (checkpoint.revision, asked) == ("abc", [None, "abc"])
    assert checkpoint.weights_digest() == {"commit": "abc"}


def test_a_checkpoint_without_some_weights_is_refused_instead_of_filled_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    renamed = {f"module.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks"):
        Checkpoint.find(str(folder)).model(torch.float32, torch.device("cpu"))


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.txt"
    file.write_text("no model")
    with pytest.raises(ModelError, match="is no folder"):
        Checkpoint.find(str(file))


def test_a_folder_without_a_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        Checkpoint.find(str(folder))


@pytest.mark.parametrize("content", ["{", '{"model_type": "no-such-model"}'])
def test_a_configuration_that_means_nothing_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Checkpoint.find(str(folder)).config()


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\x08" + bytes(7) + b"{}"])
def test_damaged_weights_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Checkpoint.find(str(folder)).model(torch.float32, torch.device("cpu"))


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Checkpoint.find(str(folder)).model(torch.float32, torch.device("cpu"))


def test_a_folder_in_object_storage_is_copied_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAVIR_RAY_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/models-{tmp_path.name}/{file.name}", file.read_bytes())
    uri = f"memory://models-{tmp_path.name}"
    first, second = Checkpoint.find(uri), Checkpoint.find(uri)
    assert first == second
    for checkpoint in (first, second):
        checkpoint.model(torch.float32, torch.device("cpu"))
    (copied,) = [path for path in (tmp_path / "cache" / "checkpoints").iterdir() if path.is_dir()]
    assert {f.name: f.read_bytes() for f in copied.iterdir()} == {f.name: f.read_bytes() for f in folder.iterdir()}
    memory.rm(f"/models-{tmp_path.name}/config.json")
    with pytest.raises(ModelError, match=r"config\.json"):
        Checkpoint.find(uri)


# --- identity --------------------------------------------------------------------------------------------------------


def test_the_weights_digest_changes_with_one_byte_of_the_weights(folder: Path) -> None:
    checkpoint = Checkpoint.find(str(folder))
    before = checkpoint.weights_digest()
    assert before.keys() == {"model.safetensors", "config.json"}
    assert checkpoint.weights_digest() == before
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    after = checkpoint.weights_digest()
    assert after["model.safetensors"] != before["model.safetensors"]
    assert after["config.json"] == before["config.json"]


def test_the_weights_digest_does_not_depend_on_the_place(folder: Path, base_folder: Path) -> None:
    assert Checkpoint.find(str(folder)).weights_digest() == Checkpoint.find(str(base_folder)).weights_digest()


def test_models_of_different_seeds_have_different_digests(base_folder: Path, reference_folder: Path) -> None:
    digests = [Checkpoint.find(str(f)).weights_digest()["model.safetensors"] for f in (base_folder, reference_folder)]
    assert digests[0] != digests[1]


def test_the_scoring_spec_travels_with_a_reference(folder: Path) -> None:
    checkpoint = Checkpoint.find(str(folder))
    assert checkpoint.spec() is None
    (folder / SPEC_FILE).write_text('{"max_tokens": 512}')
    assert checkpoint.spec() == {"max_tokens": 512}


# --- tokenizers ------------------------------------------------------------------------------------------------------


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
    tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    assert tokenizer_digest(Checkpoint.find(str(folder)).tokenizer()) == tokenizer_digest(tokenizer)


@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_that_changes_how_text_is_encoded_changes_the_digest(
    tokenizer: PreTrainedTokenizerFast, special: bool
) -> None:
    other = remake(tokenizer, unchanged)
    other.add_tokens(["return"], special_tokens=special)
    assert other("return x")["input_ids"] != tokenizer("return x")["input_ids"]
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError):
        Checkpoint.find(str(folder)).tokenizer()


# --- seeds and types -------------------------------------------------------------------------------------------------


def test_seeds_are_stable_distinct_and_below_two_to_the_63() -> None:
    assert seed_from("dropout", 0, 1, 0) == seed_from("dropout", 0, 1, 0)
    seeds = {seed_from("dropout", seed, step, rank) for seed in range(5) for step in range(20) for rank in range(3)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_auto_is_float32_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert [resolve_dtype(name, cpu) for name in ("float32", "bfloat16", "float64")] == [
        torch.float32,
        torch.bfloat16,
        torch.float64,
    ]
