"""LoRA adapters: one copy of the base, which stays what it was bit for bit, and a reference that is what peft says."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from davir_ray.config import FinetuneConfig
from davir_ray.errors import ConfigError, ModelError
from davir_ray.models import checkpoint
from davir_ray.models.adapter import adapter_switched_off, add_adapter
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.finetune import Trainer, save_reference
from davir_ray.models.likelihood import Likelihood
from davir_ray.models.scorer import INPUT_COLUMNS, Scorer, ScorerSettings
from davir_ray.models.training_set import TrainingSet
from davir_ray.schema import EXAMPLES

RECIPE = FinetuneConfig(
    epochs=2, batch_size=4, learning_rate=1e-2, lora_rank=4, precision="float32", gradient_checkpointing=False
)
SETTINGS = ScorerSettings(keep_token_nll="all")


def draw_table(count: int = 12) -> pa.Table:
    draw = np.random.default_rng(3)
    rows = []
    for row in range(count):
        length = int(draw.integers(6, 60))
        prompt = int(draw.integers(1, length - 1))
        rows.append(
            {
                "example_id": row,
                "content_hash": row,
                "source": "drawn",
                "num_prompt_tokens": prompt,
                "num_response_tokens": length - prompt,
                "truncated": False,
                "input_ids": draw.integers(3, 700, length).tolist(),
                "response_spans": [prompt, length],
            }
        )
    return pa.Table.from_pylist(rows, pa.schema([EXAMPLES.field(name) for name in INPUT_COLUMNS]))


def load(folder: Path) -> PreTrainedModel:
    return Checkpoint.find(str(folder)).model(torch.float32, torch.device("cpu"))


def new_trainer(base_folder: Path, **changes: Any) -> Trainer:
    config = FinetuneConfig(**{**vars(RECIPE), **changes})
    model = load(base_folder)
    assert config.lora_rank is not None
    add_adapter(model, config, config.lora_rank)
    return Trainer(Likelihood(model), TrainingSet.of([draw_table()]), config)


@pytest.fixture(scope="module")
def trained(base_folder: Path) -> Trainer:
    trainer = new_trainer(base_folder)
    trainer.train(lambda _report: None)
    return trainer


@pytest.fixture(scope="module")
def adapter_folder(trained: Trainer, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_reference(trained.likelihood, tokenizer, folder)
    return folder


def scorer_of(base_folder: Path, reference_folder: Path, settings: ScorerSettings = SETTINGS) -> Scorer:
    return Scorer(Checkpoint.find(str(base_folder)), Checkpoint.find(str(reference_folder)), settings)


def test_the_folder_holds_an_adapter_and_no_other_weights(adapter_folder: Path) -> None:
    assert [path.name for path in adapter_folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert all("lora_" in name for name in load_file(adapter_folder / "adapter_model.safetensors"))
    assert Checkpoint.find(str(adapter_folder)).is_adapter


def test_training_moves_the_adapter_only(trained: Trainer, base_folder: Path) -> None:
    before = load(base_folder).state_dict()
    model = trained.likelihood.model
    with adapter_switched_off(model):
        after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert before.keys() == {name for name in after if "lora_" not in name}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert all(value.abs().max() > 0 for name, value in after.items() if "lora_B" in name)
    first, last = trained.summary(100)["by_step"]["loss"][0][1], trained.summary(100)["loss"]
    assert last < first


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_base_scores_the_same_bits_with_and_without_the_adapter(
    base_folder: Path, adapter_folder: Path, precision: str
) -> None:
    settings = ScorerSettings(precision=precision, keep_token_nll="all")
    with_adapter, without = (scorer_of(base_folder, other, settings) for other in (adapter_folder, base_folder))
    for _ in range(2):  # switching off and on leaves nothing behind
        scores = with_adapter(draw_table())
        assert scores["base_token_nll"].equals(without(draw_table())["base_token_nll"])
        assert min(scores["davir"].to_pylist()) != 0


def test_the_adapters_losses_are_those_of_peft(base_folder: Path, adapter_folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager", dtype=torch.float64)
    peft = PeftModel.from_pretrained(plain, adapter_folder).double().eval()
    table = draw_table()
    for row, scored in zip(table.to_pylist(), scorer_of(base_folder, adapter_folder)(table).to_pylist(), strict=True):
        ids_1T = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(peft(input_ids=ids_1T, use_cache=False).logits[0], dim=-1)
        start, end = row["response_spans"]
        expected = -sum(float(logprobs_TV[at - 1, ids_1T[0, at]]) for at in range(start, end))
        assert scored["reference_nll"] == pytest.approx(expected, rel=1e-5)


def test_there_is_one_copy_of_the_base(base_folder: Path, adapter_folder: Path) -> None:
    scorer = scorer_of(base_folder, adapter_folder)
    sizes = {
        value.data_ptr(): value.numel() for model in (scorer._base, scorer._reference) for value in model.parameters()
    }
    adapter = sum(value.numel() for value in load_file(adapter_folder / "adapter_model.safetensors").values())
    assert sum(sizes.values()) == sum(value.numel() for value in load(base_folder).parameters()) + adapter


def test_a_resumed_adapter_ends_bit_equal_and_its_state_leaves_the_base_out(
    base_folder: Path, trained: Trainer, tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    def die_after_the_second(report: Any) -> None:
        if report.step == 2:
            raise KilledError

    first = new_trainer(base_folder)
    with pytest.raises(KilledError):
        first.train(die_after_the_second)
    first.save_state(tmp_path)
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    assert all("lora_" in name for name in state["model"])
    second = new_trainer(base_folder, seed=RECIPE.seed)
    second.load_state(tmp_path)
    second.train(lambda _report: None)
    for (name, value), other in zip(second.likelihood.named_parameters(), trained.likelihood.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_state_of_another_model_is_refused(base_folder: Path, tmp_path: Path) -> None:
    new_trainer(base_folder).save_state(tmp_path)
    full = Trainer(Likelihood(load(base_folder)), TrainingSet.of([draw_table()]), RECIPE)
    with pytest.raises(ValueError, match="another model"):
        full.load_state(tmp_path)


def test_targets_that_match_nothing_are_refused(base_folder: Path) -> None:
    with pytest.raises(ConfigError, match="lora_targets 'no_such_layer'"):
        new_trainer(base_folder, lora_targets="no_such_layer")


def test_an_adapter_of_another_shape_is_refused(base_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "narrow"
    shutil.copytree(adapter_folder, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: value[..., :-1].contiguous() for name, value in weights.items()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(ModelError, match="adapter"):
        scorer_of(base_folder, folder)


def test_an_adapter_that_lacks_weights_is_refused(base_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(adapter_folder, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit the base: missing keys"):
        scorer_of(base_folder, folder)


def peft_adapter(base_folder: Path, folder: Path, **settings: Any) -> Path:
    """An adapter as peft itself makes and saves it, its weights not those of the start."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"} | settings
    model = get_peft_model(base, LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)
