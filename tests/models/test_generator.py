"""Generation: the same tokens as a plain loop without a cache, for any batch and order; it ends where it must."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from davir_ray.config.training import FinetuneConfig
from davir_ray.models.adapter import add_adapter
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.generator import INPUT_COLUMNS, Generator, GeneratorSettings, prompts_of
from davir_ray.schema import EXAMPLES, GENERATIONS

NEW = 12
PROMPTS = [np.random.default_rng(seed).integers(3, 1024, length, dtype=np.int32) for seed, length in
           enumerate([1, 2, 3, 3, 7, 12, 12, 31, 40, 5, 1])]  # fmt: skip


def generator(folder: Path, **settings: int) -> Generator:
    values = {"max_new_tokens": NEW, **settings}
    return Generator(Checkpoint.find(str(folder)), GeneratorSettings(precision="float32", **values))


def plain_loop(folder: Path, prompt: np.ndarray, most: int, ends: Sequence[int]) -> tuple[list[int], bool]:
    """The largest logit of a whole forward, again and again: no cache, no batch, no padding."""
    return plain_loop_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), prompt, most, ends)


def plain_loop_of(model: torch.nn.Module, prompt: np.ndarray, most: int, ends: Sequence[int]) -> tuple[list[int], bool]:
    ids = [int(token) for token in prompt]
    for _ in range(most):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


def ids_of(prompts: Sequence[np.ndarray]) -> np.ndarray:
    return np.arange(len(prompts), dtype=np.int64)


def test_the_tokens_are_those_of_a_plain_loop_for_any_batch_and_order(base_folder: Path) -> None:
    expected = [plain_loop(base_folder, prompt, NEW, [1]) for prompt in PROMPTS]
    for budget in (1, 60, 100_000):
        found = generator(base_folder, tokens_per_batch=budget).generate(PROMPTS, ids_of(PROMPTS))
        assert [tuple(one) for one in found if one] == expected
    order = np.random.default_rng(7).permutation(len(PROMPTS))
    shuffled = [PROMPTS[place] for place in order]
    found = generator(base_folder).generate(shuffled, ids_of(PROMPTS)[::-1])
    assert [tuple(one) for one in found if one] == [expected[place] for place in order]


def test_it_ends_at_every_end_token_of_the_checkpoint_and_samples_nothing(base_folder: Path, tmp_path: Path) -> None:
    """Ends that occur: the fourth new token of two prompts."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "model"))
    free = generator(folder).generate(PROMPTS, ids_of(PROMPTS))
    ends = sorted({one.tokens[3] for one in free[4:6] if one})
    settings = {"eos_token_id": ends, "do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0,
                "max_length": 2, "min_new_tokens": NEW, "num_beams": 3}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(settings))
    stopping = generator(folder)
    assert stopping.stops_at == sorted({1, *ends})
    found = stopping.generate(PROMPTS, ids_of(PROMPTS))
    expected = [plain_loop(base_folder, prompt, NEW, stopping.stops_at) for prompt in PROMPTS]
    assert [tuple(one) for one in found if one] == expected
    assert len(found[4].tokens) <= 3
    assert {finished for _, finished in expected} == {True, False}


