"""The memory of a fine-tune, estimated, against torch's own trackers of the step that is taken."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PreTrainedModel

from davir_ray.config.training import FinetuneConfig
from davir_ray.errors import ModelError
from davir_ray.models.checkpoint import Checkpoint
from davir_ray.models.kernel import by_length
from davir_ray.models.kernel.attention import PACKED_ATTENTION
from davir_ray.models.kernel.likelihood import Likelihood, Pack
from davir_ray.models.training.memory import TrainedModel
from davir_ray.models.training.model import switch_off_dropout

LENGTHS = [1024]
SHAPE: dict[str, Any] = {
    "vocab_size": 20_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
TWO_KINDS = {"sliding_window": 128, "head_dim": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SHAPE,
    "Qwen2": SHAPE | {"vocab_size": 80_000, "tie_word_embeddings": True},
    "Gemma2": SHAPE | TWO_KINDS | {"query_pre_attn_scalar": 64},
    "Phi": SHAPE | {"num_key_value_heads": 8},
    "GPT2": {"vocab_size": 20_000, "n_embd": 512, "n_layer": 4, "n_head": 8, "bos_token_id": 1, "eos_token_id": 1},
}
EXPERTS = SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}
SETTINGS = FinetuneConfig(tokens_per_pack=sum(LENGTHS))


class Described(Checkpoint):
    """A checkpoint of which only the configuration exists."""

    def config(self) -> Any:
        return getattr(transformers, f"{self.uri}Config")(**(FAMILIES | {"Mixtral": EXPERTS})[self.uri])


def estimated(family: str, config: FinetuneConfig = SETTINGS, **plan: Any) -> Any:
    plan = {"strategy": "ddp", "num_workers": 1} | plan
    return TrainedModel(Described(uri=family, files=()), config, "cuda", has_bfloat16=True).memory(**plan)


def model_of(family: str, *, recompute: bool) -> PreTrainedModel:
    config = Described(uri=family, files=()).config()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION, dtype=torch.float32)
    switch_off_dropout(model)  # attention with dropout has no fused form on a CPU
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()  # type: ignore[no-any-return]


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> Pack:
    monkeypatch.setattr(by_length, "lengths_of", lambda _: LENGTHS)  # of fake tensors they cannot be read
    return Pack.of([(np.zeros(length, np.int32), (1, length)) for length in LENGTHS])


def backward(likelihood: torch.nn.Module, pack: Pack) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        nll_R = likelihood(pack)
    nll_R.sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replicated_model_takes_what_torch_tracks(family: str, recompute: bool, pack: Pack) -> None:
    """The second of two packs, beside the gradients of the first and AdamW's moments."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_of(family, recompute=recompute)
        likelihood, optimizer = Likelihood(model, "cuda"), torch.optim.AdamW(model.parameters(), foreach=False)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            backward(likelihood, pack)
            optimizer.step()
            tracker.reset_mod_stats()
            backward(likelihood, pack)
    tracked = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert estimated(family, recompute=recompute).total == pytest.approx(tracked, rel=0.05)


@pytest.fixture
def eight_ranks() -> Iterator[Any]:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "recompute"),
    [("Llama", False), ("Llama", True), ("Qwen2", True), ("Gemma2", False), ("Phi", False), ("Mixtral", True)],
)
def test_a_sharded_model_takes_what_torch_tracks(family: str, recompute: bool, pack: Pack, eight_ranks: Any) -> None:
    """The weights of experts have fewer rows than there are ranks: the first ones hold more than an eighth."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_of(family, recompute=recompute)
        for layer in model.transformer.h if family == "GPT2" else model.model.layers:
            fully_shard(layer, mesh=eight_ranks, mp_policy=policy)
        likelihood = Likelihood(model, "cuda")
        fully_shard(likelihood, mesh=eight_ranks, reshard_after_forward=False)
        optimizer = torch.optim.AdamW(likelihood.parameters(), foreach=False)
        tracker = FSDPMemTracker(likelihood, optimizer)
        with tracker:
            for part in range(3):
                backward(likelihood, pack)
                if part == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                tracker.reset_mod_stats()
    tracked = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    found = estimated(family, strategy="fsdp", num_workers=8, recompute=recompute)
    assert found.total == pytest.approx(tracked, rel=0.1)


def test_an_adapter_adds_its_own_gradients_and_moments_to_a_base_in_half_precision() -> None:
    found = estimated("Llama", FinetuneConfig(tokens_per_pack=256, lora_rank=8), recompute=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Described(uri="Llama", files=()).config())
        settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        trained, everything = get_peft_model(model, settings).get_nb_trainable_parameters()
    assert (found.gradients, found.moments) == (4 * trained, 8 * trained)
    assert found.weights == 2 * (everything - trained) + 4 * trained
    full = estimated("Llama", FinetuneConfig(tokens_per_pack=256), recompute=True)
    assert found.total < full.total / 4


def test_activations_grow_with_the_pack_and_less_if_recomputed() -> None:
    def activations(num_tokens: int, *, recompute: bool) -> int:
        config = FinetuneConfig(tokens_per_pack=num_tokens)
        return int(estimated("Llama", config, recompute=recompute).activations)

    kept = activations(4096, recompute=False) - activations(2048, recompute=False)
    again = activations(4096, recompute=True) - activations(2048, recompute=True)
    # What every layer keeps, but for one, is recomputed; its input is what remains.
    assert 0 < again < kept / 3


def test_a_model_whose_passes_cannot_be_tried_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise RuntimeError("a value\nis needed")

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    with pytest.raises(ModelError, match="LlamaForCausalLM needs for its activations cannot be estimated: a value is"):
        estimated("Llama", recompute=True)


@pytest.mark.parametrize(("family", "options"), [("Falcon", {}), ("GPTJ", {"rotary_dim": 16})])
def test_a_family_with_attentions_of_its_own_is_estimated_with_its_eager_one(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    shape = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "n_positions": 256}
    getattr(transformers, f"{family}Config")(**shape, **options).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    model = TrainedModel(Checkpoint(uri=str(tmp_path)), FinetuneConfig(tokens_per_pack=256), "cuda", has_bfloat16=True)
    found = model.memory(strategy="ddp", num_workers=1, recompute=False)
    # Weights of attention are written out: of 4 heads and 2 layers, at least twice in half precision.
    assert found.activations > 2 * 2 * 4 * 256**2 * 2


def test_code_of_its_own_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "is_remote_code", lambda _: True)
    model = TrainedModel(Described(uri="Llama", files=()), SETTINGS, "cuda", has_bfloat16=True)
    assert model.state(strategy="ddp", num_workers=8).total > 0
    with pytest.raises(ModelError, match="comes with its own code, so it cannot be sharded"):
        model.state(strategy="fsdp", num_workers=8)
