"""LoRA adapters: one copy of the base, which stays bitwise the same, and the losses that peft computes."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import EvaConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from scoring_tables import scoring_table
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedModel

from davir_ray.compare.generation import _check_model
from davir_ray.config.prepare import PrepareConfig
from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ConfigError, IntegrityError, ModelError
from davir_ray.inputs import check_reference
from davir_ray.models import checkpoint, scorer
from davir_ray.models.adapter import _SUPPORTED, _SUPPORTED_VALUES, adapter_switched_off, add_adapter
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel.likelihood import Likelihood, active_head
from davir_ray.models.scorer import Scorer, ScorerSettings
from davir_ray.models.training.examples import TrainingSet
from davir_ray.models.training.loop import Trainer
from davir_ray.models.training.model import save_reference
from davir_ray.models.training.parallel import add_checksums
from davir_ray.run.manifest import Manifest
from davir_ray.stages.prepare import Preparation
from davir_ray.stages.verify import _compare, plain_losses

RECIPE = FinetuneConfig(
    epochs=2, batch_size=4, learning_rate=1e-2, lora_rank=4, precision="float32", gradient_checkpointing=False
)
SETTINGS = ScorerSettings(keep_token_nll="all")


def draw_table(count: int = 12) -> pa.Table:
    draw = np.random.default_rng(3)
    examples = []
    for _ in range(count):
        length = int(draw.integers(6, 60))
        prompt = int(draw.integers(1, length - 1))
        examples.append((draw.integers(3, 700, length), [prompt, length]))
    return scoring_table(examples)


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
    list(trainer.steps())
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
    for _ in range(2):  # switching off and on has no lasting effect
        scores = with_adapter(draw_table())
        assert scores["base_token_nll"].equals(without(draw_table())["base_token_nll"])
        assert min(scores["davir"].to_pylist()) != 0


def test_the_adapters_losses_are_those_of_peft(base_folder: Path, adapter_folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager", dtype=torch.float64)
    peft = PeftModel.from_pretrained(plain, adapter_folder).double().eval()
    scores = scorer_of(base_folder, adapter_folder)(draw_table())
    assert scores["reference_nll"].to_pylist() == pytest.approx(sums(peft, draw_table()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch's compiler needs")
def test_compiled_layers_take_an_adapter_on_and_off(base_folder: Path, adapter_folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager", dtype=torch.float64)
    base = sums(plain.eval(), draw_table())
    peft = PeftModel.from_pretrained(plain, adapter_folder).double().eval()
    settings = replace(SETTINGS, compile=True)
    with_adapter, without = (scorer_of(base_folder, other, settings) for other in (adapter_folder, base_folder))
    for _ in range(2):
        scores = with_adapter(draw_table())
        assert scores["reference_nll"].to_pylist() == pytest.approx(sums(peft, draw_table()), rel=1e-5)
        assert scores["base_nll"].to_pylist() == pytest.approx(base, rel=1e-5)
        assert scores["base_token_nll"].equals(without(draw_table())["base_token_nll"])
    assert with_adapter.numerics["compile"] is True
    assert "compile" not in scorer_of(base_folder, base_folder).numerics


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
    first = new_trainer(base_folder)
    next(report for report in first.steps() if report.step == 2)
    first.save_state(tmp_path)
    add_checksums(tmp_path)
    state = torch.load(tmp_path / "training_state.pt", weights_only=True)
    assert all("lora_" in name for name in state["model"])
    second = new_trainer(base_folder, seed=RECIPE.seed)
    second.load_state(tmp_path)
    list(second.steps())
    for (name, value), other in zip(second.likelihood.named_parameters(), trained.likelihood.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_state_of_another_model_is_refused(base_folder: Path, tmp_path: Path) -> None:
    new_trainer(base_folder).save_state(tmp_path)
    add_checksums(tmp_path)
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


def test_an_adapter_of_damaged_weights_is_refused(base_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(adapter_folder, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    adapter = Checkpoint.find(str(folder))
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged or not a safetensors file"):
        adapter.check_adapter(Checkpoint.find(str(base_folder)))
    with pytest.raises(ModelError, match="cannot be loaded"):
        adapter.attach_to(load(base_folder))


def test_an_adapter_that_lacks_weights_is_refused(base_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(adapter_folder, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit the base: missing keys"):
        scorer_of(base_folder, folder)


def peft_adapter(
    base_folder: Path, folder: Path, *, kind: str = "LORA", save: bool | str = "auto", **settings: Any
) -> Path:
    """An adapter as peft itself makes and saves it, its weights not those of the start."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"]} | settings
    model = get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=save)
    return folder