def test_nothing_is_warned_of(base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(base_folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generator(folder).generate(PROMPTS, ids_of(PROMPTS))
    finally:
        logger.removeHandler(caplog.handler)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("most", [1, 5])
def test_no_more_tokens_than_asked_for(base_folder: Path, most: int) -> None:
    found = generator(base_folder, max_new_tokens=most).generate(PROMPTS, ids_of(PROMPTS))
    assert [tuple(one) for one in found if one] == [plain_loop(base_folder, prompt, most, [1]) for prompt in PROMPTS]


def test_a_model_with_few_positions_gets_what_room_there_is(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """GPT-2 has a table of positions, left-padded prompts must begin at 0, and there is nothing beyond its end."""
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=1024, n_positions=40, n_embd=32, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(8)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = generator(tmp_path).generate(PROMPTS, ids_of(PROMPTS))
    room = [min(NEW, 40 - len(prompt)) for prompt in PROMPTS]
    assert {0, 9, NEW} <= set(room)
    expected = [plain_loop(tmp_path, prompt, most, [1]) for prompt, most in zip(PROMPTS, room, strict=True)]
    assert [tuple(one) for one in found if one] == expected


def assert_generates_as(model: torch.nn.Module, base: Path, adapter: Path, prompts: Sequence[np.ndarray]) -> None:
    """The saved adapter writes what the model that it is in writes in a plain loop, and not what the base does."""
    settings = GeneratorSettings(max_new_tokens=NEW, precision="float32")
    generator = Generator(Checkpoint.find(str(adapter)), settings, Checkpoint.find(str(base)))
    found = generator.generate(prompts, ids_of(prompts))
    expected = [plain_loop_of(model.eval(), prompt, NEW, [1]) for prompt in prompts]
    assert [tuple(one) for one in found if one] == expected
    assert expected != [plain_loop(base, prompt, NEW, [1]) for prompt in prompts]


def test_an_adapter_with_a_head_and_an_embedding_of_its_own_is_whole(base_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.normal_(0, 0.5)
    model.save_pretrained(tmp_path)
    assert_generates_as(model, base_folder, tmp_path, PROMPTS[:4])


def test_an_adapter_is_switched_on(base_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    add_adapter(model, FinetuneConfig(lora_rank=4), 4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5)
    model.save_pretrained(tmp_path)
    assert_generates_as(model, base_folder, tmp_path, PROMPTS)


def table(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> pa.Table:
    rows = [
        {"example_id": 100 - number, "source": "s", "input_ids": [*prompt, *response],
         "response_spans": [len(prompt), len(prompt) + len(response)] if response else []}
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, pa.schema([EXAMPLES.field(name) for name in INPUT_COLUMNS]))


def test_columns_in_columns_out(base_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The response is not read, an empty prompt has no text, and a row of prompt alone is a prompt."""
    prompts = [[0, 7, 8, 9], [], [0, 7, 8, 9], [0, 50]]
    examples = table(prompts, [[33, 34, 1], [40, 1], [], [77]])
    assert [list(prompt) for prompt in prompts_of(examples)] == prompts
    found = generator(base_folder)(examples)
    assert found.schema.equals(GENERATIONS)
    rows = found.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "no_predictor", "ok", "ok"]
    assert [row["example_id"] for row in rows] == [100, 99, 98, 97]
    assert rows[1]["output"] is rows[1]["finished"] is rows[1]["num_new_tokens"] is None
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt:
            tokens, finished = plain_loop(base_folder, np.array(prompt, np.int32), NEW, [1])
            assert row["output"] == tokenizer.decode(tokens, skip_special_tokens=True)
            assert (row["num_new_tokens"], row["finished"]) == (len(tokens) + finished, finished)


def test_a_batch_that_does_not_fit_is_halved(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = generator(base_folder, tokens_per_batch=1000)
    expected = small.generate(PROMPTS, ids_of(PROMPTS))
    real: Callable[..., torch.Tensor] = small._model.generate
    sizes = []

    def scarce(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        sizes.append(input_ids.numel())
        if input_ids.shape[1] == 40 or input_ids.shape[0] > 3:
            raise torch.OutOfMemoryError("no room")
        return real(input_ids=input_ids, **options)

    monkeypatch.setattr(small._model, "generate", scarce)
    found = small.generate(PROMPTS, ids_of(PROMPTS))
    longest = [len(prompt) for prompt in PROMPTS].index(40)
    assert found[longest] is None
    assert [one for place, one in enumerate(found) if place != longest] == [
        one for place, one in enumerate(expected) if place != longest
    ]
    assert small._budget.num_tokens < 1000