def test_adapters_that_peft_made_leave_the_base_as_it_was(
    base_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = peft_adapter(base_folder, tmp_path / "adapter", **settings)
    scores, plain = (scorer_of(base_folder, other)(draw_table()) for other in (folder, base_folder))
    assert scores["base_token_nll"].equals(plain["base_token_nll"])
    assert min(abs(value) for value in scores["davir"].to_pylist()) > 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"init_lora_weights": "pissa"}, "pissa rewrites the base"),
        ({"init_lora_weights": "olora"}, "olora rewrites the base"),
        ({"use_dora": True}, "DoRA is not supported"),
    ],
)
def test_adapters_that_cannot_be_switched_off_are_refused(
    base_folder: Path, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    folder = peft_adapter(base_folder, tmp_path / "adapter", **settings)
    with pytest.raises(ModelError, match=told):
        scorer_of(base_folder, folder)


def test_an_adapter_that_changes_the_base_is_found_by_what_it_does(
    base_folder: Path, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = checkpoint.attach_adapter

    def attach_and_touch(model: PreTrainedModel, folder: str) -> None:
        attach(model, folder)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.001)

    monkeypatch.setattr(checkpoint, "attach_adapter", attach_and_touch)
    with pytest.raises(ModelError, match="changes the base itself"):
        scorer_of(base_folder, adapter_folder)


def test_pickled_adapter_weights_are_refused(adapter_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(adapter_folder, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled weights are refused"):
        Checkpoint.find(str(folder))


def test_an_adapter_that_names_another_base_is_warned_of(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(adapter_folder, folder)
    scorer_of(base_folder, folder)
    assert not [message for message in caplog.messages if "was trained on" in message]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    scorer_of(base_folder, folder)
    assert any("was trained on org/other" in message for message in caplog.messages)


def test_the_digest_of_an_adapter_follows_its_weights(adapter_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(adapter_folder, folder)
    assert Checkpoint.find(str(folder)).weights_digest() == Checkpoint.find(str(adapter_folder)).weights_digest()
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, folder / "adapter_model.safetensors")
    assert Checkpoint.find(str(folder)).weights_digest() != Checkpoint.find(str(adapter_folder)).weights_digest()
