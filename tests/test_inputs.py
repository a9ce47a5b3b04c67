"""Every token of a tokenizer has a row in the embedding of each model, or it is said before any weight is loaded."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.rank import RankOptions
from davir_ray.config.run import RunConfig
from davir_ray.config.selection import Part, SelectConfig
from davir_ray.config.sources import Format, Source
from davir_ray.config.yaml import dump, load
from davir_ray.data.records import Record
from davir_ray.errors import ConfigError, ModelError
from davir_ray.inputs import check_base, check_reference, with_formats
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.size import num_ids
from davir_ray.stages.prepare import Preparation

SOURCES = [Source(name="s", path="s.jsonl", format="prompt_response")]


def preparation_of(base: Path) -> Preparation:
    return Preparation(base=Checkpoint.find(str(base)), config=PrepareConfig(max_tokens=64))


def check(base: Path, reference: Path | None = None) -> None:
    preparation = preparation_of(base)
    check_base(preparation, SOURCES)
    if reference is not None:
        check_reference(Checkpoint.find(str(reference)), preparation, SOURCES)


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


def add_tokens(folder: Path, **tokens: Any) -> PreTrainedTokenizerFast:
    """Add tokens to a folder's tokenizer, and leave its model as it is."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


ADDED = {
    "chatml": ({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}, "'<|im_start|>' with the id 1024 and 1"),
    "pad": ({"pad_token": "[PAD]"}, "'[PAD]' with the id 1024,"),
}


@pytest.mark.parametrize("name", ADDED)
def test_a_token_without_a_row_is_named_for_base_and_reference(
    folder: Path, base_folder: Path, reference_folder: Path, tmp_path: Path, name: str
) -> None:
    tokens, told = ADDED[name]
    reference = Path(shutil.copytree(reference_folder, tmp_path / "reference"))
    for place in (folder, reference):
        tokenizer = add_tokens(place, **tokens)
        model = AutoModelForCausalLM.from_pretrained(place)
        with pytest.raises(IndexError):  # what a run would die of
            model(torch.tensor([[len(tokenizer) - 1]]))
        with pytest.raises(ModelError) as caught:
            check(place) if place == folder else check(base_folder, place)
        assert f"the tokenizer of {place} has the token {told}" in str(caught.value)
        assert f"{place} has 1024 embedding rows; resize it" in str(caught.value)
        assert f"resize_token_embeddings({len(tokenizer)})" in str(caught.value)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(place)
        check(place) if place == folder else check(base_folder, place)