@pytest.fixture(scope="module")
def bases(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The usual base; one whose head and embedding are one weight; one without linear layers in transformers' sense."""
    torch.manual_seed(0)
    tied = AutoConfig.from_pretrained(base_folder, tie_word_embeddings=True)
    gpt2 = GPT2Config(vocab_size=1024, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    folders = {"llama": base_folder}
    for name, config in {"tied": tied, "gpt2": gpt2}.items():
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model.lm_head.weight.mul_(8)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def sums(model: torch.nn.Module, table: pa.Table) -> list[float]:
    """Summed nats of each response by a whole forward of transformers or peft."""
    found = []
    for row in table.to_pylist():
        ids_1T, (start, end) = torch.tensor([row["input_ids"]]), row["response_spans"]
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(model(input_ids=ids_1T, use_cache=False).logits[0], dim=-1)
        found.append(-sum(float(logprobs_TV[at - 1, ids_1T[0, at]]) for at in range(start, end)))
    return found


LORA: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"r": 4, "lora_alpha": 3, "lora_dropout": 0.1}),
    ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["q_proj"], "lora_bias": True}),
    ("llama", {"init_lora_weights": "gaussian", "modules_to_save": ["lm_head"]}),
    ("llama", {"init_lora_weights": "orthogonal", "modules_to_save": ["embed_tokens"]}),
    ("llama", {"init_lora_weights": "eva", "eva_config": EvaConfig(), "modules_to_save": ["norm"]}),
    ("llama", {"init_lora_weights": False, "modules_to_save": ["lm_head", "embed_tokens", "norm", "mlp"]}),
    ("llama", {"use_rslora": True, "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": r".*\.(q_proj|lm_head)", "modules_to_save": ["embed_tokens"]}),
    ("llama", {"save": True}),
    ("tied", {"modules_to_save": ["lm_head"]}),
    ("tied", {"modules_to_save": ["embed_tokens"]}),
    ("tied", {"modules_to_save": ["embed_tokens", "lm_head"], "use_rslora": True}),
    ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    ("tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["lm_head"]}),
]
LINEAR = {"kind": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
IA3: list[tuple[str, dict[str, Any]]] = [
    ("llama", LINEAR | {"exclude_modules": ["layers.0.mlp.down_proj"]}),
    ("llama", LINEAR | {"init_ia3_weights": False, "modules_to_save": ["lm_head", "norm"]}),
    ("tied", LINEAR | {"modules_to_save": ["embed_tokens"]}),
    ("gpt2", {"kind": "IA3", "target_modules": ["c_attn"], "feedforward_modules": [], "fan_in_fan_out": True}),
]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of ties and of Conv1D, which the cases are about
@pytest.mark.parametrize(("base", "settings"), LORA + IA3, ids=str)
def test_losses_are_those_of_peft_and_the_base_is_what_it_was(
    bases: dict[str, Path], tmp_path: Path, base: str, settings: dict[str, Any]
) -> None:
    folder, table = peft_adapter(bases[base], tmp_path / "adapter", **settings), draw_table(4)
    scorer = scorer_of(bases[base], folder)
    first, second = scorer(table), scorer(table)  # off, on, off, on
    assert first.equals(second)
    plain = AutoModelForCausalLM.from_pretrained(bases[base], dtype=torch.float64).eval()
    assert first["base_nll"].to_pylist() == pytest.approx(sums(plain, table), rel=1e-5)
    assert first["base_token_nll"].equals(scorer_of(bases[base], bases[base])(table)["base_token_nll"])
    peft = PeftModel.from_pretrained(plain, folder).double().eval()
    assert first["reference_nll"].to_pylist() == pytest.approx(sums(peft, table), rel=1e-5)
    assert first["reference_nll"].to_pylist() != pytest.approx(first["base_nll"].to_pylist(), rel=1e-4)


INERT = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config",
}  # fmt: skip
TRIED = {
    kind: {"target_modules"} | {name for _, settings in cases for name in settings}
    for kind, cases in {"LORA": LORA, "IA3": IA3}.items()
}