def test_more_rows_than_tokens_are_fine_and_a_smaller_reference_is_not(
    folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(1024 + 64)
    model.save_pretrained(folder)
    check(folder)
    check(base_folder, folder)
    add_tokens(folder, additional_special_tokens=["<|a|>"])
    check(folder)
    with pytest.raises(ModelError, match=rf"tokenizer of {folder} has the token '<.a.>'.* but {base_folder} has 1024"):
        check(folder, base_folder)


def test_a_placeholder_for_images_which_no_text_spells_needs_no_row(folder: Path) -> None:
    """As gemma-3-1b has it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": "<image>"})
    assert tokenizer.convert_tokens_to_ids("<image>") == 1024
    tokenizer.save_pretrained(folder)
    check(folder)
    row = Record("", 0, {"prompt": "an <image>", "response": "<image>!"})
    (example,) = preparation_of(folder).reader(SOURCES).convert(SOURCES[0], iter([row]))
    assert isinstance(example, tuple)
    assert max(example[0]["input_ids"]) < 1024


def tied(folder: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(folder)


def with_pictures(folder: Path) -> None:
    text = {"vocab_size": 333, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.parametrize("make", [tied, with_pictures])
def test_rows_are_those_of_the_saved_weights(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (rows,) = {weights[name].shape[0] for name in weights if name.endswith(("wte.weight", "embed_tokens.weight"))}
    assert num_ids(Checkpoint.find(str(tmp_path))) == rows


ADAPTERS = {
    "head": {"modules_to_save": ["lm_head"]},
    "both ends": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora of an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "lora of the head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_a_resized_base_needs_that_base(
    folder: Path, base_folder: Path, tmp_path: Path, name: str
) -> None:
    for rows in (1024, 1026):
        model = LlamaForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(rows)
        get_peft_model(model, LoraConfig(r=2, **ADAPTERS[name])).save_pretrained(tmp_path / f"{rows}")
    check(base_folder, tmp_path / "1024")
    told = rf"1026 has (lm_head|model\.embed_tokens)\S* of shape .*1026.*, but {base_folder} has \[1024, 64\]"
    with pytest.raises(ModelError, match=told):
        check(base_folder, tmp_path / "1026")
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(1026)
    model.save_pretrained(folder)
    check(folder, tmp_path / "1026")


# --- the format of the data ------------------------------------------------------------------------------------------


def test_a_found_format_gives_the_settings_of_the_format_given(tmp_path: Path) -> None:
    """Its name, and so every id, and what config.yaml remembers, are those of the same command with --format."""
    (tmp_path / "a.csv").write_text("instruction,output\nAdd.,2\n")
    place = {"output": str(tmp_path / "run"), "base": "b", "data": str(tmp_path / "a.csv")}
    given, files = with_formats(RunConfig(**place, format="alpaca"))
    assert with_formats(RunConfig(**place)) == (given, files)
    assert given == RunConfig(**place, format="alpaca")
    assert load(RunConfig, dump(given)) == given
    assert [source.name for source in given.all_sources()] == ["alpaca"]
    named = RunConfig(output="o", base="b", sources=[Source(name="mine", path=place["data"])])
    assert with_formats(named)[0].sources == [Source(name="mine", path=place["data"], format="alpaca")]


def test_a_mixture_is_checked_when_the_source_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    place = {"output": str(tmp_path / "run"), "base": "b", "data": str(tmp_path / "a.jsonl")}
    good, bad = (SelectConfig(mixture=[Part(source=name, all=True)]) for name in ("gsm8k", "alpaca"))
    assert with_formats(RunConfig(**place, select=good))[0].format == "gsm8k"
    with pytest.raises(ConfigError, match="alpaca"):
        with_formats(RunConfig(**place, select=bad))


def test_a_file_without_a_format_serves_to_rank_again(tmp_path: Path) -> None:
    own = RunConfig(
        output="o", base="b", sources=[Source(name="a", path="x", format="gsm8k")], select=SelectConfig(top_k=2)
    )
    stated: dict[str, Any] = {"base": "b", "sources": [{"name": "a", "path": "x"}]}
    options = RankOptions.of({"output": "o", "select.top_k": 3, **stated}, {})
    assert options.applied_to(own).select.top_k == 3
    other = RankOptions.of({"output": "o", "base": "b", "sources": [{"name": "a", "path": "y"}]}, {})
    with pytest.raises(ConfigError, match="sources is"):
        other.applied_to(own)
    data = RunConfig(output="o", base="b", data="x", format="gsm8k", select=SelectConfig(top_k=2))
    assert RankOptions.of({"output": "o", "data": "x", "format": "auto"}, {}).applied_to(data) == data


def test_templates_are_needed_where_data_become_turns(base_folder: Path) -> None:
    """The base of the tests has no template."""
    preparation = preparation_of(base_folder)
    always: list[Format] = ["sharegpt", "lima", "orca", "messages"]
    on_request: list[Format] = ["prompt_completion", "preference", "flan", "dolly"]
    for form in always:
        with pytest.raises(ModelError, match="no chat template"):
            check_base(preparation, [Source(name="s", path="p", format=form)])
    for form in on_request:
        check_base(preparation, [Source(name="s", path="p", format=form)])
        with pytest.raises(ModelError, match="no chat template"):
            check_base(
                replace(preparation, config=PrepareConfig(max_tokens=64, chat=True)),
                [Source(name="s", path="p", format=form)],
            )