@pytest.mark.parametrize("kind", TRIED)
def test_every_supported_setting_is_tried_against_peft(kind: str) -> None:
    assert _SUPPORTED[kind] <= TRIED[kind] | INERT
    starts = {settings["init_lora_weights"] for _, settings in LORA if "init_lora_weights" in settings}
    assert set(_SUPPORTED_VALUES["init_lora_weights"]) == starts | {True}


def adapter_of(folder: Path, settings: dict[str, Any]) -> Checkpoint:
    """The folder of an adapter that nothing but its settings is known of."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({}, folder / "adapter_model.safetensors")
    return Checkpoint.find(str(folder))


@pytest.mark.parametrize("kind", list(PeftType), ids=str)
def test_every_kind_of_peft_is_equal_or_refused_by_name(base_folder: Path, tmp_path: Path, kind: PeftType) -> None:
    adapter = adapter_of(tmp_path, {"peft_type": kind.value, "task_type": "CAUSAL_LM"})
    if kind in (PeftType.LORA, PeftType.IA3):
        adapter.check_adapter(Checkpoint.find(str(base_folder)))
        return
    with pytest.raises(ModelError, match=f"of the kind {kind.value}, and only LORA, IA3 are supported; merge it"):
        adapter.check_adapter(Checkpoint.find(str(base_folder)))


OTHERS = [
    (kind, name)
    for kind in TRIED
    for name in [*PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]().to_dict(), "of_a_newer_peft"]
    if name not in INERT | TRIED[kind] - {"init_lora_weights"}
]


@pytest.mark.parametrize(("kind", "name"), OTHERS)
def test_every_other_setting_of_an_adapter_is_refused_by_name(
    base_folder: Path, tmp_path: Path, kind: str, name: str
) -> None:
    defaults = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]().to_dict()
    adapter = adapter_of(tmp_path, {**defaults, "target_modules": ["q_proj"], name: "something"})
    with pytest.raises(ModelError, match=f'has {name}: "something", which is not supported; merge it'):
        adapter.check_adapter(Checkpoint.find(str(base_folder)))


def test_settings_that_the_installed_peft_does_not_know_may_be_switched_off(base_folder: Path, tmp_path: Path) -> None:
    old = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "merge_weights": False, "enable_lora": None}
    adapter_of(tmp_path, old).check_adapter(Checkpoint.find(str(base_folder)))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"use_dora": True},
        {"trainable_token_indices": [5]},
        {"bias": "all"},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [7]},
        {"target_modules": [], "target_parameters": ["up_proj.weight"]},
        {"task_type": "FEATURE_EXTRACTION"},
    ],
    ids=str,
)
def test_adapters_that_cannot_be_switched_off_are_refused_by_the_worker_too(
    base_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = peft_adapter(base_folder, tmp_path / "adapter", **settings)
    with pytest.raises(ModelError, match=f"has {list(settings)[-1]}: .*not supported"):
        scorer_of(base_folder, folder)


def test_an_embedding_that_would_replace_the_bases_is_refused(base_folder: Path, tmp_path: Path) -> None:
    """Of one row alone, which no loss may happen to meet."""
    folder = peft_adapter(base_folder, tmp_path / "adapter", save=True)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.model.embed_tokens.weight"][5] += 1
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"would replace the base's own model\.embed_tokens\.weight"):
        scorer_of(base_folder, folder)


@pytest.mark.parametrize("settings", [{"save": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}], ids=str)
def test_an_adapter_of_resized_embeddings_is_refused_before_anything_is_loaded(
    base_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    larger = AutoModelForCausalLM.from_pretrained(base_folder)
    larger.resize_token_embeddings(1032)
    larger.save_pretrained(tmp_path / "larger")
    folder = peft_adapter(tmp_path / "larger", tmp_path / "adapter", **settings)
    base, adapter = Checkpoint.find(str(base_folder)), Checkpoint.find(str(folder))
    message = r"has (lm_head|model.embed_tokens).weight of shape \[1032, 64\], but .* has \[1024, 64\]"
    with pytest.raises(ModelError, match=message):
        check_reference(adapter, Preparation(base=base, config=PrepareConfig()), [])
    with pytest.raises(ModelError, match=message):
        _check_model(adapter, base)
    with pytest.raises(ModelError, match="adapter"):
        adapter.attach_to(load(base_folder))
    adapter.check_adapter(Checkpoint.find(str(tmp_path / "larger")))


def test_the_kernel_uses_the_head_that_is_switched_on(base_folder: Path, tmp_path: Path) -> None:
    folder = peft_adapter(base_folder, tmp_path / "adapter", modules_to_save=["lm_head"])
    model = load(base_folder)
    own = model.lm_head.weight.clone()
    Checkpoint.find(str(folder)).attach_to(model)
    trained = load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    for _ in range(2):
        with adapter_switched_off(model):
            assert type(active_head(model)) is torch.nn.Linear
            assert torch.equal(active_head(model).weight, own)
        assert type(active_head(model)) is torch.nn.Linear
        assert torch.equal(active_head(model).weight, trained)


@contextmanager
def leaves_the_trained_head_off(model: PreTrainedModel) -> Iterator[None]:
    """As transformers' own switches do."""
    model.disable_adapters()
    yield
    model.enable_adapters()


def test_a_switch_that_leaves_something_off_is_found_at_the_start(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = peft_adapter(base_folder, tmp_path / "adapter", modules_to_save=["lm_head"])
    monkeypatch.setattr(scorer, "adapter_switched_off", leaves_the_trained_head_off)
    with pytest.raises(ModelError, match="gives other losses after it was switched off and on"):
        scorer_of(base_folder, folder)


def test_verify_finds_scores_of_a_switch_that_leaves_something_off(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, table = peft_adapter(base_folder, tmp_path / "adapter", modules_to_save=["lm_head"]), draw_table(4)
    scoring = scorer_of(base_folder, folder)
    losses = plain_losses(Checkpoint.find(str(base_folder)), Checkpoint.find(str(folder)), table, torch.device("cpu"))
    scored = Manifest(
        stage="score", fingerprint={}, counts={"scored": 4}, files=[], details={"numerics": [scoring.numerics]}
    )
    assert _compare(scoring(table), losses, scored, 0, 0.5).largest_nll_difference < 1e-4
    monkeypatch.setattr(scorer, "adapter_switched_off", leaves_the_trained_head_off)
    with pytest.raises(IntegrityError, match="the stored losses of example"):
        _compare(scoring(table), losses, scored, 0, 0.5)


def test_an_adapter_of_ours_may_be_on_the_head(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = new_trainer(base_folder, lora_targets=r".*(q_proj|lm_head)", epochs=1)
    list(trainer.steps())
    save_reference(trainer.likelihood, tokenizer, tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path).double().eval()
    scores = scorer_of(base_folder, tmp_path)(draw_table(4))
    assert scores["reference_nll"].to_pylist() == pytest.approx(sums(peft, draw_table(4)), rel=1e-5)


def test_an_adapter_that_changes_the_base_is_found_by_what_it_does(
    base_folder: Path, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = checkpoint.attach_adapter

    def attach_and_touch(model: PreTrainedModel, folder: str) -> None:
        attach(model, folder)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.001)

    monkeypatch.setattr(checkpoint, "attach_adapter", attach_and_touch)
    with pytest.raises(ModelError, match="changes the losses of the base even when"):
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
